"""Which level widths keep a given share of the MACs: legal ones only, as uniform as possible."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from diffusers import UNet2DConditionModel, UNet2DModel

from compress.common.cost import layer_macs, unet_inputs
from compress.methods.gradflow.condition import heads_of_levels, whole_heads
from compress.methods.gradflow.groups import ChannelGroup, dense_widths
from compress.methods.gradflow.layout import kept_frequencies, sinusoid_readers

# widths that keep more than this below the asked share are refused (PyTorch users expect "half")
TOLERANCE = 0.03


def legal_widths(unet: UNet2DModel) -> list[list[int]]:
    """Widths that each level may take: multiples of ``norm_num_groups``, and of whole heads.

    Returns
    -------
    For every level the ascending legal widths up to the dense one.
    """
    blocks = len(unet.config.block_out_channels)
    with_heads = {
        i for i, name in enumerate(unet.config.down_block_types) if name.startswith("Attn")
    } | {
        blocks - 1 - i
        for i, name in enumerate(unet.config.up_block_types)
        if name.startswith("Attn")
    }
    if unet.mid_block is not None:
        with_heads.add(blocks - 1)  # the middle block works at the last level's width
    legal = []
    for level, dense in enumerate(dense_widths(unet)):
        if isinstance(unet, UNet2DConditionModel):
            legal.append(_condition_widths(unet, level, dense))
            continue
        step = unet.config.norm_num_groups
        if level in with_heads and unet.config.attention_head_dim is not None:
            step = math.lcm(step, unet.config.attention_head_dim)
        if level == blocks - 1 and unet.config.attn_norm_num_groups:
            step = math.lcm(step, unet.config.attn_norm_num_groups)
        widths = list(range(step, dense + 1, step))
        if level == 0:
            # the time embedding's sinusoid has one sine and one cosine per frequency
            widths = [w for w in widths if w % 2 == 0]
        legal.append(widths if widths and widths[-1] == dense else [*widths, dense])
    return legal


def _condition_widths(unet: UNet2DConditionModel, level: int, dense: int) -> list[int]:
    step = unet.config.norm_num_groups
    heads = heads_of_levels(unet)[level]
    if heads:
        # whole heads go, or every head gets narrower
        step = math.lcm(step, dense // heads if whole_heads(unet) else heads)
    widths = list(range(step, dense, step))
    if level == 0:
        widths = [width for width in widths if width % 2 == 0]
    if level == 0 and unet.config.addition_embed_type == "text_time":
        # the sinusoid of SDXL's sizes and crops has the same freq_shift, which must not change
        shift = unet.config.freq_shift
        widths = [w for w in widths if kept_frequencies(dense // 2, w // 2, shift)[1] == shift]
    return [*widths, dense]


class MacModel:
    """MACs of a UNet as a function of its level widths: each layer is inputs x outputs x area."""

    def __init__(self, unet: UNet2DModel, groups: Sequence[ChannelGroup]) -> None:
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
        for reader in sinusoid_readers(unet):
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
    unet: UNet2DModel, groups: Sequence[ChannelGroup], keep_macs: float
) -> tuple[int, ...]:
    """Level widths with at most ``keep_macs`` of the MACs.

    Among the legal widths that keep at most the asked share and at least 3 points less, the ones
    with the most even ratio over the levels are taken; ties go to more MACs.

    Parameters
    ----------
    unet : the dense model.
    groups : its channel groups.
    keep_macs : fraction of the MACs to keep, in (0, 1].

    Raises
    ------
    ValueError : when no legal widths come within 3 points below ``keep_macs``; names the nearest.
    """
    dense = dense_widths(unet)
    if keep_macs == 1:
        return dense
    legal = legal_widths(unet)
    macs = MacModel(unet, groups)
    total = macs.total
    floor = float(macs(np.array([[w[0] for w in legal]]))[0]) / total
    if keep_macs < floor:
        raise ValueError(
            f"keep_macs must be at least {floor:.4f} for this model, whose smallest legal widths "
            f"are {[w[0] for w in legal]} (GroupNorm has {unet.config.norm_num_groups} groups, "
            f"attention_head_dim is {unet.config.attention_head_dim}); got keep_macs={keep_macs}"
        )
    # near-uniform candidates only: within a factor 1.6 of the ratio that would keep keep_macs
    ratio = math.sqrt(keep_macs)
    near = [
        [w for w in widths if ratio / 1.6 <= w / full <= min(1.0, ratio * 1.6)] or [widths[0]]
        for widths, full in zip(legal, dense, strict=True)
    ]
    candidates = np.array(list(itertools.product(*near)))
    # diffusers builds a shortcut convolution exactly where neighbouring widths differ, so
    # neighbours stay equal, or stay different
    equal = np.diff(dense) == 0
    candidates = candidates[((np.diff(candidates) == 0) == equal).all(1)]
    kept = macs(candidates) / total
    if not len(candidates):
        raise ValueError(
            f"no legal widths near keep_macs={keep_macs} leave the levels as different as they "
            f"are in {list(dense)}; set a larger keep_macs"
        )
    fits = (kept <= keep_macs) & (kept >= keep_macs - TOLERANCE)
    if not fits.any():
        nearest = candidates[np.abs(kept - keep_macs).argmin()]
        share = float(macs(nearest[None])[0]) / total
        raise ValueError(
            f"no legal widths keep between {keep_macs - TOLERANCE:.3f} and {keep_macs:.3f} of the "
            f"MACs; the nearest are {nearest.tolist()} with {share:.4f}; set keep_macs to a share "
            "that the grid has"
        )
    candidates, kept = candidates[fits], kept[fits]
    shares = candidates / np.array(dense)
    unevenness = shares.max(1) / shares.min(1)
    best = np.lexsort((-kept, unevenness.round(9)))[0]
    return tuple(int(w) for w in candidates[best])
