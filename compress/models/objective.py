"""What the denoiser of a pipeline is trained on: clean samples, conditions, and the target.

Autoencoder and text encoders are used as they are: evaluated without gradients, never trained.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import LabelEmbedding
from torch import nn
from torch.nn import functional as F

from compress.common.cost import sample_size, unet_inputs
from compress.data.batches import Batch, Examples, by_chance, noise_and_timesteps, noise_of
from compress.data.sources import Condition, ImageData, Images, Pairs, stacked
from compress.models.pipelines import (
    UNLABELLED,
    autoencoder_of,
    by_class,
    check_pipeline,
    classes_of,
    condition_of,
    default_guidance,
    denoiser,
    fresh_scheduler,
    image_shape,
    kind_of,
)

CONSISTENCY = ("LCMScheduler", "TCDScheduler")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# an autoencoder's activations are much larger than its images
ENCODED_AT_ONCE = 8
# tells the draws of a step apart; flips are 1
DROPPED, POSTERIOR = 2, 3
# LDMTextToImagePipeline pads to this length, whatever its tokenizer says
LDM_TOKENS = 77
# a FluxPipeline divides timesteps by it, and its transformer multiplies them
FLUX_TIME = 1000
VALIDATION_DRAWS = 2
VALIDATED_AT_ONCE = 256
VALIDATION_SEED = 99


def check_trainable(pipeline: DiffusionPipeline) -> None:
    """Refuse a pipeline whose denoiser cannot be trained and sampled here."""
    check_usable(pipeline)
    guided = denoiser(pipeline)[1].config.get("guidance_embeds", True)
    if not guided and not pipeline.scheduler.config.use_dynamic_shifting:
        raise ValueError(
            "compress trains by flow matching, which undoes a distillation to few steps; a "
            f"{type(pipeline).__name__} with neither guidance_embeds nor use_dynamic_shifting is "
            "distilled so, as FLUX.1-schnell; prune the model that it was made from"
        )


def check_usable(pipeline: DiffusionPipeline) -> None:
    """Refuse a pipeline that cannot be sampled and measured here."""
    check_pipeline(pipeline)
    noise_schedule(pipeline.scheduler)
    _check_texts(pipeline)


def _check_texts(pipeline: DiffusionPipeline) -> None:
    """Refuse tokenizers, text encoders and UNets that were not made for each other."""
    kind = kind_of(pipeline)
    for parts in kind.encoders if kind else ():
        tokenizer, encoder = (getattr(pipeline, part) for part in parts)
        known, longest = encoder.get_input_embeddings().num_embeddings, tokenizer.model_max_length
        if len(tokenizer) > known:
            raise ValueError(
                f"the {parts[1]} knows {known} tokens, and its {parts[0]} has {len(tokenizer)}; "
                "load both from one pipeline"
            )
        most = getattr(encoder.config, "max_position_embeddings", longest)
        # prompts of "bert" are padded to LDM_TOKENS
        if parts[1] != "bert" and not (type(longest) is int and 0 < longest <= most):
            raise ValueError(
                f"the {parts[1]} reads prompts of {most} tokens, and its {parts[0]} pads them to "
                f"{longest}; set model_max_length in the tokenizer_config.json to {most}"
            )
    condition = inputs_of(pipeline).condition
    if condition.modules:
        with torch.no_grad():
            inputs = condition([""], [False], next(condition.modules[0].parameters()).device)
        takes, gets = _widths(unet_inputs(denoiser(pipeline)[1])), _widths(inputs)
        for name, width in gets.items():
            if takes.get(name, width) != width:
                raise ValueError(
                    f"the UNet takes {name} of width {takes[name]}, and the text encoders give "
                    f"{width}; load both from one pipeline"
                )


def _widths(inputs: Mapping[str, Any]) -> dict[str, int]:
    flat = {**inputs, **inputs.get("added_cond_kwargs", {})}
    return {name: v.shape[-1] for name, v in flat.items() if isinstance(v, torch.Tensor)}


class FlowNoise(FlowMatchEulerDiscreteScheduler):
    """The straight line from a clean sample to noise, on which timestep t is t / T of the way.

    Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (2024,
    arXiv 2403.03206). T is ``num_train_timesteps``; timesteps need not be whole.
    """

    def add_noise(
        self, samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The samples ``(batch, channels, height, width)`` on their way to the noise."""
        share = timesteps.view(-1, 1, 1, 1) / self.config.num_train_timesteps
        return torch.lerp(samples, noise, share.to(samples))

    def spread(self, timesteps: torch.Tensor, tokens: int) -> torch.Tensor:
        """Timesteps ``(batch,)`` of the density of training, of some that are uniform.

        As Stable Diffusion 3 was trained (sections 3.1 and 5.3.2): logit-normal with location 0 and
        scale 1, then moved towards noise as the scheduler does when it draws images of ``tokens``.
        """
        config = self.config
        share = torch.special.ndtri((timesteps + 0.5) / config.num_train_timesteps).sigmoid()
        if config.use_dynamic_shifting:
            rise = (config.max_shift - config.base_shift) / (
                config.max_image_seq_len - config.base_image_seq_len
            )
            mu = config.base_shift + rise * (tokens - config.base_image_seq_len)
            share = self.time_shift(mu, 1.0, share)
        else:
            share = config.shift * share / (1 + (config.shift - 1) * share)
        return share * config.num_train_timesteps


