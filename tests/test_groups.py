"""Channel groups: every prunable channel is in exactly one; what is unsupported is refused."""

from collections import Counter

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from builders import models
from compress.methods.gradflow.groups import (
    dense_widths,
    narrowed_queries,
)
from compress.methods.gradflow.unets import find_groups

NAMES = [
    "plain",
    "no_attention",
    "no_middle",
    "one_head",
    "scale_shift",
    "odd_norm_groups",
    "deeper",
    "tied",
]


def prunable_sides(unet) -> dict[tuple[str, str], int]:
    """All sides of all layers that carry a level's channels, with their widths."""
    sides = {}
    for name, module in unet.named_modules():
        if name.startswith("time_embedding."):
            continue
        if isinstance(module, nn.GroupNorm):
            sides[name, "norm"] = module.num_channels
        elif isinstance(module, nn.Conv2d | nn.Linear):
            linear = isinstance(module, nn.Linear)
            inputs = module.in_features if linear else module.in_channels
            outputs = module.out_features if linear else module.out_channels
            # images, and the time embedding that every resnet reads, keep their widths
            if name != "conv_in" and not name.endswith("time_emb_proj"):
                sides[name, "in"] = inputs
            if name != "conv_out":
                sides[name, "out"] = outputs
    return sides


@pytest.mark.parametrize("name", [*NAMES, "built_in"])
def test_every_prunable_channel_is_in_exactly_one_group(name):
    unet = models.build(name)
    covered: dict[tuple[str, str], Counter] = {}
    for group in models.groups(name):
        for slot in group.slots:
            covered.setdefault((slot.module, slot.side), Counter()).update(slot.positions)
    expected = prunable_sides(unet)
    assert set(covered) == set(expected)
    for side, width in expected.items():
        assert covered[side] == Counter(range(width)), side


@pytest.mark.parametrize("name", [*NAMES, "built_in"])
def test_widths_are_the_levels_and_every_slot_holds_every_channel(name):
    unet = models.build(name)
    modules = dict(unet.named_modules())
    for group in models.groups(name):
        assert group.width == dense_widths(unet)[group.level]
        assert group.units * group.unit == group.width
        for slot in group.slots:
            assert len(slot.positions) == len(slot.channels)
            counts = Counter(slot.channels)
            assert set(counts) == set(range(group.width)), slot.module
            # twice where one concatenation holds the channels twice, and in scale and shift
            assert len(set(counts.values())) == 1
            assert set(counts.values()) <= {1, 2}
        producers = [modules[slot.module] for slot in group.slots if slot.side == "out"]
        assert producers
    names = [group.name for group in models.groups(name)]
    order = list(modules)
    assert names == sorted(names, key=order.index) and len(set(names)) == len(names)


def test_units_of_attention_are_whole_heads():
    unet = models.build("plain")  # heads of 4 channels
    groups = find_groups(unet)
    queries = [
        [s for s in g.slots if s.side == "out" and s.module.endswith("to_q")] for g in groups
    ]
    inner = [group for group, found in zip(groups, queries, strict=True) if found]
    assert len(inner) == 4
    for group in inner:
        assert (group.unit, group.units, group.width) == (4, 4, 16)
        sides = {(slot.module.rpartition("attentions.")[2][2:], slot.side) for slot in group.slots}
        assert sides == {("to_q", "out"), ("to_k", "out"), ("to_v", "out"), ("to_out.0", "in")}
    others = [g for g in groups if g not in inner]
    assert {group.unit for group in others} == {1}


def test_one_head_goes_channel_by_channel():
    unet = models.build("one_head")
    assert {group.unit for group in models.groups("one_head")} == {1}
    queries = narrowed_queries(unet)
    assert sorted(queries) == sorted(n for n, _ in unet.named_modules() if n.endswith("to_q"))
    assert narrowed_queries(models.build("plain")) == ()


def test_finding_groups_leaves_the_model_alone():
    unet = models.build("plain").train().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    find_groups(unet)
    assert unet.training
    assert not any(p.requires_grad or p.grad is not None for p in unet.parameters())
    assert not any(m._forward_hooks for m in unet.modules())
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_another_unet_class_is_refused_by_name():
    with pytest.raises(ValueError, match="UNet2DConditionModel and .*; got Linear"):
        find_groups(nn.Linear(2, 2))


def test_unsupported_blocks_are_refused_by_name():
    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
    }
    unet = UNet2DModel(**(models.TWO_LEVELS | blocks))
    with pytest.raises(ValueError, match="has ResnetDownsampleBlock2D, ResnetUpsampleBlock2D"):
        find_groups(unet)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("time_embedding_type", "fourier"),
        ("downsample_type", "resnet"),
        ("upsample_type", "resnet"),
    ],
)
def test_unsupported_options_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option} = .*{value!r}"):
        find_groups(models.build("no_attention", **{option: value}))


def test_a_model_without_a_size_is_refused():
    with pytest.raises(ValueError, match="sample_size"):
        find_groups(models.build("plain", sample_size=None))


def test_heads_that_do_not_fill_their_level_are_refused():
    # diffusers silently builds q, k and v of 16 channels for 20
    unet = models.build("plain", block_out_channels=(8, 20), attention_head_dim=8)
    with pytest.raises(ValueError, match="attention_head_dim"):
        find_groups(unet)


def test_an_odd_first_level_is_refused():
    unet = models.build("odd_norm_groups", block_out_channels=(9, 18))
    with pytest.raises(ValueError, match=r"block_out_channels\[0\]"):
        find_groups(unet)
