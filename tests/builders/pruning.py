"""Pruning runs of any UNet, or pipeline, on seeded noise."""

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from compress.common.journal import Journal
from compress.data.sources import ImageData
from compress.methods.base import PruneJob
from compress.methods.gradflow.method import ChannelPruning
from compress.methods.gradflow.train import PruningRun
from compress.methods.training import Training


def noise(size: int = 8, train: int = 12, held_out: int = 8) -> ImageData:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(train + held_out, 1, size, size, generator=generator) * 2 - 1
    return ImageData("noise", images[:train], images[train:])


def start(
    method: ChannelPruning,
    training: Training,
    unet: UNet2DModel | DiffusionPipeline,
    *,
    data: ImageData | None = None,
    scheduler: DDPMScheduler | None = None,
    folder=None,
    resume: bool = False,
    validated: bool = False,
) -> PruningRun:
    """A run whose loss is validated as often as everybody's, or at its end alone."""
    # few timesteps: Diff-Pruning takes a gradient at each
    pipeline = unet
    if not isinstance(pipeline, DiffusionPipeline):
        pipeline = DDPMPipeline(unet, scheduler or DDPMScheduler(num_train_timesteps=10))
    job = PruneJob(pipeline, data or noise(), training, "cpu", Journal(folder), resume)
    run = PruningRun(method, job)
    if not validated:
        run.validate_every = run.total_steps
    return run
