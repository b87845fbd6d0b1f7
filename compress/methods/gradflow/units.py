"""Units: attention heads and feed-forward channels of transformer blocks; the stream stays.

A unit's mask multiplies the columns of the projections back into the stream, so a head or channel
at 0 is exactly absent, whatever its biases and the norms on heads do. Layers of the same shape have
units of one price: with allocation "uniform" each keeps equally many, with "global" they compete.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.common.cost import unet_cost
from compress.methods.gradflow import depth, flow
from compress.methods.gradflow.groups import ChannelGroup, Slot
from compress.methods.gradflow.layout import Layout, index_tables
from compress.models.free_width_transformer import (
    FREE_WIDTH_TRANSFORMERS,
    InnerWidth,
    inner_widths_of,
)

NOTHING = Layout(
    groups=(),
    offsets=(),
    units=0,
    block=torch.zeros(0, dtype=torch.long),
    keep_counts=torch.zeros(0, dtype=torch.long),
    inputs={},
    outputs={},
    norms={},
    queries={},
    unaligned=(),
    widths=(),
)


@dataclass(frozen=True)
class Kind:
    """Layers of one shape, in blocks of one shape.

    Attributes
    ----------
    layers : their inner widths, by name.
    price : MACs of a unit of one layer; 0 where a layer has one unit, which stays.
    """

    layers: Mapping[str, InnerWidth]
    price: int

    @property
    def one(self) -> InnerWidth:
        """The inner width of each."""
        return next(iter(self.layers.values()))

    @property
    def size(self) -> int:
        """Units of a layer."""
        return self.one.width // self.one.unit


def unit_layout(
    model: nn.Module, keep_macs: float, *, compete: bool, gates: Layout = NOTHING
) -> Layout:
    """Lay out a mask for every head and every feed-forward channel.

    Parameters
    ----------
    model : the dense transformer.
    keep_macs : fraction of the MACs to keep, in (0, 1].
    compete : whether layers of the same shape may keep different numbers of units.
    gates : the layout of blocks that may go as well.

    Raises
    ------
    ValueError : where a unit of every layer keeps more than ``keep_macs``.
    """
    kinds = _kinds(model)
    groups, keep_counts, layers = list(gates.groups), gates.keep_counts.tolist(), []
    counts = _counts(model, kinds, keep_macs, gates, compete=compete)
    for kind, count in zip(kinds, counts, strict=True):
        parts = [kind.layers] if compete else [{name: at} for name, at in kind.layers.items()]
        groups += [_group(part) for part in parts]
        keep_counts += [count] * len(parts)
        layers += [name for name in kind.layers for _ in range(kind.size)]
    sizes = [group.units for group in groups]
    offsets = [sum(sizes[:i]) for i in range(len(groups))]
    own = len(gates.groups)
    tables = index_tables(model, groups[own:], offsets[own:], sum(sizes))
    return replace(
        gates,
        groups=tuple(groups),
        offsets=tuple(offsets),
        units=sum(sizes),
        block=torch.arange(len(groups)).repeat_interleave(torch.tensor(sizes)),
        keep_counts=torch.tensor(keep_counts),
        inputs=tables["in"],
        outputs=tables["out"],
        layers=torch.from_numpy(np.unique(layers, return_inverse=True)[1]) if compete else None,
    )


def _kinds(model: nn.Module) -> list[Kind]:
    """The kinds of layers, in the order of the model."""
    found: dict[tuple[Any, ...], dict[str, InnerWidth]] = {}
    for name, inner in inner_widths_of(model).items():
        block = depth.block_of(name)
        parameters = model.get_submodule(block).named_parameters()
        shapes = tuple((key, p.shape) for key, p in parameters)
        key = (block.rpartition(".")[0], name.removeprefix(block), shapes)
        found.setdefault(key, {})[name] = inner
    total, kinds = unet_cost(model).macs, []
    for layers in found.values():
        name, inner = next(iter(layers.items()))
        price = 0
        if inner.width > inner.unit:
            less = {name: inner.width - inner.unit}
            price = total - unet_cost(_on_meta(free_class(model), model, inner_widths=less)).macs
        kinds.append(Kind(layers, price))
    return kinds


def _on_meta(kind: Any, model: Any, **changes: Any) -> nn.Module:
    with torch.device("meta"):
        return kind.from_config(model.config, **changes)


def free_class(model: nn.Module) -> Any:
    """The class with inner widths of its own that stands for a transformer's class."""
    return next(
        FREE_WIDTH_TRANSFORMERS[c] for c in type(model).__mro__ if c in FREE_WIDTH_TRANSFORMERS
    )


