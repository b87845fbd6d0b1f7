"""Allocation of one MAC budget: the same ratio everywhere, or free inner widths by score per MAC.

A resnet's hidden width and an attention's inner width touch no other layer, so each may have its
own; the widths of the levels are tied by residuals and skips and stay those of the uniform
allocation. Inner widths never multiply each other, so the MACs are linear in them: every channel of
a layer has one price, and channels are bought by score per price until the budget is spent.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DModel
from torch import nn

from compress.common.cost import layer_macs, unet_cost, unet_inputs
from compress.methods.gradflow import depth, flow, surgery
from compress.methods.gradflow.coarse import coarsen
from compress.methods.gradflow.groups import ChannelGroup
from compress.methods.gradflow.layout import Layout, build_layout
from compress.methods.gradflow.units import unit_layout
from compress.methods.gradflow.widths import choose_widths
from compress.models.free_width import FreeWidthUNet2DModel

if TYPE_CHECKING:
    from compress.methods.gradflow.method import ChannelPruning

# inner widths stay within this factor of the uniform ones (our choice: first-order scores tell
# little about a layer of which hardly anything is left)
REACH = 2.0
# tensor cores read channels in eights
MULTIPLES = (8, 4, 2, 1)
# a layer must have this many widths to choose from before its step is made larger
CHOICES = 4


@dataclass(frozen=True)
class FreeWidth:
    """A width that no other layer shares.

    Attributes
    ----------
    name : the resnet or attention module.
    units : where the group's units lie in the mask.
    blocks : its selection blocks; each keeps the same number of units.
    unit : channels of a unit.
    step : channels by which the width moves.
    least, most : bounds of the width in steps.
    macs, params : of one channel, in the slim model.
    """

    name: str
    units: slice
    blocks: tuple[int, ...]
    unit: int
    step: int
    least: int
    most: int
    macs: float
    params: int

    @property
    def units_per_step(self) -> int:
        """Units that a step adds to each block."""
        return self.step // (self.unit * len(self.blocks))


def legal_step(width: int, base: int) -> int:
    """Channels by which a width may move: a multiple of ``base`` that divides ``width``.

    A multiple of 8 where the layer then has at least 4 widths to choose from, else of the largest
    power of two for which it has them, else ``base`` itself.

    Parameters
    ----------
    width : of the dense layer.
    base : channels that norm groups, heads and coarse masks force to go together.
    """
    steps = [math.lcm(base, multiple) for multiple in MULTIPLES]
    return next((s for s in steps if not width % s and CHOICES * s <= width), base)


def spend(
    gains: Sequence[Sequence[float]], prices: Sequence[float], budget: float
) -> tuple[list[int], float]:
    """Buy steps by gain per price until none fits; the rest of the budget is the second result.

    What is gained is less than the gain of one step below the best choice. Raising gains of one
    layer never lowers its count: its steps only come earlier, and all of them cost the same.

    Parameters
    ----------
    gains : per layer the gain of each further step, never rising.
    prices : per layer of a step, positive.
    budget : what all may cost together.
    """
    steps = [
        (-g / price, i)
        for i, (row, price) in enumerate(zip(gains, prices, strict=True))
        for g in row
    ]
    counts = [0] * len(prices)
    for _, layer in sorted(steps):
        if prices[layer] <= budget:
            counts[layer] += 1
            budget -= prices[layer]
    return counts, budget


class Allocator:
    """Chooses the free inner widths of a model under one MAC budget.

    Parameters
    ----------
    unet : the dense model.
    layout : of the uniform allocation, whose level widths stay.
    keep_macs : fraction of the dense model's MACs to keep, in (0, 1].

    Raises
    ------
    ValueError : for another class of model, or when the smallest inner widths, whose steps are
        coarse, keep more than ``keep_macs``.
    """

    def __init__(self, unet: UNet2DModel, layout: Layout, keep_macs: float) -> None:
        if type(unet) is not UNet2DModel:
            raise ValueError(
                f"allocation 'global' knows the inner layers of UNet2DModel; this model is a "
                f"{type(unet).__name__}; choose allocation 'uniform'"
            )
        with torch.device("meta"):
            sinusoid = unet.time_proj.num_channels
            slim = FreeWidthUNet2DModel({}, sinusoid, **surgery.slim_config(unet, layout))
        self.uniform = layout
        self.free = _free_widths(slim, layout)
        total, uniform = unet_cost(unet).macs, unet_cost(slim)
        least = [(f, f.least * f.step - _uniform_width(f, layout)) for f in self.free]
        self.least_macs = uniform.macs + sum(f.macs * more for f, more in least)
        self.least_params = uniform.params + sum(f.params * more for f, more in least)
        self.budget = keep_macs * total - self.least_macs
        if self.budget < 0:
            raise ValueError(
                f"the smallest inner widths must keep at most keep_macs={keep_macs}; with level "
                f"widths {list(layout.widths)} they keep {self.least_macs / total:.4f}; choose "
                "allocation 'uniform' or another keep_macs"
            )

    def layout(self, scores: torch.Tensor) -> Layout:
        """The uniform layout with the inner widths that these scores buy.

        Parameters
        ----------
        scores : ``(units,)``, larger = keep, comparable between layers.
        """
        values = scores.detach().cpu().double()
        gains = [_gains(f, values) for f in self.free]
        return self._with_steps(spend(gains, [f.macs * f.step for f in self.free], self.budget)[0])

    def layout_of(self, keep_counts: torch.Tensor) -> Layout:
        """The layout with these keep counts ``(blocks,)``."""
        inner = {f.name: int(keep_counts[f.blocks[0]]) * len(f.blocks) * f.unit for f in self.free}
        return dataclasses.replace(self.uniform, keep_counts=keep_counts.cpu(), inner=inner)

    def least_keep_counts(self) -> torch.Tensor:
        """The smallest number of units that each block may come to keep, ``(blocks,)``."""
        return self._with_steps([0] * len(self.free)).keep_counts

    def macs_range(self) -> tuple[int, int]:
        """Bounds of the slim model's MACs, whatever the scores are."""
        steps = [f.macs * f.step for f in self.free if f.most > f.least]
        room = sum(f.macs * f.step * (f.most - f.least) for f in self.free)
        # what is left when nothing fits any more is less than a step
        low = room if room <= self.budget else max(0.0, self.budget - max(steps))
        high = min(room, self.budget)
        return math.floor(self.least_macs + low), math.ceil(self.least_macs + high)

    def params_range(self) -> tuple[int, int]:
        """Bounds of the slim model's parameters, whatever the scores are."""
        bounds = []
        for sign, budget in ((-1.0, self.macs_range()[0] - self.least_macs), (1.0, self.budget)):
            # the continuous relaxation: steps in the order of parameters per MAC, the last in part
            order = sorted(self.free, key=lambda f: -sign * f.params / f.macs)
            extra = 0.0
            for f in order:
                steps = min(f.most - f.least, budget / (f.macs * f.step))
                extra += steps * f.params * f.step
                budget -= steps * f.macs * f.step
            bounds.append(self.least_params + extra)
        return math.floor(bounds[0]), math.ceil(bounds[1])

    def _with_steps(self, counts: Sequence[int]) -> Layout:
        keep_counts = self.uniform.keep_counts.clone()
        for f, count in zip(self.free, counts, strict=True):
            keep_counts[list(f.blocks)] = (f.least + count) * f.units_per_step
        return self.layout_of(keep_counts)


