"""Level widths: what they cost, which are legal, and which are chosen."""

import math

import numpy as np
import pytest
from diffusers import UNet2DModel

from builders import models
from compress.common.cost import unet_cost
from compress.methods.gradflow import surgery
from compress.methods.gradflow.groups import dense_widths
from compress.methods.gradflow.layout import build_layout
from compress.methods.gradflow.widths import TOLERANCE, MacModel, choose_widths, legal_widths

NAMES = [
    "plain",
    "no_attention",
    "no_middle",
    "one_head",
    "scale_shift",
    "deeper",
    "tied",
    "not_square",
    "built_in",
]


def random_widths(unet, count: int) -> list[tuple[int, ...]]:
    """Random legal widths with which diffusers builds the dense model's layers."""
    random, legal = np.random.default_rng(0), legal_widths(unet)
    found: list[tuple[int, ...]] = []
    for _ in range(60):
        widths = tuple(int(random.choice(options)) for options in legal)
        if models.same_layers(unet, widths):
            found.append(widths)
        if len(found) == count:
            break
    return found


@pytest.mark.parametrize("name", NAMES)
def test_mac_model_equals_the_cost_of_the_slim_unet(name):
    unet, groups = models.build(name), models.groups(name)
    macs = MacModel(unet, groups)
    candidates = random_widths(unet, 6)
    assert len(set(candidates)) >= 2
    for widths in candidates:
        layout = build_layout(unet, groups, widths)
        slim = UNet2DModel.from_config(surgery.slim_config(unet, layout))
        assert macs(np.array([widths]))[0] == pytest.approx(unet_cost(slim).macs, rel=1e-9)
    together = macs(np.array(candidates))
    assert together == pytest.approx([macs(np.array([w]))[0] for w in candidates], rel=1e-12)


@pytest.mark.parametrize("name", [*NAMES, "middle_norm"])
def test_legal_widths_hold_whole_norm_groups_heads_and_frequencies(name):
    unet = models.build(name)
    config, legal = unet.config, legal_widths(unet)
    for level, (options, dense) in enumerate(zip(legal, dense_widths(unet), strict=True)):
        assert options == sorted(set(options)) and options[-1] == dense
        assert all(width % config.norm_num_groups == 0 for width in options)
        kind = (config.down_block_types[level], config.up_block_types[-1 - level])
        if config.attention_head_dim and any("Attn" in block for block in kind):
            assert all(width % config.attention_head_dim == 0 for width in options)
    assert all(width % 2 == 0 for width in legal[0])
    # the smallest of all levels is a model that diffusers builds
    smallest = dict(config) | {"block_out_channels": tuple(options[0] for options in legal)}
    UNet2DModel.from_config(smallest)


def test_the_middle_blocks_own_norm_limits_the_last_level():
    unet = models.build("plain", block_out_channels=(16, 32), attn_norm_num_groups=16)
    assert legal_widths(unet)[-1] == [16, 32]


@pytest.mark.parametrize("name", ["plain", "one_head", "scale_shift", "deeper", "tied", "built_in"])
def test_chosen_widths_keep_what_was_asked_and_can_be_built(name):
    unet = models.build(name)
    groups, total = models.groups(name), unet_cost(unet).macs
    # the coarse grid of a tiny model may hit none of the round shares: half widths are on it
    half = MacModel(unet, groups)(np.array([[w // 2 for w in dense_widths(unet)]]))[0] / total
    reached = 0
    for keep in (half + 0.01, 0.3, 0.5, 0.75, 0.97):
        try:
            widths = choose_widths(unet, groups, keep)
        except ValueError as error:
            assert "keep" in str(error)
            continue
        reached += 1
        layout = build_layout(unet, groups, widths)
        slim = surgery.perform(unet, layout, models.binary_mask(layout))
        achieved = unet_cost(slim).macs / total
        assert keep - TOLERANCE <= achieved <= keep
        assert all(w in options for w, options in zip(widths, legal_widths(unet), strict=True))
    assert reached >= (5 if name == "built_in" else 1)


def test_no_more_even_widths_were_passed_over():
    unet = models.build("built_in")
    groups, dense = models.groups("built_in"), np.array(dense_widths(unet))
    chosen = np.array(choose_widths(unet, groups, 0.5)) / dense
    macs, total = MacModel(unet, groups), unet_cost(unet).macs
    grids = np.meshgrid(*[[w for w in options] for options in legal_widths(unet)])
    everything = np.stack([grid.ravel() for grid in grids], axis=1)
    kept = macs(everything) / total
    fits = everything[(kept <= 0.5) & (kept >= 0.47)]
    shares = fits / dense
    even = shares.max(1) / shares.min(1)
    best = min(
        e
        for e, widths in sorted(zip(even, map(tuple, fits), strict=True))[:40]
        if models.same_layers(unet, widths)
    )
    assert chosen.max() / chosen.min() == pytest.approx(best)


def test_keep_everything_keeps_the_dense_widths():
    for name in ("plain", "built_in"):
        unet = models.build(name)
        assert choose_widths(unet, models.groups(name), 1.0) == dense_widths(unet)


def test_below_what_group_norm_allows_is_an_error():
    unet = models.build("plain")
    with pytest.raises(ValueError, match=r"at least 0\.\d+ .*GroupNorm has 4 groups.*0\.01"):
        choose_widths(unet, models.groups("plain"), 0.01)


def test_off_the_grid_is_an_error_that_names_the_nearest():
    unet = models.build("plain")
    groups = models.groups("plain")
    total, macs = unet_cost(unet).macs, MacModel(unet, groups)
    options = legal_widths(unet)
    reachable = sorted(
        float(macs(np.array([[a, b]]))[0]) / total
        for a in options[0]
        for b in options[1]
        if models.same_layers(unet, (a, b))
    )
    gaps = [(b - a, a, b) for a, b in zip(reachable, reachable[1:], strict=False)]
    gap, low, high = max(gaps)
    assert gap > TOLERANCE + 0.01
    keep = math.nextafter(high, 0) - 0.005
    with pytest.raises(ValueError, match="no legal widths keep between .* the nearest are"):
        choose_widths(unet, groups, keep)