def noise_schedule(scheduler: Any) -> Any:
    """The noise schedule that a pipeline's scheduler stands for, for training.

    Samplers such as Euler's add noise in their own scaling; the UNet was trained on this one.

    Raises
    ------
    ValueError : naming a scheduler without such a schedule, or an unknown prediction type.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        _check_shift(config)
        return fresh_scheduler(FlowNoise, config)
    needed = {"num_train_timesteps", "beta_schedule"}
    if not needed <= set(config):
        raise ValueError(
            f"compress trains on a discrete schedule with {', '.join(sorted(needed))}; {name} "
            "has another one; choose a pipeline with a DDPM-like scheduler"
        )
    if name in CONSISTENCY:
        raise ValueError(
            f"compress trains by denoising, which undoes a distillation to few steps; {name} is of "
            "models distilled so; prune the model that this one was made from"
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"compress trains models with prediction_type in {', '.join(PREDICTIONS)}; this "
            f"pipeline's scheduler has {prediction!r}; choose another pipeline"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"compress trains on discrete timesteps; {name} has timestep_type "
            f"{config['timestep_type']!r}; choose another pipeline"
        )
    return fresh_scheduler(DDPMScheduler, config)


def _check_shift(config: Any) -> None:
    """Refuse what :meth:`FlowNoise.spread` cannot move timesteps by."""
    ends = ("base_image_seq_len", "max_image_seq_len")
    keys = ("base_shift", "max_shift", *ends) if config.use_dynamic_shifting else ("shift",)
    found = {key: config[key] for key in keys}
    fits = all(type(value) in (int, float) for value in found.values())
    if not (fits and (found[ends[0]] != found[ends[1]] if len(found) > 1 else found["shift"] > 0)):
        raise ValueError(
            "flow matching moves timesteps by a shift above 0, or dynamically from base_shift to "
            "max_shift between two numbers of tokens; this pipeline's scheduler has "
            f"{', '.join(f'{key}={value!r:.80}' for key, value in found.items())}; restore its "
            "scheduler_config.json"
        )


def prediction_target(scheduler: Any, batch: Batch) -> torch.Tensor:
    """What the UNet should predict, ``(batch, channels, height, width)``.

    The noise, the clean sample, or the velocity ``sqrt(a) noise - sqrt(1 - a) sample``, as the
    scheduler's ``prediction_type`` says; of flow matching the velocity ``noise - sample``.
    """
    if isinstance(scheduler, FlowNoise):
        return batch.noise - batch.images
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return batch.images
    if kind == "v_prediction":
        return scheduler.get_velocity(batch.images, batch.noise, batch.timesteps)
    return batch.noise


def predicted(
    call: Callable[..., Any],
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    condition: Mapping[str, Any],
) -> torch.Tensor:
    """What a denoiser predicts, ``(batch, channels, height, width)``, without a learned variance.

    Parameters
    ----------
    call : its forward pass.
    noisy, timesteps : ``(batch, channels, height, width)`` and ``(batch,)``.
    condition : its further inputs, by name.
    """
    if "img_ids" in condition:  # of Flux, which reads tokens, and time from 0 to 1
        tokens = F.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2)
        found = call(tokens, timestep=timesteps / FLUX_TIME, **condition).sample
        squares = found.transpose(1, 2).unflatten(2, [side // 2 for side in noisy.shape[2:]])
        return F.pixel_shuffle(squares, 2)
    sample: torch.Tensor = call(noisy, timestep=timesteps, **condition).sample
    channels = noisy.shape[1]
    # never a view: FSDP's hook on a module's output can be lost on one
    return sample if sample.shape[1] == channels else sample[:, :channels].clone()


def drop_jointly(denoiser: nn.Module) -> None:
    """Leave the dropping of labels to :class:`Labels`: each block would drop its own."""
    for module in denoiser.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


class Latents:
    """Latents times ``scaling_factor``: a draw of AutoencoderKL's posterior, or VQModel's vectors.

    Where the autoencoder has a ``shift_factor``, it is taken away before.
    VQModel quantises when it decodes, so what is trained on is not quantised.
    """

    def __init__(self, autoencoder: Any) -> None:
        self.autoencoder = autoencoder
        self.modules = (autoencoder,)

    def __call__(self, images: torch.Tensor, seed: int, step: int, first: int) -> torch.Tensor:
        """Encode ``(batch, channels, height, width)``; the draw is one of (seed, step, sample)."""
        encoded = [self.autoencoder.encode(part) for part in images.split(ENCODED_AT_ONCE)]
        if hasattr(encoded[0], "latents"):
            latents = torch.cat([part.latents for part in encoded])
        else:
            mean = torch.cat([part.latent_dist.mean for part in encoded])
            spread = torch.cat([part.latent_dist.std for part in encoded])
            latents = mean + spread * noise_of(mean, seed, step, first, POSTERIOR)
        if shift := self.autoencoder.config.get("shift_factor"):
            latents = latents - shift
        return latents * self.autoencoder.config.scaling_factor


class Conditioner:
    """Turns what the data says about images into inputs of the UNet, by name.

    ``modules`` are frozen. A call says of each sample whether it is dropped: the UNet shall not
    know its condition then. As it is: the UNet takes nothing but noisy samples and timesteps.
    """

    modules: Sequence[nn.Module] = ()

    def __call__(
        self, conditions: Sequence[Any] | None, dropped: Sequence[bool], device: torch.device
    ) -> dict[str, Any]:
        """Nothing."""
        return {}


class Labels(Conditioner):
    """Class labels; never dropped where the denoiser has no label that means none.

    Parameters
    ----------
    classes : how many there are; None where any number is one.
    unlabelled : stands for a label that is dropped, if there is one.
    """

    def __init__(self, classes: int | None, unlabelled: int | None = None) -> None:
        self.classes, self.unlabelled = classes, unlabelled

    def __call__(
        self, conditions: Sequence[Any] | None, dropped: Sequence[bool], device: torch.device
    ) -> dict[str, Any]:
        """``class_labels`` ``(batch,)``."""
        labels = torch.tensor(conditions, dtype=torch.long, device=device)
        if self.unlabelled is not None:
            labels = labels.masked_fill(torch.tensor(list(dropped), device=device), self.unlabelled)
        return {"class_labels": labels}


class Prompts(Conditioner):
    """Captions through the pipeline's own text encoder; a dropped one is the empty prompt.

    Parameters
    ----------
    tokenizer, encoder : of the pipeline.
    length : tokens that a prompt is padded to; the tokenizer's own when None.
    """

    def __init__(self, tokenizer: Any, encoder: Any, length: int | None = None) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        self.length = length or tokenizer.model_max_length
        self.modules = (encoder,)

    def __call__(
        self, conditions: Sequence[Any] | None, dropped: Sequence[bool], device: torch.device
    ) -> dict[str, Any]:
        """``encoder_hidden_states`` ``(batch, tokens, width)``."""
        texts = _without(conditions, dropped)
        tokens = _tokens(self.tokenizer, texts, self.length, device)
        mask = None
        if getattr(self.encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask
        return {"encoder_hidden_states": self.encoder(tokens.input_ids, attention_mask=mask)[0]}


class XLPrompts(Conditioner):
    """Captions as SDXL takes them: two encoders, a pooled text, sizes and crop.

    The sizes and the crop are those that the pipeline samples with by default: the image as the
    UNet sees it, cut nowhere. A dropped caption becomes what the pipeline takes for no prompt:
    zeros, or the encoded empty prompt.

    Parameters
    ----------
    pairs : tokenizer and encoder, twice; the second gives the pooled text.
    zeros : the pipeline's ``force_zeros_for_empty_prompt``.
    size : height and width of the images.
    """

    def __init__(
        self, pairs: Sequence[tuple[Any, Any]], *, zeros: bool, size: tuple[int, int]
    ) -> None:
        self.pairs, self.zeros, self.size = pairs, zeros, size
        self.modules = tuple(encoder for _, encoder in pairs)

    def __call__(
        self, conditions: Sequence[Any] | None, dropped: Sequence[bool], device: torch.device
    ) -> dict[str, Any]:
        """``encoder_hidden_states`` ``(batch, tokens, width)`` and ``added_cond_kwargs``."""
        texts = _without(conditions, dropped)
        hidden, pooled = [], torch.empty(0)
        for tokenizer, encoder in self.pairs:
            tokens = _tokens(tokenizer, texts, tokenizer.model_max_length, device)
            encoded = encoder(tokens.input_ids, output_hidden_states=True)
            hidden.append(encoded.hidden_states[-2])
            pooled = encoded[0]
        states = torch.cat(hidden, dim=-1)
        if self.zeros:
            gone = torch.tensor(list(dropped), device=device)
            states = states.masked_fill(gone[:, None, None], 0)
            pooled = pooled.masked_fill(gone[:, None], 0)
        sizes = [*self.size, 0, 0, *self.size]  # the original, where it was cut, and the result
        times = torch.tensor(sizes, dtype=states.dtype, device=device).expand(len(texts), -1)
        added = {"text_embeds": pooled, "time_ids": times}
        return {"encoder_hidden_states": states, "added_cond_kwargs": added}


class EncodedPrompts(Conditioner):
    """Captions through the pipeline's own ``encode_prompt``; a dropped one is the empty prompt.

    Parameters
    ----------
    pipeline : with its text encoders.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        kind = kind_of(pipeline)
        self.modules = tuple(getattr(pipeline, e) for _, e in kind.encoders) if kind else ()

    def __call__(
        self, conditions: Sequence[Any] | None, dropped: Sequence[bool], device: torch.device
    ) -> dict[str, Any]:
        """What :meth:`encoded` gives."""
        return self.encoded(_without(conditions, dropped), device)

    def encoded(self, texts: list[str], device: torch.device) -> dict[str, Any]:
        """``encoder_hidden_states`` ``(batch, tokens, width)``, and what else there is."""
        raise NotImplementedError


