"""Images, deterministic batches and where they come from."""

from compress.data.batches import Batch, Examples, StepSampler, flipped, noise_and_timesteps
from compress.data.digits import digits
from compress.data.sources import ImageData, load_images

__all__ = [
    "Batch",
    "Examples",
    "ImageData",
    "StepSampler",
    "digits",
    "flipped",
    "load_images",
    "noise_and_timesteps",
]
