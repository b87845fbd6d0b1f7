"""Level widths: what they cost, which are legal, and which are chosen."""

import itertools
import re

import numpy as np
import pytest
from diffusers import UNet2DModel

from builders import models
from builders.tiers import few
from compress.common.cost import unet_cost
from compress.methods.gradflow import surgery
from compress.methods.gradflow.groups import dense_widths
from compress.methods.gradflow.layout import build_layout
from compress.methods.gradflow.unets import find_groups
from compress.methods.gradflow.widths import MacModel, choose_widths, legal_widths

WITHIN = 0.01
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


@pytest.mark.parametrize("name", few(NAMES, "one_head", "scale_shift", "tied", "not_square"))
def test_mac_model_equals_the_cost_of_the_slim_unet(name):
    unet, groups = models.build(name), models.groups(name)
    macs = MacModel(unet, groups)
    candidates = random_widths(unet, 3)
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


def test_levels_without_attention_need_no_whole_heads():
    three = {
        "block_out_channels": (16, 24, 32),
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
        "attention_head_dim": 8,
    }
    unet = models.build("no_attention", **three)
    assert legal_widths(unet)[-1] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert choose_widths(unet, find_groups(unet), 0.5, WITHIN) == (12, 16, 20)
    # no attention, so nothing of attention's own norm either
    assert legal_widths(models.build("no_attention", attn_norm_num_groups=8))[-1] == [4, 8, 12, 16]
    # the middle block alone has attention
    with_middle = legal_widths(models.build("no_attention", **three, add_attention=True))
    assert with_middle == [[4, 8, 12, 16], [4, 8, 12, 16, 20, 24], [8, 16, 24, 32]]


@pytest.mark.parametrize(
    ("name", "keeps"),
    [
        *itertools.product(["one_head", "tied"], [(0.3, 0.47, 0.5, 0.97)]),
        *itertools.product(["scale_shift", "sd1"], [(0.5, 0.75)]),
        *(
            pytest.param(name, (0.3, 0.5, 0.75), marks=pytest.mark.slow)
            for name in ("plain", "no_attention", "deeper", "sdxl", "built_in")
        ),
    ],
)
def test_chosen_are_the_most_even_of_the_largest_widths_within_keep_macs(name, keeps):
    build = models.build_condition if name in models.CONDITION_CONFIGS else models.build
    unet = build(name)
    groups, dense = find_groups(unet), dense_widths(unet)
    macs, total, kept = MacModel(unet, groups), unet_cost(unet).macs, {}
    for widths in itertools.product(*legal_widths(unet)):
        pairs = zip(itertools.pairwise(dense), itertools.pairwise(widths), strict=True)
        if all((a == b) == (c == d) for (a, b), (c, d) in pairs):
            kept[widths] = macs(np.array([widths]))[0] / total

    def unevenness(widths):
        ratios = [w / full for w, full in zip(widths, dense, strict=True)]
        return round(max(ratios) / min(ratios), 9)

    for keep in keeps:
        largest = max(share for share in kept.values() if share <= keep)
        near = [w for w, share in kept.items() if largest - WITHIN <= share <= keep]
        even = min(map(unevenness, near))
        best = max((kept[w], w) for w in near if unevenness(w) == even)[1]
        chosen = choose_widths(unet, groups, keep, WITHIN)
        assert unevenness(chosen) == even, keep
        assert kept[chosen] == pytest.approx(kept[best], rel=1e-9), keep
        layout = build_layout(unet, groups, chosen)
        first = models.narrowed(unet, layout)
        slim = surgery.perform(first, layout, models.binary_mask(layout))
        assert unet_cost(slim).macs / total == pytest.approx(kept[chosen], rel=1e-9), keep


def test_a_grid_of_too_many_widths_is_cut_around_one_ratio(monkeypatch):
    unet, groups = models.build("built_in"), models.groups("built_in")
    everything = choose_widths(unet, groups, 0.4, WITHIN)
    monkeypatch.setattr("compress.methods.gradflow.widths.MAX_CANDIDATES", 500)
    assert choose_widths(unet, groups, 0.4, WITHIN) == everything


def test_keep_everything_keeps_the_dense_widths():
    for name in ("plain", "built_in"):
        unet = models.build(name)
        assert choose_widths(unet, models.groups(name), 1.0, WITHIN) == dense_widths(unet)


def test_below_the_smallest_legal_widths_is_an_error_that_names_what_can_be_kept():
    unet, groups = models.build("plain"), models.groups("plain")
    # both levels cannot have 4 channels: they differ in the dense model
    message = r"at least (0\.\d+) .* \[4, 8\] \(GroupNorm has 4 groups.*got keep_macs=0\.01"
    with pytest.raises(ValueError, match=message) as refused:
        choose_widths(unet, groups, 0.01, WITHIN)
    least = float(re.search(message, str(refused.value)).group(1))
    assert choose_widths(unet, groups, least, WITHIN) == (4, 8)
    with pytest.raises(ValueError, match="at least"):
        choose_widths(unet, groups, least - 0.001, WITHIN)


def test_between_the_widths_of_a_coarse_grid_the_ones_below_are_taken():
    unet, groups = models.build("plain"), models.groups("plain")
    macs = MacModel(unet, groups)
    grid = np.array([w for w in itertools.product(*legal_widths(unet)) if w[0] != w[1]])
    shares = np.sort(macs(grid) / macs.total)
    below, above = max(itertools.pairwise(shares), key=lambda pair: pair[1] - pair[0])
    assert above - below > 0.05
    chosen = macs(np.array([choose_widths(unet, groups, above - 1e-3, WITHIN)]))[0] / macs.total
    assert below - WITHIN <= chosen <= below
