"""Images from a diffusers pipeline, with noise and condition that depend on the sample alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)

from compress.common.foreign import foreign
from compress.models.objective import noise_schedule
from compress.models.pipelines import (
    PIXELS,
    autoencoder_of,
    check_pipeline,
    classes_of,
    condition_of,
    denoiser,
    fresh_scheduler,
    image_shape,
    kind_of,
    placed,
    with_parts,
)

SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


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
    conditions: Sequence[Any] = (),
    guidance_scale: float | None = None,
) -> torch.Tensor:
    """Draw images.

    Sample ``i`` of a seed starts from the same noise in every pipeline of the same image shape:
    images of a dense and of a compressed model can be compared one to one. The pipeline is left as
    it was: own scheduler object, training flags and devices of its parts restored after each batch.

    Where there are latents or prompts, the pipeline itself draws, without its safety checker, which
    would blacken images. A class-conditional UNet gets its labels from us, since no pipeline of
    diffusers hands it any.

    Parameters
    ----------
    pipeline : a UNet and a scheduler, or one of ``compress.models.pipelines.KINDS``.
    count : number of images.
    steps : denoising steps; more costs proportionally more time.
    sampler : ``ddim`` (eta 0: the noise decides the image; of flow matching Euler's steps) or
        ``ddpm``.
    seed : of the noise.
    batch : images per forward pass; memory grows with it, the noise does not depend on it.
    device : where the denoiser runs.
    first : index of the first sample; what is drawn for an index does not depend on it.
    conditions : prompts, or class labels; sample ``i`` has the ``i``-th of them, in turn.
    guidance_scale : for prompts and a DiTPipeline's labels; the pipeline's own default when None.

    Returns
    -------
    torch.Tensor : uint8 ``(count, channels, height, width)`` on the CPU.

    Raises
    ------
    ValueError : for an unknown sampler, impossible steps, a pipeline that is not
        supported or lacks conditions, or a model whose output is not finite.
    """
    scheduler = sampler_of(pipeline, sampler, steps)
    size, channels = image_shape(pipeline)
    where, drawn = torch.device(device), []
    needed = condition_of(pipeline)
    if bool(conditions) != bool(needed):
        classes = classes_of(denoiser(pipeline)[1].config)
        what = f"a {needed}" if needed else "nothing"
        raise ValueError(
            f"{type(pipeline).__name__} takes {what} for each image (num_class_embeds or "
            f"num_embeds_ada_norm of its denoiser is {classes}); got {len(conditions)} conditions; "
            "give what it takes, in turn"
        )
    for start in range(first, first + count, batch):
        indices = range(start, min(start + batch, first + count))
        noise = generators(seed, start, len(indices))
        batch_conditions = [conditions[i % len(conditions)] for i in indices] if needed else []
        if kind_of(pipeline) is PIXELS:
            shape = (channels, *size)
            images = _denoise(
                denoiser(pipeline)[1], scheduler, shape, noise, batch_conditions, where
            )
        else:
            images = _draw(
                pipeline, scheduler, steps, noise, batch_conditions, guidance_scale, where
            )
        if not torch.isfinite(images).all():
            raise ValueError(
                "samples should be finite; the model produced NaN or infinity, so its weights have "
                "diverged: train again with a lower learning rate"
            )
        drawn.append(to_uint8(images).cpu())
    return torch.cat(drawn)


@torch.no_grad()
def _denoise(
    unet: Any,
    scheduler: Any,
    shape: tuple[int, int, int],
    noise: list[torch.Generator],
    labels: Sequence[int],
    device: torch.device,
) -> torch.Tensor:
    """Run the sampler from the generators' noise to images in about [-1, 1]."""
    known = {"class_labels": torch.tensor(labels, device=device)} if labels else {}
    with placed([unet], device):
        # the sampler's own arithmetic stays in float32 whatever the UNet's dtype
        images = torch.stack([torch.randn(shape, generator=g) for g in noise]).to(device)
        for timestep in scheduler.timesteps:
            output = unet(images.to(unet.dtype), timestep.to(device), **known).sample.float()
            images = scheduler.step(output, timestep, images, generator=noise).prev_sample
    return images


def _draw(
    pipeline: DiffusionPipeline,
    scheduler: Any,
    steps: int,
    noise: list[torch.Generator],
    conditions: Sequence[Any],
    guidance_scale: float | None,
    device: torch.device,
) -> torch.Tensor:
    """Let the pipeline draw with our scheduler and noise; images in [-1, 1]."""
    parts = {"scheduler": scheduler}
    if "safety_checker" in pipeline.components:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    ours = with_parts(pipeline, parts)
    ours.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"batch_size": len(noise)}
    if conditions:
        options = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    if conditions and condition_of(pipeline) == "label":
        options["class_labels"] = list(conditions)
    elif conditions:
        options["prompt"] = list(conditions)
        # they take a UNet's own size for a square
        options["height"], options["width"] = image_shape(pipeline)[0]
        kind = kind_of(pipeline)
        options |= dict.fromkeys(kind.without if kind else (), False)
    modules = [part for part in ours.components.values() if isinstance(part, torch.nn.Module)]
    with placed(modules, device):
        images = ours(
            generator=noise, num_inference_steps=steps, output_type="np", **options
        ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def sampler_of(pipeline: DiffusionPipeline, sampler: str, steps: int) -> Any:
    """Build a fresh sampler with the noise schedule of the pipeline's scheduler.

    Raises
    ------
    ValueError : for a pipeline or a schedule that the sampler does not serve, or too many steps.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {sorted(SAMPLERS)}; got {sampler!r}; name one")
    check_pipeline(pipeline)
    config, length = pipeline.scheduler.config, len(noise_schedule(pipeline.scheduler))
    kind = kind_of(pipeline)
    if sampler == "ddpm" and kind and not kind.passes_generator:
        raise ValueError(
            f"{type(pipeline).__name__} hands its scheduler no generator, so ancestral steps could "
            "not be repeated; got sampler='ddpm'; use ddim"
        )
    if not 1 <= steps <= length:
        raise ValueError(
            f"steps must lie in 1..{length}, the length of the pipeline's noise schedule; got "
            f"steps={steps}; change steps"
        )
    if kind and kind.flows:  # the pipeline sets the steps, as many images have tokens
        return fresh_scheduler(FlowMatchEulerDiscreteScheduler, config)
    # samplers that know nothing of clipping do not clip; latents have no bounds
    defaults = {"clip_sample": False} if autoencoder_of(pipeline) is not None else {}
    scheduler = fresh_scheduler(SAMPLERS[sampler], defaults | dict(config))
    variance = scheduler.config.get("variance_type") or ""
    if variance.startswith("learned"):
        raise ValueError(
            f"the sampler ddpm takes its variance from the schedule; this pipeline's scheduler has "
            f"variance_type {variance!r}, which the UNet would have to predict; use ddim"
        )
    with foreign(f"the config of the {type(pipeline.scheduler).__name__}", "a noise schedule"):
        scheduler.set_timesteps(steps)
    if scheduler.timesteps.max() >= length:
        raise ValueError(
            f"with this pipeline's steps_offset of {config.get('steps_offset')} the first step "
            f"lies beyond the {length} timesteps of its schedule; got steps={steps}; take fewer"
        )
    return scheduler