class PixArtPrompts(EncodedPrompts):
    """With the mask of the text, and with sizes where PixArt-alpha knows them."""

    def encoded(self, texts: list[str], device: torch.device) -> dict[str, Any]:
        """``added_cond_kwargs`` has ``resolution`` ``(batch, 2)`` and ``aspect_ratio``, or None."""
        states, mask, *_ = self.pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, device=device
        )
        sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.pipeline.transformer.use_additional_conditions:  # its config may leave it open
            height, width = image_shape(self.pipeline)[0]
            resolution = torch.tensor([[height, width]]).repeat(len(texts), 1)
            ratio = torch.tensor([[height / width]]).repeat(len(texts), 1)
            sizes = {"resolution": resolution.to(states), "aspect_ratio": ratio.to(states)}
        return {
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask,
            "added_cond_kwargs": sizes,
        }


class SD3Prompts(EncodedPrompts):
    """Two CLIPs beside each other, then T5; and the pooled texts of the CLIPs."""

    def encoded(self, texts: list[str], device: torch.device) -> dict[str, Any]:
        """``pooled_projections`` ``(batch, width)``."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            texts, None, None, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}


class FluxPrompts(EncodedPrompts):
    """T5, CLIP's pooled text, places of all tokens, and the guidance that was distilled."""

    def encoded(self, texts: list[str], device: torch.device) -> dict[str, Any]:
        """``img_ids`` and ``txt_ids`` ``(tokens, 3)``, and ``guidance`` ``(batch,)`` if known.

        The guidance is what the pipeline draws with by default.
        """
        states, pooled, text_ids = self.pipeline.encode_prompt(texts, None, device=device)
        transformer = self.pipeline.transformer
        height, width = (side // 2 for side in sample_size(transformer))
        places = torch.cartesian_prod(*map(torch.arange, (1, height, width)))
        inputs = {
            "encoder_hidden_states": states,
            "pooled_projections": pooled,
            "txt_ids": text_ids,
            "img_ids": places.to(text_ids),
        }
        scale = default_guidance(self.pipeline)
        if transformer.config.guidance_embeds and scale is not None:
            inputs["guidance"] = torch.full((len(texts),), scale, device=device)
        return inputs


# by the name of the class of the pipeline
ENCODED: Mapping[str, type[EncodedPrompts]] = {
    "FluxPipeline": FluxPrompts,
    "PixArtAlphaPipeline": PixArtPrompts,
    "PixArtSigmaPipeline": PixArtPrompts,
    "StableDiffusion3Pipeline": SD3Prompts,
}


def _without(conditions: Sequence[Any] | None, dropped: Sequence[bool]) -> list[str]:
    for text in conditions or ():
        if not isinstance(text, str):
            raise ValueError(
                f"captions should be texts; got {text!r}; mend the data, or name another column "
                "with columns.caption"
            )
    return ["" if gone else text for text, gone in zip(conditions or (), dropped, strict=True)]


def _tokens(tokenizer: Any, texts: Sequence[str], length: int, device: torch.device) -> Any:
    return tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).to(device)