def plan(
    unet: UNet2DModel, groups: Sequence[ChannelGroup], method: "ChannelPruning"
) -> tuple[Layout, Allocator | None]:
    """Lay out the mask as a method's ``allocation`` and ``granularity`` say.

    Returns
    -------
    The layout at uniform widths, and what chooses the inner widths if they are free.
    """
    depth.check_granularity(unet, method.granularity, method.allocation)
    if depth.stacks_of(unet):
        layout = transformer_layout(unet, groups, method)
    else:
        widths = choose_widths(unet, groups, method.keep_macs, method.even_within)
        layout = build_layout(unet, groups, widths)
    steps = method.flow
    if method.granularity == "coarse":
        layout = coarsen(layout)
    allocator = None
    if method.allocation == "global" and layout.layers is None:
        allocator = Allocator(unet, layout, method.keep_macs)
    if steps and steps.process == "soft":
        least = allocator.least_keep_counts() if allocator else layout.keep_counts
        flow.updates_fit(steps.updates, layout.sizes(), least, steps.max_move, steps.budget)
    return layout, allocator


def transformer_layout(
    model: nn.Module, groups: Sequence[ChannelGroup], method: "ChannelPruning"
) -> Layout:
    """Gates for blocks, masks for units, or both.

    With both, blocks keep about the root of ``keep_macs``, and units do the rest.
    """
    keep, compete = method.keep_macs, method.allocation == "global"
    if method.granularity == "unit":
        return unit_layout(model, keep, compete=compete)
    if method.granularity == "both":
        gates = depth.depth_layout(model, groups, keep, method.even_within, units=True)
        return unit_layout(model, keep, compete=False, gates=gates)
    return depth.depth_layout(model, groups, keep, method.even_within)


def _uniform_width(free: FreeWidth, layout: Layout) -> int:
    return int(layout.keep_counts[list(free.blocks)].sum()) * free.unit


def _gains(free: FreeWidth, scores: torch.Tensor) -> list[float]:
    """What each step beyond the least width adds: the best units that are left in every block."""
    part = scores[free.units].view(len(free.blocks), -1)
    best = part.sort(dim=1, descending=True).values.sum(0)
    steps = best.view(-1, free.units_per_step).sum(1)
    return steps[free.least : free.most].tolist()


def _free_widths(slim: UNet2DModel, layout: Layout) -> tuple[FreeWidth, ...]:
    """The groups whose channels stay inside one resnet or attention, with what they cost."""
    layers = {layer.name: layer for layer in layer_macs(slim, unet_inputs(slim))[0]}
    modules = dict(slim.named_modules())
    free = []
    for group, offset in zip(layout.groups, layout.offsets, strict=True):
        name, _, last = group.name.rpartition(".")
        if last not in ("conv1", "to_q", "to_k", "to_v") or not all(
            slot.module.startswith(f"{name}.") for slot in group.slots
        ):
            continue
        macs, params = 0.0, 0
        for slot in group.slots:
            values = len(slot.positions) // group.width
            weight = modules[slot.module].weight
            bias = modules[slot.module].bias is not None
            if slot.side == "in":
                layer = layers[slot.module]
                macs += values * layer.factor * layer.outputs
                params += values * weight[:, 0].numel()
            elif slot.side == "out":
                layer = layers[slot.module]
                macs += values * layer.factor * layer.inputs
                params += values * (weight[0].numel() + bias)
                if slot.module.endswith(".to_q"):
                    # the two matrix products of attention; a layer's factor is its tokens
                    macs += 2 * layer.factor**2
            else:
                params += 1 + bias
        units = slice(offset, offset + group.units)
        blocks = tuple(layout.block[units].unique().tolist())
        step = legal_step(group.width, len(blocks) * group.unit)
        width = int(layout.keep_counts[list(blocks)].sum()) * group.unit
        least = max(1, math.ceil(width / REACH / step))
        most = max(least, min(group.width, math.floor(width * REACH)) // step)
        free.append(FreeWidth(name, units, blocks, group.unit, step, least, most, macs, params))
    return tuple(free)
