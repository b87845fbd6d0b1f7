"""Surgery: a new plain model with smaller widths or fewer blocks, filled with the kept slices."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from compress.methods.gradflow import depth, units
from compress.methods.gradflow.groups import UNet, dense_widths, heads_of_levels, whole_heads
from compress.methods.gradflow.layout import Layout
from compress.models.free_width import FreeWidthUNet2DModel, inner_width


def slim_config(unet: UNet, layout: Layout, mask: torch.Tensor | None = None) -> dict[str, Any]:
    """The configuration of the slim UNet: plain diffusers keys only.

    Parameters
    ----------
    unet : the dense model; where its widths are not free, with the sinusoid of the slim one, from
        :func:`compress.methods.gradflow.sinusoid.narrowed`.
    layout : where each unit acts.
    mask : ``(units,)``, the kept units, as far as they are known.
    """
    # without diffusers' notes of where it came from
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    if depth.stacks_of(unet):
        mask = units.any_mask(layout) if mask is None else mask
        widths = units.inner_widths(unet, layout, mask)
        named = {name: torch.tensor(width, device="cpu") for name, width in widths.items()}
        named = depth.cut_blocks(named, layout, mask)
        free = {"inner_widths": {name: int(w) for name, w in named.items()}} if named else {}
        return config | depth.shallow_config(unet, layout, mask) | free
    config["block_out_channels"] = tuple(layout.widths)
    if isinstance(unet, UNet2DConditionModel) and whole_heads(unet):
        config["attention_head_dim"] = [
            heads * slim // dense if attends else heads
            for heads, attends, slim, dense in zip(
                unet.config.attention_head_dim,
                heads_of_levels(unet),
                layout.widths,
                dense_widths(unet),
                strict=True,
            )
        ]
    # the embedding keeps its width, which diffusers would otherwise derive from the first level
    config["time_embedding_dim"] = unet.time_embedding.linear_2.out_features
    return config


def width_rows(unet: UNet, layout: Layout, mask: torch.Tensor) -> list[dict[str, Any]]:
    """Rows ``{level, dense, compressed}`` of what the configuration says, and of free widths."""
    if depth.stacks_of(unet):
        counts = depth.counts_of(unet, layout) if layout.gates else {}
        rows = [(key, unet.config[key], count) for key, count in counts.items()]
        dense = units.inner_widths_of(unet)
        widths = units.inner_widths(unet, layout, mask)
        rows += [(name, dense[name].width, width) for name, width in widths.items()]
        return _rows(rows)
    levels = enumerate(zip(dense_widths(unet), layout.widths, strict=True))
    rows = [(f"block_out_channels[{i}]", dense, slim) for i, (dense, slim) in levels]
    rows += [(n, inner_width(unet.get_submodule(n)), slim) for n, slim in layout.inner.items()]
    return _rows(rows)


def _rows(rows: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    return [dict(zip(("level", "dense", "compressed"), row, strict=True)) for row in rows]


def slim_unet(unet: UNet, layout: Layout, mask: torch.Tensor | None = None) -> UNet:
    """The slim model with weights of its own: a plain one unless its inner widths are free.

    Parameters
    ----------
    unet, layout : as in :func:`slim_config`.
    mask : ``(units,)``, the kept units; where none is known, the sizes are right all the same.
    """
    config = slim_config(unet, layout, mask)
    if "inner_widths" in config:
        slim = units.free_class(unet).from_config(config)
    elif layout.inner:
        slim = FreeWidthUNet2DModel(layout.inner, unet.time_proj.num_channels, **config)
    else:
        slim = type(unet).from_config(config)
    named = slim.state_dict()
    for name, buffer in unet.named_buffers():
        if name in named:  # such as SD3's positions, which are of no width and no block
            named[name].copy_(buffer)
    return slim


def filled(slim: UNet, weights: Mapping[str, torch.Tensor]) -> UNet:
    """The slim model with these parameters; its buffers stay."""
    named = slim.state_dict()
    buffers = {name: named[name] for name, _ in slim.named_buffers() if name in named}
    slim.load_state_dict(buffers | dict(weights), strict=True)
    return slim


def cut(
    tensors: Mapping[str, torch.Tensor], layout: Layout, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Keep the slices of a binary mask in every tensor that has parameter names and shapes.

    Used for weights and for whatever is shaped like them (averages, Adam moments).

    Parameters
    ----------
    tensors : by parameter name, each with the dense shape.
    layout : where each unit acts.
    mask : ``(units,)``, 0 or 1.
    """
    extended = layout.extend(mask.cpu()) > 0.5
    result = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        rows = layout.outputs.get(module, layout.norms.get(module))
        if rows is not None:
            tensor = tensor[extended[rows].to(tensor.device)]
        columns = layout.inputs.get(module)
        if columns is not None and tensor.dim() > 1:
            tensor = tensor[:, extended[columns].to(tensor.device)]
        result[name] = tensor.clone()
    return depth.cut_blocks(result, layout, mask) if layout.gates else result


def perform(unet: UNet, layout: Layout, mask: torch.Tensor) -> UNet:
    """Build the slim UNet of a binary mask.

    Attention with narrower heads divides by the root of its new head size, so the ratio is folded
    into the query projection: ``(q sqrt(d'/d)) k / sqrt(d') = q k / sqrt(d)``.

    Parameters
    ----------
    unet : holds the weights, under their dense names and shapes, and the slim model's sinusoid.
    layout : where each unit acts.
    mask : ``(units,)``, 0 or 1, which keeps the layout's number of units in every block.
    """
    check_mask(layout, mask)
    weights = cut(dict(unet.named_parameters()), layout, mask)
    for name, index in layout.queries.items():
        share = mask[index.to(mask.device)].mean().item()
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in weights:
                weights[key] = weights[key] * math.sqrt(share)
    slim = filled(slim_unet(unet, layout, mask), weights)
    return slim.to(next(unet.parameters()).device)


def summary(unet: UNet, layout: Layout) -> str:
    """What becomes smaller, in words: ``widths (24, 32) -> (12, 16)``, or the number of blocks."""
    if depth.stacks_of(unet):
        rows = width_rows(unet, layout, units.any_mask(layout))
        totals: dict[str, tuple[int, int]] = {}
        for row in rows:  # a sum over the blocks of a stack
            name = re.sub(r"\.\d+\.", ".", row["level"])
            before = totals.get(name, (0, 0))
            totals[name] = (before[0] + row["dense"], before[1] + row["compressed"])
        return ", ".join(f"{name} {dense} -> {slim}" for name, (dense, slim) in totals.items())
    return f"widths {dense_widths(unet)} -> {layout.widths}"


def check_mask(layout: Layout, mask: torch.Tensor) -> None:
    """Raise ValueError unless the mask is binary and keeps each block's number of units."""
    binary = (mask == 0) | (mask == 1)
    if not bool(binary.all()):
        raise ValueError(
            f"surgery needs a binary mask; {int((~binary).sum())} of {len(mask)} units lie "
            "between 0 and 1; binarise it first"
        )
    kept = torch.zeros(len(layout.keep_counts)).index_add_(0, layout.block, mask.detach().cpu())
    if not torch.equal(kept.long(), layout.keep_counts):
        wrong = int((kept.long() != layout.keep_counts).sum())
        raise ValueError(
            f"every block must keep its number of units; {wrong} of {len(kept)} blocks do not; "
            "choose units with `binarise`"
        )