def _group(layers: Mapping[str, InnerWidth]) -> ChannelGroup:
    """The group of all units of some layers of one shape."""
    slots = []
    for number, inner in enumerate(layers.values()):
        channels = tuple(range(number * inner.width, (number + 1) * inner.width))
        for layer, copies in inner.writers:
            slots.append(Slot(layer, "out", tuple(range(copies * inner.width)), channels * copies))
        for layer, first in inner.readers:
            slots.append(Slot(layer, "in", tuple(range(first, first + inner.width)), channels))
    name, one = next(iter(layers.items()))
    return ChannelGroup(name, 0, len(layers) * one.width, one.unit, tuple(slots))


def _counts(
    model: nn.Module, kinds: Sequence[Kind], keep_macs: float, gates: Layout, *, compete: bool
) -> list[int]:
    """How many units stay: of each layer of a kind, or of all of them where they compete.

    All kinds keep the same share; heads are rounded to whole ones, and feed-forwards, whose units
    are small, make up for it.
    """
    total = base = unet_cost(model).macs
    gone: frozenset[str] | set[str] = frozenset()
    if gates.gates:
        mask = any_mask(gates)
        gone = depth.closed(gates, mask)
        changes = depth.shallow_config(model, gates, mask)
        base = unet_cost(_on_meta(type(model), model, **changes)).macs
    layers = np.array(
        [sum(depth.block_of(name) not in gone for name in kind.layers) for kind in kinds]
    )
    sizes = np.array([kind.size for kind in kinds])
    heads = np.array([kind.one.unit > 1 for kind in kinds])
    costs = np.array([kind.price for kind in kinds]) * layers * sizes
    grid, least = sizes * (layers if compete else 1), 1 / sizes
    budget = keep_macs * total - (base - costs.sum())
    for rounded in (np.rint, np.floor):
        shares = np.clip(rounded(budget / costs.sum() * grid) / grid, least, 1)
        share = (budget - (costs * shares)[heads].sum()) / costs[~heads].sum()
        # what keeps all keeps 1 but for rounding
        channels = np.clip(np.floor(share * grid + 1e-6) / grid, least, 1)
        shares = np.where(heads, shares, channels)
        if (costs * shares).sum() <= budget + 1e-9 * total:
            return [int(count) for count in np.rint(shares * grid)]
    smallest = (base - costs.sum() + (costs * least).sum()) / total
    raise ValueError(
        f"keep_macs must be at least {math.ceil(smallest * 1e4) / 1e4:.4f} for this "
        f"{type(model).__name__}, what is left with one unit of every layer; got "
        f"keep_macs={keep_macs}; raise it"
    )


def any_mask(layout: Layout) -> torch.Tensor:
    """A binary mask of as many units as stay, whichever they are: enough to plan with."""
    sizes = [group.units for group in layout.groups]
    if layout.layers is not None:  # as evenly as possible from the layers that compete
        sizes = torch.unique_consecutive(layout.layers, return_counts=True)[1].tolist()
    order = torch.cat([torch.arange(size, device="cpu") for size in sizes])
    return flow.binarise(
        torch.ones(layout.units, device="cpu"),
        -order,
        layout.block,
        layout.keep_counts,
        layout.layers,
    )


def inner_widths(model: nn.Module, layout: Layout, mask: torch.Tensor) -> dict[str, int]:
    """The inner widths of the slim transformer, by the names that layers have in the dense one."""
    kept, gone = layout.extend(mask.cpu()) > 0.5, depth.closed(layout, mask)
    widths = {}
    for name, inner in inner_widths_of(model).items():
        layer, copies = inner.writers[0]
        if layer in layout.outputs and depth.block_of(name) not in gone:
            widths[name] = int(kept[layout.outputs[layer]].sum()) // copies
    return widths
