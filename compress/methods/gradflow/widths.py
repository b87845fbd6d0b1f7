"""Which level widths keep a given share of the MACs: legal ones only, as even as possible."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from compress.common.cost import layer_macs, unet_inputs
from compress.methods.gradflow.groups import (
    ChannelGroup,
    UNet,
    dense_widths,
    heads_of_levels,
    level_of,
    whole_heads,
)
from compress.methods.gradflow.sinusoid import frequency_shifts, readers

# level widths that are compared; finer grids are cut around one ratio for all levels
MAX_CANDIDATES = 2**18


def legal_widths(unet: UNet) -> list[list[int]]:
    """Widths that each level may take: whole norm groups, whole heads, whole frequencies.

    Returns
    -------
    For every level the ascending legal widths up to the dense one.
    """
    dense, heads = dense_widths(unet), heads_of_levels(unet)
    steps = [unet.config.norm_num_groups] * len(dense)
    for name, module in unet.named_modules():
        if isinstance(module, nn.GroupNorm):
            level = level_of(name, len(dense))
            steps[level] = math.lcm(steps[level], module.num_groups)
    legal = []
    for width, step, count in zip(dense, steps, heads, strict=True):
        if count:
            # whole heads go, or every head gets narrower
            step = math.lcm(step, width // count if whole_heads(unet) else count)
        legal.append([*range(step, width, step), width])
    # the time embedding's sinusoid has one sine and one cosine per frequency
    legal[0] = [width for width in legal[0] if width % 2 == 0]
    if unet.config.get("addition_embed_type") == "text_time":
        # the sinusoid of SDXL's sizes and crops has the same freq_shift, which must not change
        shift, half = unet.config.freq_shift, dense[0] // 2
        legal[0] = [w for w in legal[0] if shift in frequency_shifts(half, w // 2, shift)]
    return legal


class MacModel:
    """MACs of a UNet as a function of its level widths: each layer is inputs x outputs x area."""

    def __init__(self, unet: UNet, groups: Sequence[ChannelGroup]) -> None:
        levels = len(unet.config.block_out_channels)
        dense = dense_widths(unet)
        layers, attention = layer_macs(unet, unet_inputs(unet))
        self.total = sum(one.inputs * one.outputs * one.factor for one in layers) + attention
        sides: dict[tuple[str, str], np.ndarray] = {}
        for group in groups:
            for slot in group.slots:
                counts = sides.setdefault((slot.module, slot.side), np.zeros(levels))
                counts[group.level] += len(slot.positions)
        # the sinusoid that feeds the embeddings is as wide as the first level
        for reader in readers(unet):
            sides[reader, "in"] = np.eye(levels)[0] * dense[0]
        # every channel count is (dense channels per level) . (kept share per level) + a constant
        self._dense = np.array(dense, dtype=float)
        self._terms = []
        for layer in layers:
            inputs = sides.get((layer.name, "in"), np.zeros(levels))
            outputs = sides.get((layer.name, "out"), np.zeros(levels))
            fixed = (layer.inputs - inputs.sum(), layer.outputs - outputs.sum())
            self._terms.append((layer.factor, inputs, fixed[0], outputs, fixed[1]))
        tokens = {layer.name: layer.factor for layer in layers}
        self._attention = self._attention_by_level(groups, tokens, attention)

    def _attention_by_level(
        self, groups: Sequence[ChannelGroup], tokens: Mapping[str, int], total: int
    ) -> np.ndarray:
        """Split attention's MACs over levels: queries times keys times the level's width."""
        weights = np.zeros(len(self._dense))
        for group in groups:
            for slot in group.slots:
                attention, _, layer = slot.module.rpartition(".")
                if layer == "to_q" and slot.side == "out":
                    keys = tokens[f"{attention}.to_k"]
                    weights[group.level] += tokens[slot.module] * keys * group.width
        return total * weights / weights.sum() if total else weights

    def __call__(self, widths: np.ndarray) -> np.ndarray:
        """MACs for level widths ``(candidates, levels)``, shape ``(candidates,)``."""
        share = np.asarray(widths, dtype=float) / self._dense
        macs = share @ self._attention
        for factor, inputs, fixed_in, outputs, fixed_out in self._terms:
            macs = macs + factor * (share @ inputs + fixed_in) * (share @ outputs + fixed_out)
        return macs


def choose_widths(
    unet: UNet, groups: Sequence[ChannelGroup], keep_macs: float, even_within: float
) -> tuple[int, ...]:
    """The most even of the largest level widths that keep at most ``keep_macs`` of the MACs.

    Of the legal widths that keep at most ``even_within`` of the MACs less than the largest do, the
    ones are taken whose ratios to the dense widths differ least between the levels; ties go to
    more MACs.

    Parameters
    ----------
    unet : the dense model.
    groups : its channel groups.
    keep_macs : fraction of the MACs to keep, in (0, 1].
    even_within : fraction of the MACs that evenness may cost.

    Raises
    ------
    ValueError : when even the smallest legal widths keep more than ``keep_macs``.
    """
    dense = dense_widths(unet)
    if keep_macs == 1:
        return dense
    macs = MacModel(unet, groups)
    candidates = _candidates(unet, math.sqrt(keep_macs))
    kept = macs(candidates) / macs.total
    if kept.min() > keep_macs:
        raise ValueError(
            f"keep_macs must be at least {math.ceil(kept.min() * 1e4) / 1e4:.4f} for this model, "
            f"whose smallest legal widths are {candidates[kept.argmin()].tolist()} (GroupNorm has "
            f"{unet.config.norm_num_groups} groups, attention_head_dim is "
            f"{unet.config.attention_head_dim}); got keep_macs={keep_macs}"
        )
    largest = kept[kept <= keep_macs].max()
    fits = (kept <= keep_macs) & (kept >= largest - even_within)
    candidates, kept = candidates[fits], kept[fits]
    shares = candidates / np.array(dense)
    unevenness = shares.max(1) / shares.min(1)
    best = np.lexsort((-kept, unevenness.round(9)))[0]
    return tuple(int(w) for w in candidates[best])


def _candidates(unet: UNet, ratio: float) -> np.ndarray:
    """Legal level widths ``(candidates, levels)`` that leave the model's layers as they are.

    diffusers builds a shortcut convolution exactly where neighbouring widths differ, so neighbours
    stay equal, or stay different. Of too many widths those nearest to ``ratio`` are taken.
    """
    dense, legal = dense_widths(unet), legal_widths(unet)
    runs = [list(run) for _, run in itertools.groupby(range(len(dense)), key=lambda i: dense[i])]
    options = [sorted(set.intersection(*(set(legal[i]) for i in run))) for run in runs]
    while math.prod(map(len, options)) > MAX_CANDIDATES:
        most = max(options, key=len)
        most.remove(max(most, key=lambda width: abs(math.log(width / (most[-1] * ratio)))))
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*options)], axis=1)
    grid = grid[(np.diff(grid) != 0).all(axis=1)]
    return np.repeat(grid, [len(run) for run in runs], axis=1)
