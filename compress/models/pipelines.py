"""Diffusers pipelines that compress trains and samples: their parts and denoiser's inputs."""

import contextlib
import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    UNet2DModel,
)
from torch import nn

from compress.common.cost import sample_size, unet_inputs
from compress.data.sources import Condition

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """A family of pipelines.

    Attributes
    ----------
    autoencoder : the part that turns images into latents, if there is one.
    encoders : the parts that encode a prompt, each with its tokenizer.
    inputs : what the pipeline hands to its denoiser beside noisy images and timesteps.
    passes_generator : whether its scheduler gets the samples' generators at every step.
    drops_variance : whether it takes the first half of twice as many channels for the prediction.
    transformer : the class of its denoiser, where that is one.
    flows : whether the denoiser is trained by flow matching, and latents have a ``shift_factor``.
    packs : whether the transformer takes squares of two by two latents for tokens.
    without : what it would do by itself when it draws, and is told not to.
    """

    autoencoder: str | None = None
    encoders: tuple[tuple[str, str], ...] = ()
    inputs: frozenset[str] = frozenset()
    passes_generator: bool = True
    drops_variance: bool = False
    transformer: str | None = None
    flows: bool = False
    packs: bool = False
    without: tuple[str, ...] = ()

    @property
    def parts(self) -> frozenset[str]:
        """The parts without which it neither trains nor samples, beside denoiser and scheduler."""
        encoders = (part for pair in self.encoders for part in pair)
        return frozenset({*encoders, *([self.autoencoder] if self.autoencoder else [])})


