"""UNet2DConditionModel: a binary mask is the slim plain UNet, whatever the shape."""

import inspect
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GELU
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from builders import models
from builders.tiers import few
from compress.common.cost import unet_cost, unet_inputs
from compress.methods.gradflow import surgery
from compress.methods.gradflow.condition import whole_heads
from compress.methods.gradflow.groups import level_of
from compress.methods.gradflow.layout import build_layout
from compress.methods.gradflow.masks import SoftUNet
from compress.methods.gradflow.unets import find_groups
from compress.methods.gradflow.widths import MacModel, legal_widths

TOLERANCE = 1e-5
PROJECTED = {"projection_class_embeddings_input_dim": 10}
CONCAT = {"class_embeddings_concat": True}
NAMES = [
    "sd1",
    "sd2",
    "sdxl",
    "ldm",
    "labels",
    "timestep_labels",
    "identity_labels",
    "projected_labels",
    "scale_shift",
    "only_cross",
    "plain_middle",
    "no_middle",
]
# each kind of block, norm and input by default; the others have another set of the same
CUT = few(NAMES, "sd1", "sdxl", "labels", "projected_labels", "scale_shift", "no_middle")


@cache
def prepared(name):
    """The dense model, its groups and a slim layout; none of them is ever modified."""
    unet = models.build_condition(name)
    groups = find_groups(unet)
    return unet, groups, build_layout(unet, groups, models.CONDITION_CONFIGS[name][1])


def random_inputs(unet) -> dict:
    """Inputs of a batch of two that differ in every place."""
    generator = torch.Generator().manual_seed(2)

    def fill(value):
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator)
        return torch.tensor([1, 4])

    return {key: fill(value) for key, value in unet_inputs(unet, 2, "cpu").items()}


def masked_output(soft: SoftUNet, inputs: dict) -> torch.Tensor:
    condition = {k: v for k, v in inputs.items() if k not in ("sample", "timestep")}
    with torch.no_grad():
        return soft(inputs["sample"], inputs["timestep"], condition=condition)


@pytest.mark.parametrize("name", CUT)
def test_masked_is_dense_at_ones_and_slim_when_binary(name, tmp_path):
    original, groups, layout = prepared(name)
    unet = models.narrowed(original, layout)
    soft = SoftUNet(unet, layout).eval()
    inputs = random_inputs(unet)
    with torch.no_grad():
        dense = unet(**inputs).sample
    assert (masked_output(soft, inputs) - dense).abs().max() <= TOLERANCE
    soft.mask.copy_(models.binary_mask(layout))
    soft.adopt_slim_membership()
    slim = surgery.perform(unet, layout, soft.mask).eval()
    with torch.no_grad():
        expected = slim(**inputs).sample
    assert expected.abs().mean() > 0.01
    assert (expected - dense).abs().max() > 0.01
    assert (masked_output(soft, inputs) - expected).abs().max() <= TOLERANCE
    # plain diffusers reads what was saved, and draws the same
    slim.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, expected)
    # what a dry run predicts from the config alone
    with torch.device("meta"):
        predicted = UNet2DConditionModel.from_config(surgery.slim_config(original, layout))
    cost = unet_cost(slim)
    assert unet_cost(predicted) == cost
    assert MacModel(original, groups)(np.array([layout.widths]))[0] == cost.macs


@pytest.mark.parametrize("name", NAMES)
def test_groups_stand_in_the_models_order_and_share_no_place(name):
    unet, groups, _ = prepared(name)
    levels = len(unet.down_blocks)
    order = [module for module, _ in unet.named_modules()]
    assert [group.name for group in groups] == sorted((g.name for g in groups), key=order.index)
    seen = set()
    for group in groups:
        producers = [slot.module for slot in group.slots if slot.side == "out"]
        assert group.name == producers[0]
        # levels of equal width are tied where no shortcut lies between them
        assert group.level == min(level_of(producer, levels) for producer in producers)
        places = [(slot.module, slot.side) for slot in group.slots]
        assert len(set(places)) == len(places)
        for slot in group.slots:
            assert list(slot.positions) == sorted(slot.positions)
            held = {(slot.module, slot.side, position) for position in slot.positions}
            assert len(held) == len(slot.positions) and not held & seen
            seen |= held


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_cost_agrees_with_torchs_flop_counter(name):
    unet = models.build_condition(name)
    # the counter knows the two products of attention, not the CPU's fused kernel
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        unet(**unet_inputs(unet, 1, "cpu"))
    assert counter.get_total_flops() == 2 * unet_cost(unet).macs


