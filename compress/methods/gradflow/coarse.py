"""Coarse masks: neighbouring channels of one selection block share a mask."""

import dataclasses
import math

import torch

from compress.methods.gradflow.groups import ChannelGroup
from compress.methods.gradflow.layout import Layout

# at most so many channels under one mask: tensor cores read channels in eights, and in half of
# that a block of the built-in model's norm groups still has two masks to choose from
COARSE_CHANNELS = 4
# criterion estimates of the fine masks for one of the coarse ones
COARSE_REFRESH = 3


def coarsen(layout: Layout, channels: int = COARSE_CHANNELS) -> Layout:
    """The same layout with up to ``channels`` neighbouring channels under each mask.

    How many it is differs between groups: a divisor of the size and the keep
    count of each of the group's selection blocks, so that every block keeps as many channels as
    before. Wider heads stay as they are.

    Parameters
    ----------
    layout : from :func:`compress.methods.gradflow.layout.build_layout`.
    channels : the most that share a mask; 1 changes nothing.
    """
    sizes = layout.sizes()
    coarse_of = torch.empty(layout.units + 1, dtype=torch.long)
    groups, offsets, units = [], [], 0
    keep_counts = layout.keep_counts.clone()
    for group, offset in zip(layout.groups, layout.offsets, strict=True):
        blocks = layout.block[offset : offset + group.units].unique()
        together = _together(group, sizes[blocks], layout.keep_counts[blocks], channels)
        coarse_of[offset : offset + group.units] = units + torch.arange(group.units) // together
        keep_counts[blocks] = layout.keep_counts[blocks] // together
        groups.append(dataclasses.replace(group, unit=group.unit * together))
        offsets.append(units)
        units += group.units // together
    coarse_of[-1] = units
    block = torch.empty(units, dtype=torch.long)
    block[coarse_of[:-1]] = layout.block

    def moved(tables: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: coarse_of[index] for name, index in tables.items()}

    return dataclasses.replace(
        layout,
        groups=tuple(groups),
        offsets=tuple(offsets),
        units=units,
        block=block,
        keep_counts=keep_counts,
        inputs=moved(layout.inputs),
        outputs=moved(layout.outputs),
        norms=moved(layout.norms),
        queries=moved(layout.queries),
    )


def _together(
    group: ChannelGroup, sizes: torch.Tensor, keep_counts: torch.Tensor, channels: int
) -> int:
    """How many of a group's units share a mask: the largest common divisor within ``channels``."""
    common = math.gcd(*sizes.tolist(), *keep_counts.tolist())
    return max(
        k for k in range(1, common + 1) if not common % k and (k == 1 or k * group.unit <= channels)
    )
