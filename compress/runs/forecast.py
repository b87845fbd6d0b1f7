"""What pruning a pipeline would make of it: groups, widths, costs and bytes, without training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from compress.checkpoints.exporting import exported_bytes
from compress.common.cost import Cost, unet_cost
from compress.methods.gradflow import GradFlow, OneShot, surgery
from compress.methods.gradflow.allocation import Allocator, plan
from compress.methods.gradflow.groups import ChannelGroup, dense_widths, find_groups
from compress.methods.gradflow.layout import Layout
from compress.methods.gradflow.mover import MaskMover
from compress.methods.training import Training

Bounds = tuple[int, int]


def forecast(
    pipeline: DiffusionPipeline, source: Path, method: GradFlow | OneShot, training: Training
) -> dict[str, Any]:
    """Predict the pipeline that a method exports.

    Weights are neither copied nor changed: all is counted on the meta device.

    Parameters
    ----------
    pipeline : the dense one.
    source : the folder that it was read from.
    method, training : the knobs.

    Returns
    -------
    ``params``, ``macs`` and ``bytes`` (bounds where the scores decide), ``keep_macs`` (achieved; at
    most, where the scores decide), ``widths`` and ``groups`` of the levels. The bytes are those of
    all files of the pipeline, the UNet's in float32; model card and ``compress.json`` come on top.

    Raises
    ------
    ValueError : for an unsupported model, unreachable ``keep_macs`` or impossible schedule.
    """
    training.check_batch(processes=1)
    unet = pipeline.unet
    groups = find_groups(unet)
    layout, allocator = plan(unet, groups, method)
    # made for its checks of the schedule alone
    MaskMover(
        method,
        layout,
        pipeline.scheduler,
        lambda _number: [],
        step_rate=training.lr,
        seed=training.seed,
        device=torch.device("cpu"),
        allocator=allocator,
    )
    before = unet_cost(unet)
    params, macs = _slim_cost(unet, layout, allocator)
    with torch.device("meta"):
        dense = type(unet).from_config(surgery.public_config(unet))
    return {
        "params": [f"{before.params:,} -> {span(params)}"],
        "macs": [f"{before.macs:,} -> {span(macs)}"],
        "keep_macs": round(macs[1] / before.macs, 4),
        "bytes": [
            f"{exported_bytes(pipeline, source, dense):,} -> "
            f"{span(_slim_bytes(pipeline, source, layout, allocator, params))}"
        ],
        "widths": [f"{dense_widths(unet)} -> {tuple(layout.widths)}"],
        "groups": _levels(groups, layout),
        "norms_that_switch_membership": len(layout.unaligned),
    }


def span(bounds: Sequence[int]) -> str:
    """A predicted number, or its bounds where it depends on the scores."""
    low, high = bounds
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def _on_meta(unet: Any, layout: Layout) -> Any:
    with torch.device("meta"):
        return surgery.slim_unet(unet, layout)


def _slim_cost(unet: Any, layout: Layout, allocator: Allocator | None) -> tuple[Bounds, Bounds]:
    if allocator is not None:
        return allocator.params_range(), allocator.macs_range()
    found: Cost = unet_cost(_on_meta(unet, layout))
    return (found.params, found.params), (found.macs, found.macs)


def _slim_bytes(
    pipeline: DiffusionPipeline,
    source: Path,
    layout: Layout,
    allocator: Allocator | None,
    params: Bounds,
) -> Bounds:
    if allocator is None:
        found = exported_bytes(pipeline, source, _on_meta(pipeline.unet, layout))
        return found, found
    # beside the parameters, names and shapes: the wider the layers, the longer their figures
    quotas = allocator.least_quota(), allocator.most_quota()
    bounds = []
    for quota, count in zip(quotas, params, strict=True):
        unet = _on_meta(pipeline.unet, allocator.layout_of(quota))
        weights = sum(p.numel() * p.element_size() for p in unet.parameters())
        size = next(unet.parameters()).element_size()
        bounds.append(exported_bytes(pipeline, source, unet) - weights + size * count)
    return bounds[0], bounds[1]


def _levels(groups: Sequence[ChannelGroup], layout: Layout) -> list[str]:
    """For each level its groups, and what becomes of the channels in all of them."""
    lines = [f"{len(groups)} in all, {layout.units:,} units"]
    for level in range(len(layout.widths)):
        found = [group for group in groups if group.level == level]
        before = sum(group.width for group in found)
        after = sum(group.slim_width(layout.widths) for group in found)
        lines.append(f"level {level}: {len(found)}, {before:,} -> {after:,} channels")
    return lines