# latents a side at which a PixArtAlphaPipeline tells its transformer the size of the image
SIZED = 128
# diffusers' pipelines with prompts refuse other images
PROMPTED_SIDES = 8
DENOISERS = ("unet", "transformer")
# how denoisers name noisy images and their timesteps
SAMPLES = ("sample", "hidden_states", "timestep")
# the label that a DiTPipeline takes for none
UNLABELLED = 1000
PIXELS = Kind(inputs=frozenset({"class_labels"}))
PIXART = Kind(
    "vae",
    (("tokenizer", "text_encoder"),),
    frozenset({"encoder_hidden_states", "added_cond_kwargs"}),
    drops_variance=True,
    transformer="PixArtTransformer2DModel",
    # captions and images as they are: cleaning needs packages, and sizes are the model's own
    without=("clean_caption", "use_resolution_binning"),
)
JOINT_INPUTS = frozenset({"encoder_hidden_states", "pooled_projections"})
# by the name of the class, since importing them all takes seconds
KINDS: Mapping[str, Kind] = {
    "DiTPipeline": Kind(
        "vae", inputs=frozenset({"class_labels"}), passes_generator=False, drops_variance=True
    ),
    "FluxPipeline": Kind(
        "vae",
        (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
        JOINT_INPUTS | {"img_ids", "txt_ids", "guidance"},
        passes_generator=False,
        transformer="FluxTransformer2DModel",
        flows=True,
        packs=True,
    ),
    "LDMPipeline": Kind("vqvae", passes_generator=False),
    "LDMTextToImagePipeline": Kind(
        "vqvae",
        (("tokenizer", "bert"),),
        frozenset({"encoder_hidden_states"}),
        passes_generator=False,
    ),
    "PixArtAlphaPipeline": PIXART,
    "PixArtSigmaPipeline": PIXART,
    "StableDiffusion3Pipeline": Kind(
        "vae",
        tuple((f"tokenizer{n}", f"text_encoder{n}") for n in ("", "_2", "_3")),
        JOINT_INPUTS,
        passes_generator=False,
        transformer="SD3Transformer2DModel",
        flows=True,
    ),
    "StableDiffusionPipeline": Kind(
        "vae", (("tokenizer", "text_encoder"),), frozenset({"encoder_hidden_states"})
    ),
    "StableDiffusionXLPipeline": Kind(
        "vae",
        (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
        frozenset({"encoder_hidden_states", "added_cond_kwargs"}),
    ),
}


def kind_of(pipeline: Any) -> Kind | None:
    """The family of a pipeline; None for one that compress neither trains nor samples."""
    if set(getattr(pipeline, "components", {})) == {"unet", "scheduler"}:
        return PIXELS
    return family_of(type(pipeline))


def family_of(kind: type) -> Kind | None:
    """The family of a class of pipelines that has more than a unet and a scheduler."""
    return by_class(KINDS, kind)


def by_class(table: Mapping[str, T], kind: type) -> T | None:
    """The entry of a class, or of the first of its bases that has one, by name."""
    return next((table[c.__name__] for c in kind.__mro__ if c.__name__ in table), None)


def denoiser(pipeline: Any) -> tuple[str, Any]:
    """Name and module of the part that is trained and made smaller."""
    for name in DENOISERS:
        module = getattr(pipeline, name, None)
        if module is not None:
            return name, module
    raise ValueError(
        "a pipeline with a unet or a transformer is expected; got a "
        f"{type(pipeline).__name__} with "
        f"{sorted(getattr(pipeline, 'components', {}))}; choose a DDPM-like pipeline"
    )


def condition_of(pipeline: Any) -> Condition | None:
    """What the data must say about each image for this pipeline: a caption, a label or nothing."""
    kind = kind_of(pipeline)
    if kind is None:
        return None
    if kind.encoders:
        return "caption"
    if "class_labels" not in kind.inputs:
        return None
    config = denoiser(pipeline)[1].config
    embedding, classes = config.get("class_embed_type"), classes_of(config)
    labelled = embedding == "timestep" or (embedding is None and classes is not None)
    return "label" if labelled else None


def classes_of(config: Mapping[str, Any]) -> int | None:
    """The number of labels that a denoiser's config knows; None where it takes no such labels."""
    zero = config.get("norm_type") == "ada_norm_zero"  # a DiTTransformer2DModel
    return config.get("num_embeds_ada_norm" if zero else "num_class_embeds")


def check_pipeline(pipeline: DiffusionPipeline) -> None:
    """Refuse, by name, what cannot be trained and sampled here.

    Raises
    ------
    ValueError : for another family, a part that is missing or of another class, or a UNet that
        needs what its pipeline or the data do not give.
    """
    name, kind, (part, unet) = type(pipeline).__name__, kind_of(pipeline), denoiser(pipeline)
    if kind is None:
        present = {key for key, component in pipeline.components.items() if component is not None}
        others = sorted(present - {part, "scheduler"})
        raise ValueError(
            "compress trains and samples unconditional pipelines made of a unet and a scheduler, "
            f"{', '.join(KINDS)}; {name} also has {', '.join(others)}; plan with --dry-run, or "
            "choose another pipeline"
        )
    if kind.autoencoder and not kind.encoders and not isinstance(unet.config.sample_size, int):
        raise ValueError(
            f"a {name} draws squares alone, and its UNet's config should say sample_size as one "
            f"number; got {unet.config.sample_size}; set one number, or choose another pipeline"
        )
    if kind is KINDS["DiTPipeline"] and not (
        isinstance(unet, DiTTransformer2DModel) and classes_of(unet.config) == UNLABELLED
    ):
        raise ValueError(
            f"a {name} guides away from label {UNLABELLED}, which means none where its "
            f"DiTTransformer2DModel has num_embeds_ada_norm={UNLABELLED}; got a "
            f"{type(unet).__name__} with {classes_of(unet.config)}; choose another model"
        )
    if kind.transformer and by_class({kind.transformer: True}, type(unet)) is None:
        raise ValueError(
            f"the denoiser of a {name} is a {kind.transformer}; this one is a "
            f"{type(unet).__name__}; choose another model"
        )
    gives_sizes = by_class({"PixArtAlphaPipeline": SIZED}, type(pipeline)) == sample_size(unet)[0]
    if kind is PIXART and unet.use_additional_conditions and not gives_sizes:
        raise ValueError(
            f"a {name} gives its transformer no sizes, unless it is PixArt-alpha's of {SIZED} "
            "latents a side; this one needs them; set use_additional_conditions to false in its "
            "config, or choose another model"
        )
    _check_flow(name, kind, pipeline.scheduler)
    extra = {k: v for k, v in unet_inputs(unet).items() if k not in SAMPLES}
    needs = [key for key in extra if key not in kind.inputs]
    if "class_labels" in extra and extra["class_labels"].is_floating_point():
        needs = ["class_labels as vectors"]
    if kind is PIXELS and not isinstance(_uncompiled(unet), UNet2DModel):
        needs = sorted({*needs, *extra}) or [type(unet).__name__]
    if needs:
        raise ValueError(
            f"compress gives the UNet of a {name} {', '.join(sorted(kind.inputs)) or 'nothing'}; "
            f"this one needs {', '.join(needs)}; plan with --dry-run, or choose another pipeline"
        )
    for part in sorted(kind.parts):
        if getattr(pipeline, part, None) is None:
            raise ValueError(
                f"a {name} needs its {part} to be trained and sampled; this one has none; load "
                "the whole pipeline"
            )
    reads = unet.config.in_channels
    predicts = unet.config.out_channels or reads  # Flux leaves it open
    if predicts not in {reads, (1 + kind.drops_variance) * reads}:
        raise ValueError(
            f"compress trains UNets that predict as many channels as they read; this one reads "
            f"{reads} and predicts {predicts}; choose a model "
            "without learned variance and without further images as input"
        )
    if kind.encoders and any(side % PROMPTED_SIDES for side in image_shape(pipeline)[0]):
        raise ValueError(
            f"a {name} draws images whose height and width are divisible by {PROMPTED_SIDES}; the "
            f"UNet's sample_size makes them {'x'.join(map(str, image_shape(pipeline)[0]))}; choose "
            "another model"
        )
    if kind.autoencoder:
        _check_autoencoder(getattr(pipeline, kind.autoencoder), unet, kind)


def _check_flow(name: str, kind: Kind, scheduler: Any) -> None:
    """Refuse a scheduler that its pipeline cannot draw with, or whose draws cannot be repeated."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) != kind.flows:
        raise ValueError(
            f"a {name} is {'' if kind.flows else 'not '}trained and sampled by flow matching; its "
            f"scheduler is a {type(scheduler).__name__}; choose another "
            f"{'' if kind.flows else 'scheduler or another '}pipeline"
        )
    odd = [key for key in ("invert_sigmas", "stochastic_sampling") if scheduler.config.get(key)]
    if odd:
        raise ValueError(
            f"flow matching goes from noise to a sample without chance; this pipeline's scheduler "
            f"has {' and '.join(odd)}; choose another pipeline"
        )


def plain(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline that can be trained: float32, not compiled, with a denoiser that is not frozen.

    The given one stays as it is; parts that need no change are shared with it.

    Raises
    ------
    ValueError : for parts that are quantised, lie on the meta device, or have hooks that move them,
        and for a denoiser that is not what its config describes, such as one with adapters.
    """
    trained, module = denoiser(pipeline)
    _check_described(trained, module)
    changed = {}
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            bare = _uncompiled(part)
            _check_plain(name, bare)
            as_it_is = all(p.dtype == torch.float32 for p in bare.parameters())
            as_it_is &= name != trained or all(p.requires_grad for p in bare.parameters())
            if not as_it_is or bare._compiled_call_impl is not None:
                changed[name] = cast(copy.deepcopy(bare), torch.float32)  # no copy is compiled
                changed[name].requires_grad_(name == trained)
    return with_parts(pipeline, changed)


def _check_plain(name: str, part: nn.Module) -> None:
    """Refuse a part whose values cannot be read or saved, or do not stay where they are put."""
    weights, modules = list(part.parameters()), list(part.modules())
    registries = [getattr(module, "_diffusers_hook", None) for module in modules]
    hooked = any(hasattr(module, "_hf_hook") for module in modules)
    hooked |= any(registry is not None and registry.hooks for registry in registries)
    unusable = {
        "is quantised; load the original weights": getattr(part, "is_quantized", False)
        or not all(p.is_floating_point() for p in weights),
        # of which save_pretrained writes no other weights
        "has adapters; call unload_lora_weights(), after fuse_lora() if they shall stay": getattr(
            part, "_hf_peft_config_loaded", False
        ),
        "has hooks that offload or cast its weights; call remove_all_hooks(), or load the pipeline "
        "without them": hooked,
        "lies on the meta device, without values; load it with weights": any(
            p.is_meta for p in weights
        ),
    }
    for what, there in unusable.items():
        if there:
            raise ValueError(f"methods work on plain weights; the {name} {what}")


def _check_described(name: str, module: Any) -> None:
    """Refuse a denoiser whose tensors are not those of its config."""
    bare = _uncompiled(module)
    if not isinstance(bare, ModelMixin):
        raise ValueError(
            f"the {name} should be a model of diffusers; got a {type(bare).__name__}; choose "
            "another pipeline"
        )
    with torch.device("meta"):
        described = type(bare).from_config(bare.config)
    shapes = [{key: p.shape for key, p in unet.named_parameters()} for unet in (bare, described)]
    odd = sorted(key for key, _ in shapes[0].items() ^ shapes[1].items())
    if odd:
        raise ValueError(
            f"the {name} should have the parameters that its config describes; {odd[0]} and "
            f"{len(odd) - 1} others differ; undo what was added or replaced (unload or fuse_lora "
            "and unload_lora_weights, unfuse_qkv_projections), or load it again"
        )


def _check_autoencoder(autoencoder: Any, unet: Any, kind: Kind) -> None:
    kinds = ("AutoencoderKL", "VQModel")
    if type(autoencoder).__name__ not in kinds:
        raise ValueError(
            f"latents come from {' or '.join(kinds)}; this pipeline has "
            f"{type(autoencoder).__name__}; choose another model"
        )
    config = autoencoder.config
    # VQModel quantises vectors of a width of their own, if it says so
    channels = config.get("vq_embed_dim") or config.latent_channels
    reads = unet.config.in_channels // (4 if kind.packs else 1)
    if channels != reads:
        raise ValueError(
            f"latents have {channels} channels, so the UNet should read as many; it reads "
            f"{reads}; choose a model that takes nothing beside latents"
        )
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"the autoencoder should draw images like those that it reads; it reads "
            f"{config.in_channels} channels and draws {config.out_channels}; choose another model"
        )
    scales = type(config.scaling_factor) in (int, float) and config.scaling_factor != 0
    if kind.flows and not (scales and type(config.get("shift_factor")) in (int, float)):
        raise ValueError(
            "latents are shifted by shift_factor and scaled by scaling_factor; the "
            f"{type(autoencoder).__name__} has shift_factor={config.get('shift_factor')} and "
            f"scaling_factor={config.scaling_factor}; set both in its config"
        )
    foreign = ("latents_mean", *([] if kind.flows else ["shift_factor"]))
    moved = [key for key in foreign if config.get(key) is not None]
    if moved or not scales:
        raise ValueError(
            f"latents are scaled by scaling_factor alone; the {type(autoencoder).__name__} has "
            f"scaling_factor={config.scaling_factor}{''.join(f' and {key}' for key in moved)} in "
            "its config; choose another model"
        )


def autoencoder_of(pipeline: Any) -> Any | None:
    """The part that turns images into latents, of any pipeline that has one."""
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)


