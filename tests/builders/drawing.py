"""Images of any pipeline, for comparisons with what plain diffusers draws."""

import numpy as np
import torch


def draw(pipeline) -> np.ndarray:
    """Seeded images in three steps, ``(batch, height, width, channels)`` but for labelled UNets."""
    pipeline.set_progress_bar_config(disable=True)
    kind = type(pipeline).__name__
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(5)}
    if kind == "DiTPipeline":
        drawn = pipeline(class_labels=[1, 7], **options, output_type="np")
        return np.asarray(drawn.images)
    unet = pipeline.unet
    labels = getattr(unet.config, "num_class_embeds", None) and kind == "DDPMPipeline"
    if labels:  # diffusers has no pipeline that hands labels on
        images = torch.randn(2, 1, 16, 16, generator=options["generator"])
        pipeline.scheduler.set_timesteps(3)
        with torch.no_grad():
            for t in pipeline.scheduler.timesteps:
                noise = unet(images, t, class_labels=torch.tensor([1, 7])).sample
                step = pipeline.scheduler.step(noise, t, images, generator=options["generator"])
                images = step.prev_sample
        return images.numpy()
    if "Upscale" in kind:
        options |= {"image": torch.linspace(0, 1, 192).view(1, 3, 8, 8), "noise_level": 3}
        options |= {"prompt": "a red page"}
    elif kind == "LDMTextToImagePipeline":
        options |= {"prompt": ["a red page"], "height": 32, "width": 32}
    elif kind.startswith("Stable"):
        options |= {"prompt": "a red page", "negative_prompt": "blue", "height": 16, "width": 16}
    else:
        options |= {"batch_size": 2}
    return np.asarray(pipeline(**options, output_type="np").images)
