"""Surgery: a fresh plain UNet2DModel that holds exactly the kept slices."""

import inspect
import json

import pytest
import torch
from diffusers import UNet2DModel

from builders import models
from compress.methods.gradflow import surgery
from compress.methods.gradflow.groups import dense_widths


@pytest.mark.parametrize("name", ["plain", "one_head", "scale_shift", "tied"])
def test_keeping_everything_is_bit_identical(name):
    unet = models.build(name)
    layout = models.layout(name, dense_widths(unet))
    slim = surgery.perform(unet, layout, torch.ones(layout.units)).eval()
    assert type(slim) is UNet2DModel and slim is not unet
    weights = unet.state_dict()
    assert list(slim.state_dict()) == list(weights)
    for key, tensor in slim.state_dict().items():
        assert torch.equal(tensor, weights[key])
        assert tensor.data_ptr() != weights[key].data_ptr()
    with torch.no_grad():
        sample, timestep = models.inputs(unet)
        assert torch.equal(slim(sample, timestep).sample, unet(sample, timestep).sample)


@pytest.mark.parametrize(
    ("name", "widths"), [("plain", (4, 8)), ("scale_shift", (4, 12)), ("deeper", (4, 12, 16))]
)
def test_cut_keeps_exactly_the_slices_of_kept_units(name, widths):
    unet, layout = models.build(name), models.layout(name, widths)
    mask = models.binary_mask(layout)
    # every element gets its own number; those of removed units are struck out slice by slice
    numbers, start = {}, 0
    for key, parameter in unet.named_parameters():
        numbers[key] = torch.arange(start, start + parameter.numel()).view_as(parameter)
        start += parameter.numel()
    struck = {key: number.clone() for key, number in numbers.items()}
    for group, offset in zip(layout.groups, layout.offsets, strict=True):
        for unit in (mask[offset : offset + group.units] == 0).nonzero().flatten().tolist():
            for key, _, index in models.slices(unet, group, unit):
                struck[key][index] = -1
    kept = surgery.cut(numbers, layout, mask)
    slim = surgery.perform(models.narrowed(unet, layout), layout, mask)
    shapes = {key: p.shape for key, p in slim.named_parameters()}
    assert list(kept) == list(shapes)
    for key, number in kept.items():
        if key == "time_embedding.linear_1.weight":  # it reads the sinusoid, which has no unit
            assert torch.equal(number, numbers[key])
            continue
        assert number.shape == shapes[key]
        assert torch.equal(number.flatten(), struck[key][struck[key] >= 0]), key


def test_moments_are_cut_as_weights():
    unet, layout = models.build("plain"), models.layout("plain", (4, 8))
    mask = models.binary_mask(layout)
    optimizer = torch.optim.AdamW(unet.parameters())
    unet(*models.inputs(unet)).sample.square().mean().backward()
    optimizer.step()
    named = dict(unet.named_parameters())
    gradients = surgery.cut({name: p.grad for name, p in named.items()}, layout, mask)
    for key in ("exp_avg", "exp_avg_sq"):
        moments = surgery.cut({n: optimizer.state[p][key] for n, p in named.items()}, layout, mask)
        for name, moment in moments.items():
            # after one step the moments are the gradient's, element by element
            gradient = gradients[name]
            expected = 0.1 * gradient if key == "exp_avg" else 0.001 * gradient**2
            assert torch.allclose(moment, expected, rtol=1e-4, atol=0)


def test_cut_copies():
    unet = models.build("plain")
    layout = models.layout("plain", dense_widths(unet))
    weights = dict(unet.named_parameters())
    for name, tensor in surgery.cut(weights, layout, torch.ones(layout.units)).items():
        assert tensor.data_ptr() != weights[name].data_ptr()


def test_one_heads_softmax_scale_is_folded_into_the_query():
    layout = models.layout("one_head", (4, 8))
    unet = models.narrowed(models.build("one_head"), layout)
    mask = models.binary_mask(layout)
    slim = dict(surgery.perform(unet, layout, mask).named_parameters())
    plain = surgery.cut(dict(unet.named_parameters()), layout, mask)
    queries = 0
    for name, tensor in slim.items():
        query = ".to_q." in name
        queries += query
        factor = (8 / 16) ** 0.5 if query else 1.0
        assert torch.allclose(tensor, factor * plain[name], rtol=1e-6), name
    assert queries == 2 * len(layout.queries) > 0


def test_a_fractional_mask_is_refused():
    layout = models.layout("plain", (4, 8))
    mask = models.binary_mask(layout)
    mask[3] = 0.5
    mask[7] = 0.25
    with pytest.raises(ValueError, match=f"2 of {layout.units} units lie between 0 and 1"):
        surgery.perform(models.build("plain"), layout, mask)


def test_a_missed_quota_is_refused():
    layout = models.layout("plain", (4, 8))
    mask = models.binary_mask(layout)
    mask[(mask == 0).nonzero()[0]] = 1
    with pytest.raises(ValueError, match=f"1 of {len(layout.keep_counts)} blocks do not"):
        surgery.perform(models.build("plain"), layout, mask)
    # the right total in the wrong block is no better
    other = (layout.block != layout.block[(mask == 0).nonzero()[0]]) & (mask == 1)
    mask[other.nonzero()[-1]] = 0
    with pytest.raises(ValueError, match="blocks do not"):
        surgery.check_mask(layout, mask)


@pytest.mark.parametrize(("name", "widths"), [("plain", (4, 8)), ("one_head", (4, 12))])
def test_save_and_load_give_the_same_output(name, widths, tmp_path):
    layout = models.layout(name, widths)
    unet = models.narrowed(models.build(name), layout)
    slim = surgery.perform(unet, layout, models.binary_mask(layout)).eval()
    slim.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        sample, timestep = models.inputs(unet)
        assert torch.equal(loaded(sample, timestep).sample, slim(sample, timestep).sample)


@pytest.mark.parametrize("name", ["plain", "one_head", "scale_shift", "not_square"])
def test_slim_config_has_plain_keys_only(name):
    unet, layout = models.build(name), models.layout(name, (4, 8))
    config = surgery.slim_config(models.narrowed(unet, layout), layout)
    assert set(config) <= set(inspect.signature(UNet2DModel.__init__).parameters)
    restored = json.loads(json.dumps(config))
    changed = {key for key, value in config.items() if unet.config[key] != value}
    assert changed <= {"block_out_channels", "time_embedding_dim", "freq_shift"}
    assert restored["block_out_channels"] == [4, 8]
    assert restored["time_embedding_dim"] == 32  # four times the dense first level
    assert unet.config.block_out_channels == (8, 16)
