"""Parameters and multiply-accumulates (MACs), functional attention included."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from compress.common.foreign import reason

# tokens that pipelines pad a prompt to: of CLIP, as every Stable Diffusion, of T5, as PixArt-alpha
# (-Sigma, which pads to 300, is counted as alpha) and Flux, and of both one behind the other, as
# Stable Diffusion 3
PROMPT_TOKENS = 77
PIXART_PROMPT_TOKENS = 120
FLUX_PROMPT_TOKENS = 512
SD3_PROMPT_TOKENS = PROMPT_TOKENS + 256
# of an image of 1024x1024 pixels, the native size of Flux, which its config does not say
FLUX_TOKENS = 4096


@dataclass(frozen=True)
class Cost:
    """Parameters, and MACs of one forward pass, attention's matrix products included."""

    params: int
    macs: int


@dataclass(frozen=True)
class LayerMacs:
    """MACs of one layer call as ``factor * inputs * outputs``; inputs and outputs are channels."""

    name: str
    inputs: int
    outputs: int
    factor: int


class _AttentionCounter(TorchFunctionMode):
    """Collects (query tokens * key tokens * batch, value channels) of each attention call.

    On the meta device norms, linear layers, activations, sums and attention are decomposed in
    Python, which takes most of the time of a pass; only the shapes of their outputs are needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (F.group_norm, F.layer_norm, F.silu, F.gelu):
            return args[0]
        if func is F.linear:
            return args[0].new_empty((*args[0].shape[:-1], args[1].shape[0]))
        if func in (torch.Tensor.add, torch.Tensor.div) and args[0].is_floating_point():
            if not isinstance(args[1], torch.Tensor) or args[1].shape == args[0].shape:
                return args[0]
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, key, value = named["query"], named["key"], named["value"]
            heads, tokens, width = query.shape[-3:]
            batch = query[..., 0, 0, 0].numel()
            self.calls.append((batch * tokens * key.shape[-2], heads * width))
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


def layer_macs(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[LayerMacs], int]:
    """Count MACs layer by layer in one forward pass on the meta device: nothing is computed.

    Parameters
    ----------
    model : any module made of convolutions, linear layers and functional attention.
    inputs : keyword arguments of its ``forward``; tensors may lie on any device.

    Returns
    -------
    layers : one entry per convolution or linear call, in order.
    attention : MACs of the two matrix products of all ``scaled_dot_product_attention`` calls.
    """
    layers: list[LayerMacs] = []

    def record(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(module: nn.Module, _: Any, output: torch.Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                area = output.shape[0] * output.shape[2] * output.shape[3]
                kernel = module.kernel_size[0] * module.kernel_size[1]
                factor = area * kernel
                layers.append(
                    LayerMacs(
                        name, module.in_channels // module.groups, module.out_channels, factor
                    )
                )
            elif isinstance(module, nn.Linear):
                rows = output.numel() // module.out_features
                layers.append(LayerMacs(name, module.in_features, module.out_features, rows))

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    on_meta = {key: _to_meta(value) for key, value in inputs.items()}
    counter = _AttentionCounter()
    try:
        with torch.no_grad(), counter:
            functional_call(model, state, (), on_meta)
    finally:
        for handle in handles:
            handle.remove()
    return layers, sum(2 * pairs * width for pairs, width in counter.calls)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_meta(item) for key, item in value.items()}
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def sample_size(unet: Any) -> tuple[int, int]:
    """Height and width of the samples that a diffusers UNet or transformer is made for.

    Raises
    ------
    ValueError : where its config does not say one number or two.
    """
    if "axes_dims_rope" in unet.config:  # a FluxTransformer2DModel: two by two latents are a token
        return (2 * math.isqrt(FLUX_TOKENS),) * 2
    size = unet.config.get("sample_size")
    pair = size if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise ValueError(
            f"the config of the {type(unet).__name__} should say its sample_size, as one number or "
            f"as height and width; got {size}; set it"
        )
    return pair[0], pair[1]


# what a config that describes no model makes torch and diffusers raise
MISFITS: tuple[type[Exception], ...] = (ArithmeticError, LookupError, TypeError)


@contextmanager
def _as_described(unet: Any, errors: tuple[type[Exception], ...] = MISFITS) -> Iterator[None]:
    """Name the config, which diffusers does not check, where it describes what cannot run."""
    try:
        yield
    except errors as error:
        raise ValueError(
            f"a {type(unet).__name__} should run as its config describes it; got {reason(error)}; "
            "restore its config.json"
        ) from error


def unet_inputs(unet: Any, batch: int = 1, device: str = "meta") -> dict[str, Any]:
    """Keyword arguments of one forward pass of a diffusers UNet or transformer at its native size.

    A prompt has the tokens that the model's pipeline pads it to, PixArt-Sigma's those of -alpha.

    Raises
    ------
    ValueError : where its config describes what cannot run.
    """
    with _as_described(unet):
        return _inputs(unet, batch, device)


def _inputs(unet: Any, batch: int, device: str) -> dict[str, Any]:
    config = unet.config
    if "joint_attention_dim" in config:
        return _joint_inputs(unet, batch, device)
    height, width = sample_size(unet)
    timestep = torch.zeros(batch, dtype=torch.long, device=device)
    sample = torch.zeros(batch, config.in_channels, height, width, device=device)
    if config.get("norm_type") == "ada_norm_zero":  # a DiTTransformer2DModel
        return {"hidden_states": sample, "timestep": timestep, "class_labels": timestep}
    if config.get("norm_type") == "ada_norm_single":  # a PixArtTransformer2DModel
        texts = torch.zeros(batch, PIXART_PROMPT_TOKENS, config.caption_channels, device=device)
        sizes = {
            name: torch.zeros(batch, width, device=device)
            for name, width in (("resolution", 2), ("aspect_ratio", 1))
        }
        return {
            "hidden_states": sample,
            "timestep": timestep,
            "encoder_hidden_states": texts,
            "added_cond_kwargs": sizes,
        }
    inputs: dict[str, Any] = {"sample": sample, "timestep": timestep}
    text_width = config.get("cross_attention_dim")
    if text_width is not None:
        inputs["encoder_hidden_states"] = torch.zeros(
            batch, PROMPT_TOKENS, text_width, device=device
        )
    projected = config.get("projection_class_embeddings_input_dim")
    if config.get("addition_embed_type") == "text_time":
        times = torch.zeros(batch, 6, device=device)  # original size, crop and target size
        pooled = projected - times.shape[1] * config.addition_time_embed_dim
        embeds = torch.zeros(batch, pooled, device=device)
        inputs["added_cond_kwargs"] = {"text_embeds": embeds, "time_ids": times}
    kind = config.class_embed_type
    if kind in ("identity", "projection"):
        width = projected if kind == "projection" else unet.time_embedding.linear_2.out_features
        inputs["class_labels"] = torch.zeros(batch, width, device=device)
    elif kind == "timestep" or config.num_class_embeds is not None:
        inputs["class_labels"] = timestep
    return inputs


def _joint_inputs(unet: Any, batch: int, device: str) -> dict[str, Any]:
    """What a SD3Transformer2DModel takes, or a FluxTransformer2DModel at 1024x1024 pixels."""
    config, flux = unet.config, "axes_dims_rope" in unet.config
    texts = FLUX_PROMPT_TOKENS if flux else SD3_PROMPT_TOKENS

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, device=device)

    inputs = {
        "timestep": zeros(batch),
        "encoder_hidden_states": zeros(batch, texts, config.joint_attention_dim),
        "pooled_projections": zeros(batch, config.pooled_projection_dim),
    }
    if not flux:
        return inputs | {"hidden_states": zeros(batch, config.in_channels, *sample_size(unet))}
    inputs["hidden_states"] = zeros(batch, FLUX_TOKENS, config.in_channels)
    inputs |= {"img_ids": zeros(FLUX_TOKENS, 3), "txt_ids": zeros(texts, 3)}
    return inputs | ({"guidance": zeros(batch)} if config.guidance_embeds else {})


def cost(model: nn.Module, inputs: Mapping[str, Any]) -> Cost:
    """Parameters, and MACs of ``model(**inputs)``."""
    layers, attention = layer_macs(model, inputs)
    macs = sum(layer.inputs * layer.outputs * layer.factor for layer in layers) + attention
    return Cost(params=sum(p.numel() for p in model.parameters()), macs=macs)


def unet_cost(unet: Any, batch: int = 1) -> Cost:
    """:func:`cost` of a diffusers UNet at its native sample size.

    Raises
    ------
    ValueError : where its config describes what cannot run.
    """
    with _as_described(unet, (*MISFITS, RuntimeError)):
        return cost(unet, unet_inputs(unet, batch))
