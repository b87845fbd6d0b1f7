"""The layout of a mask: the channels and the selection block of each unit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress.methods.gradflow.groups import (
    ChannelGroup,
    UNet,
    narrowed_queries,
    out_width,
)


@dataclass(frozen=True)
class Layout:
    """All masks of a model in one vector of units, and where each entry acts.

    The index tensors point into ``[mask, 1]``: position ``units`` stands for a channel that is
    never masked.

    Attributes
    ----------
    groups : the channel groups, in forward order.
    offsets : where each group's units start.
    units : length of the mask.
    block : ``(units,)`` the selection block of each unit: channels that share a norm group.
    keep_counts : ``(blocks,)`` the number of units that each block keeps in the end.
    inputs, outputs, norms : per module ``(channels,)`` index tensors.
    queries : index tensors of ``to_q`` layers whose heads get narrower; their outputs are masked.
    unaligned : concatenation norms whose slim groups hold other channels than the dense ones.
    widths : the slim model's ``block_out_channels``.
    inner : the slim model's inner widths where they are free, by resnet or attention module.
    gates : units of transformer blocks that go whole, by the block's name.
    gated : index tensors of those blocks' projections, whose outputs the gates multiply.
    layers : ``(units,)`` the layer of each unit where layers compete: each keeps a unit or more.
    """

    groups: tuple[ChannelGroup, ...]
    offsets: tuple[int, ...]
    units: int
    block: torch.Tensor
    keep_counts: torch.Tensor
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    norms: dict[str, torch.Tensor]
    queries: dict[str, torch.Tensor]
    unaligned: tuple[str, ...]
    widths: tuple[int, ...]
    inner: dict[str, int] = field(default_factory=dict)
    gates: dict[str, int] = field(default_factory=dict)
    gated: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: torch.Tensor | None = None

    def extend(self, mask: torch.Tensor) -> torch.Tensor:
        """``[mask, 1]``, the vector that the index tensors point into."""
        return torch.cat([mask, mask.new_ones(1)])

    def sizes(self) -> torch.Tensor:
        """Units per block, ``(blocks,)``."""
        return torch.bincount(self.block, minlength=len(self.keep_counts))


def build_layout(unet: UNet, groups: Sequence[ChannelGroup], widths: Sequence[int]) -> Layout:
    """Lay out the mask of a model for the given slim level widths.

    Parameters
    ----------
    unet : the dense model.
    groups : from :func:`compress.methods.gradflow.groups.find_groups`.
    widths : the slim model's ``block_out_channels``.
    """
    offsets, units = [], 0
    for group in groups:
        offsets.append(units)
        units += group.units
    tables = index_tables(unet, groups, offsets, units)
    block, keep_counts, unaligned = _blocks(unet, groups, offsets, units, widths)
    return Layout(
        groups=tuple(groups),
        offsets=tuple(offsets),
        units=units,
        block=block,
        keep_counts=keep_counts,
        inputs=tables["in"],
        outputs=tables["out"],
        norms=tables["norm"],
        queries={name: tables["out"][name] for name in narrowed_queries(unet)},
        unaligned=unaligned,
        widths=tuple(widths),
    )


def index_tables(
    model: nn.Module, groups: Sequence[ChannelGroup], offsets: Sequence[int], units: int
) -> dict[str, dict[str, torch.Tensor]]:
    """The index tensors of the groups' slots, by side ("in", "out" or "norm") and module."""
    modules = dict(model.named_modules())
    tables: dict[str, dict[str, torch.Tensor]] = {"in": {}, "out": {}, "norm": {}}
    for group, offset in zip(groups, offsets, strict=True):
        for slot in group.slots:
            table = tables[slot.side]
            if slot.module not in table:
                table[slot.module] = torch.full((_width(modules[slot.module], slot.side),), units)
            index = offset + torch.tensor(slot.channels) // group.unit
            table[slot.module][torch.tensor(slot.positions)] = index
    return tables


def _width(module: Any, side: str) -> int:
    if side == "norm":
        return len(module.weight)
    if side == "out":
        return out_width(module)
    return module.in_channels if isinstance(module, nn.Conv2d) else module.in_features


def _blocks(
    unet: UNet,
    groups: Sequence[ChannelGroup],
    offsets: Sequence[int],
    units: int,
    widths: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    """Cut every group into blocks with keep counts, so that norm groups stay norm groups.

    A norm over one group of channels requires the same number kept in each of its groups. A norm
    over a concatenation adds borders inside both parts; they are adopted where every interval
    between borders then keeps its proportional share (rounded), otherwise the norm is reported
    as unaligned and changes its membership at binarisation.
    """
    modules: dict[str, Any] = dict(unet.named_modules())
    slim = {g.name: g.slim_width(widths) // g.unit for g in groups}
    # f(x): how many of the first x units are kept, known at the borders
    borders = {
        g.name: {k * g.units // g.parts: k * slim[g.name] // g.parts for k in range(g.parts + 1)}
        for g in groups
    }
    parts: dict[str, list[tuple[int, ChannelGroup]]] = {}
    for group in groups:
        for slot in group.slots:
            # a LayerNorm is one group: it asks for nothing
            if slot.side == "norm" and isinstance(modules[slot.module], nn.GroupNorm):
                parts.setdefault(slot.module, []).append((slot.positions[0], group))
    concatenations = {name: sorted(p, key=lambda part: part[0]) for name, p in parts.items()}
    for name in [name for name, sources in concatenations.items() if len(sources) == 1]:
        (_, group) = concatenations.pop(name)[0]
        norm_groups = modules[name].num_groups
        for k in range(1, norm_groups):
            borders[group.name][k * group.width // norm_groups] = (
                k * widths[group.level] // norm_groups
            )
    unaligned = []
    for name, sources in concatenations.items():
        norm_groups = modules[name].num_groups
        total = sum(group.width for _, group in sources)
        slim_total = sum(widths[group.level] for _, group in sources)
        proposal = {group.name: dict(borders[group.name]) for _, group in sources}
        agrees, slim_start = True, 0
        for start, group in sources:
            for k in range(1, norm_groups):
                inside = k * total // norm_groups - start
                if 0 < inside < group.width:
                    kept = k * slim_total // norm_groups - slim_start
                    agrees &= proposal[group.name].setdefault(inside, kept) == kept
            slim_start += widths[group.level]
        agrees &= all(
            _proportional(proposal[group.name], widths[group.level] / group.width)
            for _, group in sources
        )
        # a part that appears twice in one concatenation would need two sets of borders at once
        if agrees and len({group.name for _, group in sources}) == len(sources):
            borders.update(proposal)
        else:
            unaligned.append(name)
    block = torch.empty(units, dtype=torch.long)
    keep_counts: list[int] = []
    for group, offset in zip(groups, offsets, strict=True):
        marks = sorted(borders[group.name].items())
        for (start, before), (stop, after) in zip(marks, marks[1:], strict=False):
            block[offset + start : offset + stop] = len(keep_counts)
            keep_counts.append(after - before)
    return block, torch.tensor(keep_counts), tuple(unaligned)


def _proportional(marks: dict[int, int], ratio: float) -> bool:
    ordered = sorted(marks.items())
    for (start, before), (stop, after) in zip(ordered, ordered[1:], strict=False):
        kept, span = after - before, stop - start
        if not 0 < kept <= span or abs(kept - ratio * span) >= 1:
            return False
    return True
