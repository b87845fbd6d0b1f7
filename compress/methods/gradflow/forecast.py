"""Predicts the pruned denoiser on the meta device, without weights or training."""

from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline

from compress.common.cost import unet_cost
from compress.methods.gradflow import depth, surgery
from compress.methods.gradflow.allocation import plan
from compress.methods.gradflow.unets import find_groups
from compress.methods.training import Training
from compress.models.pipelines import denoiser

if TYPE_CHECKING:
    from compress.methods.gradflow.method import ChannelPruning


def forecast(
    pipeline: DiffusionPipeline, method: "ChannelPruning", training: Training
) -> dict[str, Any]:
    """Predict the denoiser that a method would give.

    Returns
    -------
    ``params`` and ``macs`` as (dense, least, most), which are bounds where the scores decide;
    ``widths`` and ``groups`` of the levels in words; and ``norms_that_switch_membership``.
    """
    training.check_batch(processes=1)
    unet = denoiser(pipeline)[1]
    groups = find_groups(unet)
    layout, allocator = plan(unet, groups, method)
    dense = unet_cost(unet)
    if allocator is None:
        with torch.device("meta"):
            slim = unet_cost(surgery.slim_unet(unet, layout))
        params, macs = (slim.params, slim.params), (slim.macs, slim.macs)
    else:
        params, macs = allocator.params_range(), allocator.macs_range()
    lines = [f"{len(layout.groups)} in all, {layout.units:,} units"]
    for level in () if depth.stacks_of(unet) else range(len(layout.widths)):
        here = [group for group in groups if group.level == level]
        before = sum(group.width for group in here)
        after = sum(group.slim_width(layout.widths) for group in here)
        lines.append(f"level {level}: {len(here)}, {before:,} -> {after:,} channels")
    return {
        "params": (dense.params, *params),
        "macs": (dense.macs, *macs),
        "widths": [surgery.summary(unet, layout).removeprefix("widths ")],
        "groups": lines,
        "norms_that_switch_membership": len(layout.unaligned),
    }