@dataclass(frozen=True)
class Inputs:
    """Makes the batches of a pipeline's UNet from what the data gives.

    Parameters
    ----------
    wants : what the data must say about each image.
    encode : makes latents of images; the images are the clean samples when None.
    condition : gives the UNet's further inputs.
    spread : turns timesteps that are uniform into those of training; they stay when None.
    """

    wants: Condition | None = None
    encode: Latents | None = None
    condition: Conditioner = field(default_factory=Conditioner)
    spread: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The frozen parts."""
        return (*(self.encode.modules if self.encode else ()), *self.condition.modules)

    def check(self, data: ImageData) -> None:
        """Refuse data that does not say what the UNet takes."""
        if self.wants is None:
            return
        if data.train_conditions is None or data.held_out_conditions is None:
            raise ValueError(
                f"the model takes a {self.wants} with each image; {data.name} gives images alone; "
                f"load it with load_images(..., condition={self.wants!r}), or give an ImageData "
                "with conditions"
            )
        if isinstance(self.condition, Labels) and self.condition.classes is not None:
            labels = {*data.train_conditions, *data.held_out_conditions}
            if not labels <= set(range(self.condition.classes)):
                raise ValueError(
                    f"the model knows labels from 0 to {self.condition.classes - 1}; {data.name} "
                    f"has labels from {min(labels)} to {max(labels)}; choose data that fits it"
                )

    def to(self, device: torch.device | str) -> "Inputs":
        """Move the frozen parts, and put them into evaluation mode."""
        for module in self.modules:
            module.eval().to(device)
        return self

    @torch.no_grad()
    def batch(
        self,
        examples: Examples,
        timesteps: int,
        seed: int,
        step: int,
        first: int = 0,
        total: int | None = None,
        *,
        dropout: float = 0.0,
    ) -> Batch:
        """A denoising batch; every draw is a function of (seed, step, sample).

        Parameters
        ----------
        examples : images on the device, with what the data says about them.
        timesteps, seed, step, first, total : as in
            :func:`compress.data.batches.noise_and_timesteps`.
        dropout : share of the captions or labels that are dropped, for classifier-free guidance.
        """
        images = examples.images
        clean = self.encode(images, seed, step, first) if self.encode else images
        dropped = by_chance(len(images), dropout, seed, step, first, DROPPED)
        condition = self.condition(examples.conditions, dropped, images.device)
        batch = noise_and_timesteps(clean, timesteps, seed, step, first, total)
        times = self.spread(batch.timesteps) if self.spread else batch.timesteps
        return batch._replace(timesteps=times, condition=condition)


def inputs_of(pipeline: DiffusionPipeline) -> Inputs:
    """What the UNet of a pipeline is trained on.

    Of a pipeline that ``check_pipeline`` refuses, nothing but pixels: enough to plan with.
    """
    kind, wants = kind_of(pipeline), condition_of(pipeline)
    parts = [part for pair in kind.encoders for part in pair] if kind else []
    if kind is None or any(getattr(pipeline, part, None) is None for part in parts):
        return Inputs()
    encode = Latents(autoencoder_of(pipeline)) if kind.autoencoder else None
    pairs = [(getattr(pipeline, a), getattr(pipeline, b)) for a, b in kind.encoders]
    condition = Conditioner()
    if wants == "label":
        config = denoiser(pipeline)[1].config
        unlabelled = UNLABELLED if "num_embeds_ada_norm" in config else None
        condition = Labels(classes_of(config), unlabelled)
    spread, prompts = None, by_class(ENCODED, type(pipeline))
    schedule = noise_schedule(pipeline.scheduler) if kind.flows else None
    if isinstance(schedule, FlowNoise):
        transformer = denoiser(pipeline)[1]
        patch = 2 if kind.packs else transformer.config.patch_size
        tokens = math.prod(side // patch for side in sample_size(transformer))
        spread = partial(schedule.spread, tokens=tokens)
    if prompts:
        condition = prompts(pipeline)
    elif len(pairs) == 1:
        length = LDM_TOKENS if kind.encoders[0][1] == "bert" else None
        condition = Prompts(pairs[0][0], pairs[0][1], length)
    elif pairs:
        condition = XLPrompts(
            pairs,
            zeros=pipeline.config.force_zeros_for_empty_prompt,
            size=image_shape(pipeline)[0],
        )
    return Inputs(wants, encode, condition, spread)


def validation_loss(
    predict: Callable[..., torch.Tensor],
    images: Images | torch.Tensor,
    scheduler: Any,
    draws: int = VALIDATION_DRAWS,
    *,
    inputs: Inputs | None = None,
    conditions: Sequence[Any] | None = None,
    device: torch.device | str | None = None,
) -> float:
    """Mean squared error of the prediction over all images, with fixed noise and timesteps.

    Parameters
    ----------
    predict : maps noisy samples ``(batch, channels, height, width)``, timesteps ``(batch,)`` and
        further inputs of the UNet, by name, to the prediction.
    images : ``(n, channels, height, width)`` in [-1, 1].
    scheduler : for ``add_noise`` and the target.
    draws : noise draws per image.
    inputs : makes clean samples and conditions; pixels alone by default.
    conditions : what the data says about each image.
    device : where ``predict`` works; where the images are when None.
    """
    inputs = inputs or Inputs()
    pairs, count = Pairs(images, conditions), len(images)
    total, length = 0.0, scheduler.config.num_train_timesteps
    with torch.no_grad():
        for draw in range(draws):
            for first in range(0, count, VALIDATED_AT_ONCE):
                part = range(first, min(first + VALIDATED_AT_ONCE, count))
                examples = stacked(pairs[index] for index in part).to(device)
                batch = inputs.batch(examples, length, VALIDATION_SEED, draw, first, count)
                noisy = scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
                predicted = predict(noisy, batch.timesteps, **batch.condition)
                error = (predicted - prediction_target(scheduler, batch)).square()
                total += error.mean(dim=(1, 2, 3)).sum().item()
    return total / (draws * count)