def image_shape(pipeline: DiffusionPipeline) -> tuple[tuple[int, int], int]:
    """Size (height, width) and channels of a pipeline's images: its autoencoder's, if it has one.

    Raises
    ------
    ValueError : where the UNet's config does not say the size, or one that the UNet cannot halve.
    """
    unet, autoencoder = denoiser(pipeline)[1], autoencoder_of(pipeline)
    height, width = sample_size(unet)
    if isinstance(unet, UNet2DModel):  # a UNet2DConditionModel pads
        samplers = [getattr(block, "downsamplers", None) for block in unet.down_blocks]
        step = 2 ** sum(sampler is not None for sampler in samplers)
        if height % step or width % step:
            raise ValueError(
                f"the UNet's sample_size should be divisible by {step}, since it is halved on the "
                f"way down; got {height}x{width}; set it to multiples of {step}"
            )
    if autoencoder is None:
        return (height, width), unet.config.in_channels
    scale = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    return (height * scale, width * scale), autoencoder.config.in_channels


def with_parts(pipeline: DiffusionPipeline, parts: Mapping[str, Any]) -> DiffusionPipeline:
    """A pipeline of the same class with some parts or options replaced; the rest is shared.

    What torch.compile returned is shared as what it was given: constructors do not take it.
    """
    kind = type(pipeline)
    # what the constructor takes and the config remembers, such as force_zeros_for_empty_prompt
    options = {
        key: pipeline.config[key]
        for key in inspect.signature(kind).parameters
        if key in pipeline.config and key not in pipeline.components
    }
    shared = {name: _uncompiled(part) for name, part in pipeline.components.items()}
    return kind(**(options | shared | dict(parts)))