@pytest.mark.parametrize("name", NAMES)
def test_slim_config_is_plain_and_keeps_the_text_side(name):
    unet, _, layout = prepared(name)
    config = surgery.slim_config(models.narrowed(unet, layout), layout)
    assert set(config) <= set(inspect.signature(UNet2DConditionModel.__init__).parameters)
    changed = {key for key, value in config.items() if unet.config[key] != value}
    allowed = {"block_out_channels", "time_embedding_dim", "freq_shift", "attention_head_dim"}
    assert changed <= allowed
    assert ("attention_head_dim" in changed) == whole_heads(unet)


def test_an_int_keeps_the_heads_and_a_list_keeps_the_head_size():
    for name, heads, sizes in (("sd1", [4, 4, 4], [2, 6, 6]), ("sd2", [1, 3, 3], [8, 8, 8])):
        unet, _, layout = prepared(name)
        slim = surgery.perform(models.narrowed(unet, layout), layout, models.binary_mask(layout))
        for i, block in enumerate(slim.down_blocks[:2]):
            attention = block.attentions[0].transformer_blocks[0].attn2
            assert attention.heads == heads[i]
            assert attention.to_q.out_features == heads[i] * sizes[i]
            assert attention.to_k.in_features == 12


def test_the_halves_of_geglu_and_every_feed_forward_follow_the_level():
    unet, groups, layout = prepared("sd1")
    hidden = [group for group in groups if group.expansion == 4]
    assert len(hidden) == sum(name.endswith("ff.net.2") for name, _ in unet.named_modules())
    slim = surgery.perform(models.narrowed(unet, layout), layout, models.binary_mask(layout))
    for name, module in slim.named_modules():
        if name.endswith("ff.net.2"):
            assert module.in_features == 4 * module.out_features


def test_sdxls_first_level_takes_only_widths_that_keep_the_frequency_shift():
    unet = models.build_condition("sdxl")
    assert legal_widths(unet)[0] == [4, 8, 16]  # every fourth frequency, every other one
    assert legal_widths(models.build_condition("sd2"))[0] == [8, 16]  # heads of 8
    assert legal_widths(models.build_condition("sd1"))[0] == [4, 8, 12, 16]  # 4 heads, any size
    unet, _, layout = prepared("sdxl")
    assert models.narrowed(unet, layout).config.freq_shift == unet.config.freq_shift


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D")},
            "has SimpleCrossAttnDownBlock2D",
        ),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "has UNetMidBlock2DSimpleCrossAttn"),
        (
            {"up_block_types": ("SimpleCrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D")},
            "has SimpleCrossAttnUpBlock2D",
        ),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"class_embed_type": "simple_projection", **PROJECTED}, "class_embed_type"),
        ({"class_embed_type": "projection", **PROJECTED, **CONCAT}, "class_embeddings_concat"),
        ({"addition_embed_type": "text"}, "addition_embed_type"),
        ({"attention_type": "gated"}, "attention_type"),
        ({"encoder_hid_dim": 6}, "encoder_hid_dim_type"),
        ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"time_cond_proj_dim": 6}, "time_cond_proj_dim"),
        ({"cross_attention_dim": (12, 12, 12)}, r"one cross_attention_dim.*has \(12, 12, 12\)"),
        ({"attention_head_dim": 3}, "attention_head_dim=3"),
        ({"sample_size": None}, "sample_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        find_groups(models.build_condition("sd1", **changes))


def test_layers_that_no_config_asks_for_are_refused_by_name():
    unet = models.build_condition("sd1")
    forward = unet.mid_block.attentions[0].transformer_blocks[0].ff
    forward.net[0] = GELU(32, 128)
    with pytest.raises(ValueError, match="GEGLU feed-forwards; mid_block.*ff has GELU"):
        find_groups(unet)
    unet = models.build_condition("sd1")
    unet.up_blocks[0].resnets[1].conv_shortcut = None
    with pytest.raises(ValueError, match="concatenation; up_blocks.0.resnets.1 has none"):
        find_groups(unet)
