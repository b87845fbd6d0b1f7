"""Images from an unconditional diffusers pipeline, with noise that depends on the sample alone."""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline

SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}
# what a UNet's config says when it needs more than noise
CONDITIONS = ("class_embed_type", "num_class_embeds", "cross_attention_dim")


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Round images ``(..., height, width)`` in [-1, 1] to uint8; what lies outside is clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """One CPU generator per sample, a function of (seed, global sample index) alone.

    Initial noise and, for DDPM, the noise of every later step come from the sample's own generator:
    neither the batch size, nor the device, nor the model decides which noise a sample gets.
    """
    states = [
        int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
        for index in range(first, first + count)
    ]
    return [torch.Generator().manual_seed(state >> 1) for state in states]


def sample(
    pipeline: DiffusionPipeline,
    *,
    count: int,
    steps: int,
    sampler: str,
    seed: int,
    batch: int = 128,
    device: str | torch.device = "cpu",
    first: int = 0,
) -> torch.Tensor:
    """Draw images; see `sample_batches`, which this concatenates.

    Returns
    -------
    torch.Tensor : uint8 ``(count, channels, height, width)`` on the CPU.
    """
    batches = sample_batches(
        pipeline,
        count=count,
        steps=steps,
        sampler=sampler,
        seed=seed,
        batch=batch,
        device=device,
        first=first,
    )
    return torch.cat(list(batches))


def sample_batches(
    pipeline: DiffusionPipeline,
    *,
    count: int,
    steps: int,
    sampler: str,
    seed: int,
    batch: int = 128,
    device: str | torch.device = "cpu",
    first: int = 0,
) -> Iterator[torch.Tensor]:
    """Draw images batch by batch, so that the caller can show progress.

    Sample ``i`` of a seed starts from the same noise in every pipeline of the same image shape:
    images of a dense and of a compressed model can be compared one to one. The pipeline is left as
    it was: own scheduler object, training flags and device of the UNet restored after each batch.

    Parameters
    ----------
    pipeline : unconditional, with a UNet2DModel as ``unet`` and a ``scheduler``; e.g. DDPMPipeline.
    count : number of images.
    steps : denoising steps; more costs proportionally more time.
    sampler : ``ddim`` (eta 0: the noise decides the image) or ``ddpm``.
    seed : of the noise.
    batch : images per forward pass; memory grows with it, the noise does not depend on it.
    device : where the UNet runs.
    first : index of the first sample; what is drawn for an index does not depend on it.

    Yields
    ------
    torch.Tensor : uint8 ``(at most batch, channels, height, width)`` on the CPU.

    Raises
    ------
    ValueError : for an unknown sampler, impossible counts or steps, a pipeline that needs more than
        noise, or a model whose output is not finite.
    """
    scheduler = _scheduler(pipeline, sampler, steps)
    for name, value in (("count", count), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {name}={value}; raise it")
    shape = _image_shape(pipeline.unet)
    for start in range(first, first + count, batch):
        noise = generators(seed, start, min(batch, first + count - start))
        yield _denoise(pipeline.unet, scheduler, shape, noise, torch.device(device))


@torch.no_grad()
def _denoise(
    unet: Any,
    scheduler: Any,
    shape: tuple[int, int, int],
    noise: list[torch.Generator],
    device: torch.device,
) -> torch.Tensor:
    """Run the sampler from the generators' noise to uint8 images."""
    home, training = unet.device, {module: module.training for module in unet.modules()}
    unet.eval().to(device)
    try:
        # the sampler's own arithmetic stays in float32 whatever the UNet's dtype
        images = torch.stack([torch.randn(shape, generator=g) for g in noise]).to(device)
        for timestep in scheduler.timesteps:
            output = unet(images.to(unet.dtype), timestep.to(device)).sample.float()
            images = scheduler.step(output, timestep, images, generator=noise).prev_sample
    finally:
        unet.to(home)
        for module, flag in training.items():
            module.training = flag
    if not torch.isfinite(images).all():
        raise ValueError(
            "samples should be finite; the model produced NaN or infinity, so its weights have "
            "diverged: train again with a lower learning rate"
        )
    return to_uint8(images).cpu()


def _scheduler(pipeline: DiffusionPipeline, sampler: str, steps: int) -> Any:
    """Build a fresh sampler with the noise schedule of the pipeline's scheduler."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {sorted(SAMPLERS)}; got {sampler!r}; name one")
    parts = set(getattr(pipeline, "components", {}))
    if parts != {"unet", "scheduler"}:
        raise ValueError(
            "sampling handles unconditional pipelines, made of a unet and a scheduler; got "
            f"{type(pipeline).__name__} with {sorted(parts)}; use a DDPMPipeline or DDIMPipeline"
        )
    config = pipeline.scheduler.config
    needed = {"num_train_timesteps", "beta_schedule", "prediction_type"}
    if not needed <= set(config):
        raise ValueError(
            f"the scheduler's config must hold {sorted(needed)}; "
            f"{type(pipeline.scheduler).__name__} lacks {sorted(needed - set(config))}; give the "
            "pipeline a DDPM or DDIM scheduler"
        )
    if not 1 <= steps <= config["num_train_timesteps"]:
        raise ValueError(
            f"steps must lie in 1..{config['num_train_timesteps']}, the length of the pipeline's "
            f"noise schedule; got steps={steps}; change steps"
        )
    kind = SAMPLERS[sampler]
    known = inspect.signature(kind.__init__).parameters
    # only the keys that both schedulers know: from_config would print the others on stderr
    scheduler = kind(**{key: config[key] for key in config if key in known})
    scheduler.set_timesteps(steps)
    return scheduler


def _image_shape(unet: Any) -> tuple[int, int, int]:
    """``(channels, height, width)`` of the images that an unconditional UNet makes."""
    config, size = unet.config, unet.config.sample_size
    conditions = [name for name in CONDITIONS if config.get(name)]
    if conditions:
        raise ValueError(
            f"sampling handles unconditional UNets; {type(unet).__name__} has "
            f"{', '.join(conditions)} in its config; use a UNet2DModel without conditions"
        )
    if size is None:
        raise ValueError(
            "the UNet's config should say its sample_size; it is null; set it to the height and "
            "width of the images"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width