def _uncompiled(part: Any) -> Any:
    return getattr(part, "_orig_mod", part)


def fresh_scheduler(kind: type, config: Mapping[str, Any]) -> Any:
    """A scheduler of another class with the noise schedule of ``config``.

    Only the keys that both know are taken: ``from_config`` would print the others on stderr.
    """
    known = inspect.signature(kind).parameters
    try:
        return kind(**{key: config[key] for key in config if key in known})
    except NotImplementedError as error:
        raise ValueError(
            f"{kind.__name__} has no beta_schedule {config['beta_schedule']!r}, which this "
            "pipeline's scheduler has; choose another sampler, or another pipeline"
        ) from error


def default_guidance(pipeline: Any) -> float | None:
    """The ``guidance_scale`` that a pipeline uses when not told; None where it knows none."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return parameters["guidance_scale"].default if "guidance_scale" in parameters else None


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change the dtype of a network in place, and without the warning of diffusers' own ``to``."""
    return nn.Module.to(module, dtype)


@contextlib.contextmanager
def placed(modules: Iterable[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Let modules be in evaluation mode on a device; training flags and places return on exit."""
    cpu = torch.device("cpu")
    places = [(module, next((p.device for p in module.parameters()), cpu)) for module in modules]
    training = {part: part.training for module, _ in places for part in module.modules()}
    try:
        for module, _ in places:
            module.eval().to(device)
        yield
    finally:
        for module, home in places:
            module.to(home)
        for part, flag in training.items():
            part.training = flag
