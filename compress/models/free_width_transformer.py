"""Diffusion transformers whose inner widths differ from block to block.

In diffusers' own classes every attention has the same heads, and every feed-forward the same width.
Here they are entries of the configuration; the residual stream keeps its width.

Checkpoints carry a copy of this file, for those who have diffusers but not this package: it imports
nothing else.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

# diffusers asks the module of a class that is not its own for the base by which to load it
__all__ = [
    "FREE_WIDTH_TRANSFORMERS",
    "FreeWidthDiTTransformer2DModel",
    "FreeWidthFluxTransformer2DModel",
    "FreeWidthPixArtTransformer2DModel",
    "FreeWidthSD3Transformer2DModel",
    "InnerWidth",
    "ModelMixin",
    "inner_widths_of",
]

PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
OUTPUTS = ("to_out.0", "to_add_out")


@dataclass(frozen=True)
class InnerWidth:
    """A width that is read and written inside one branch of a block.

    Attributes
    ----------
    width : channels.
    unit : channels that belong together: those of a head, or 1.
    writers : the linear layers that give them, with the values for each channel: 2 of a GEGLU.
    readers : the linear layers that take them, with the column of the first.
    """

    width: int
    unit: int
    writers: tuple[tuple[str, int], ...]
    readers: tuple[tuple[str, int], ...]


def inner_widths_of(model: nn.Module) -> dict[str, InnerWidth]:
    """The inner widths of a transformer's blocks, by the name of the module that has them.

    That is an attention, a feed-forward, or ``proj_mlp`` in the single blocks of Flux.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    widths: dict[str, InnerWidth] = {}

    def add(name: str, unit: int, writers: Mapping[str, int], readers: Mapping[str, int]) -> None:
        # what a kind of block does not have is absent or None
        writers = {key: copies for key, copies in writers.items() if key in modules}
        readers = {key: first for key, first in readers.items() if key in modules}
        layer, copies = next(iter(writers.items()))
        width = modules[layer].out_features // copies
        widths[name] = InnerWidth(width, unit, tuple(writers.items()), tuple(readers.items()))

    for name, module in modules.items():
        block = name.rpartition(".")[0]
        if isinstance(module, Attention | FluxAttention):
            readers = {f"{name}.{key}": 0 for key in OUTPUTS} | {f"{block}.proj_out": 0}
            head = module.to_q.out_features // module.heads
            add(name, head, {f"{name}.{key}": 1 for key in PROJECTIONS}, readers)
        elif isinstance(module, FeedForward):
            first, last = module.net[0].proj, module.net[2]
            copies = first.out_features // last.in_features
            add(name, 1, {f"{name}.net.0.proj": copies}, {f"{name}.net.2": 0})
        elif name.endswith(".proj_mlp"):  # after the attention's in `proj_out`
            start = modules[f"{block}.attn"].to_q.out_features
            add(name, 1, {name: 1}, {f"{block}.proj_out": start})
    return widths


def _set_width(model: nn.Module, name: str, inner: InnerWidth | None, width: int) -> None:
    if inner is None:
        raise ValueError(
            "inner_widths should name attentions and feed-forwards of the model; got "
            f"{name!r}; remove it"
        )
    if width < inner.unit or width % inner.unit:
        raise ValueError(
            f"the inner width of {name} should be a multiple of the head's size, {inner.unit}; got "
            f"{width}; change inner_widths"
        )

    def resize(layer: str, inputs: int, outputs: int) -> None:
        old: Any = model.get_submodule(layer)
        size = (old.in_features + inputs, old.out_features + outputs)
        model.set_submodule(layer, nn.Linear(*size, bias=old.bias is not None))

    for layer, copies in inner.writers:
        resize(layer, 0, copies * (width - inner.width))
    for layer, _ in inner.readers:
        resize(layer, width - inner.width, 0)
    module: Any = model.get_submodule(name)
    if inner.unit > 1 or isinstance(module, Attention | FluxAttention):
        module.heads, module.inner_dim = width // inner.unit, width
    if isinstance(module, Attention):
        module.sliceable_head_dim, module.inner_kv_dim = module.heads, width


class _FreeWidths:
    """Inner widths of its own, for a class of diffusers that comes after it among the bases.

    Parameters
    ----------
    inner_widths : channels by the name of an attention, a feed-forward or a ``proj_mlp``, such as
        ``transformer_blocks.0.attn1``; what is not named has the width of the plain class.
    plain : the parameters of the plain class.

    Raises
    ------
    ValueError : for a module that has no inner width, or a width that is not one of whole heads.
    """

    def __init__(self, inner_widths: Mapping[str, int] | None = None, **plain: Any) -> None:
        super().__init__(**plain)
        widths, model = dict(inner_widths or {}), self
        model.register_to_config(inner_widths=widths)  # type: ignore[attr-defined]
        known = inner_widths_of(model) if widths else {}  # type: ignore[arg-type]
        for name, width in widths.items():
            _set_width(model, name, known.get(name), width)  # type: ignore[arg-type]

    @staticmethod
    def _get_init_keys(input_class: Any) -> set[str]:
        # what diffusers reads from a stored configuration: it asks signatures, and `**plain` in
        # ours stands for those of the plain class
        plain = input_class.__bases__[1]
        return {*inspect.signature(plain.__init__).parameters, "inner_widths"}


class FreeWidthDiTTransformer2DModel(_FreeWidths, DiTTransformer2DModel):
    """A DiTTransformer2DModel with inner widths of its own; see :class:`_FreeWidths`."""


class FreeWidthPixArtTransformer2DModel(_FreeWidths, PixArtTransformer2DModel):
    """A PixArtTransformer2DModel with inner widths of its own; see :class:`_FreeWidths`."""


class FreeWidthSD3Transformer2DModel(_FreeWidths, SD3Transformer2DModel):
    """An SD3Transformer2DModel with inner widths of its own; see :class:`_FreeWidths`."""


class FreeWidthFluxTransformer2DModel(_FreeWidths, FluxTransformer2DModel):
    """A FluxTransformer2DModel with inner widths of its own; see :class:`_FreeWidths`."""


FREE_WIDTH_TRANSFORMERS: Mapping[type, type] = {
    kind.__bases__[1]: kind
    for kind in (
        FreeWidthDiTTransformer2DModel,
        FreeWidthPixArtTransformer2DModel,
        FreeWidthSD3Transformer2DModel,
        FreeWidthFluxTransformer2DModel,
    )
}
