"""The meaning of a mask: masked equals dense at ones, and equals the slim net when binary."""

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F

from builders import models
from builders.tiers import few
from compress.common.cost import unet_cost
from compress.methods.gradflow import surgery
from compress.methods.gradflow.layout import build_layout
from compress.methods.gradflow.masks import SoftUNet, masked_group_norm
from compress.methods.gradflow.unets import find_groups
from compress.methods.gradflow.widths import choose_widths

# float32 rounding of outputs of size about 1
TOLERANCE = 1e-5
ALIGNED = [
    ("plain", (4, 8)),
    ("no_attention", (4, 8)),
    ("no_middle", (4, 8)),
    ("one_head", (4, 8)),
    ("scale_shift", (4, 8)),
    ("odd_norm_groups", (6, 12)),
    ("not_square", (4, 8)),
    ("scaled", (4, 8)),
    ("middle_norm", (4, 8)),
    ("tied", (4, 8, 8)),
]
# unequal ratios: slim norm groups over a concatenation hold other channels than the dense ones
DEEPER = ("deeper", (4, 12, 16))
UNALIGNED = [
    ("plain", (4, 12)),
    ("one_head", (8, 12)),
    ("scale_shift", (4, 12)),
    DEEPER,
    ("tied", (4, 12, 12)),
]


def compared(unet, layout, *, switch: bool = True, seed: int = 0) -> tuple[float, float]:
    """Largest difference of masked and slim, and the slim output's mean size."""
    soft = SoftUNet(models.narrowed(unet, layout), layout).eval()
    soft.mask.copy_(models.binary_mask(layout, seed))
    if switch:
        soft.adopt_slim_membership()
    slim = surgery.perform(soft.unet, layout, soft.mask).eval()
    with torch.no_grad():
        sample, timestep = models.inputs(unet)
        masked, expected = soft(sample, timestep), slim(sample, timestep).sample
    return (masked - expected).abs().max().item(), expected.abs().mean().item()


@pytest.mark.parametrize(("name", "widths"), few([*ALIGNED, *UNALIGNED], *ALIGNED, DEEPER))
def test_masked_with_ones_is_dense(name, widths):
    unet, layout = models.build(name), models.layout(name, widths)
    sample, timestep = models.inputs(unet)
    with torch.no_grad():
        difference = SoftUNet(unet, layout)(sample, timestep) - unet(sample, timestep).sample
    assert difference.abs().max() <= TOLERANCE


@pytest.mark.parametrize(("name", "widths"), ALIGNED)
def test_masked_equals_slim_where_norm_groups_align(name, widths):
    unet, layout = models.build(name), models.layout(name, widths)
    assert layout.unaligned == ()
    # nothing to switch: norm groups stay norm groups, those that straddle two producers included
    difference, size = compared(unet, layout, switch=False)
    assert difference <= TOLERANCE < 0.01 < size


@pytest.mark.parametrize(
    ("name", "widths"), few(UNALIGNED, ("plain", (4, 12)), ("scale_shift", (4, 12)), DEEPER)
)
def test_masked_equals_slim_once_unaligned_norms_have_switched(name, widths):
    unet, layout = models.build(name), models.layout(name, widths)
    assert layout.unaligned
    before, size = compared(unet, layout, switch=False)
    after, _ = compared(unet, layout)
    assert before > 1e-3 * size
    assert after <= TOLERANCE


@pytest.mark.parametrize("seed", [1, 2])
def test_masked_equals_slim_whatever_is_kept(seed):
    layout = models.layout("plain", (4, 12))
    assert compared(models.build("plain"), layout, seed=seed)[0] <= TOLERANCE


@pytest.mark.parametrize(
    ("flip", "freq_shift"), few(itertools.product([False, True], [0, 1]), (False, 1), (True, 0))
)
def test_masked_equals_slim_for_every_sinusoid(flip, freq_shift):
    changes = {"flip_sin_to_cos": flip, "freq_shift": freq_shift, "block_out_channels": (24, 16)}
    unet = models.build("resnets", **changes)
    groups = find_groups(unet)
    for first in (20, 16, 12):  # every frequency, every one, every one or every other one
        layout = build_layout(unet, groups, (first, 8))
        assert compared(unet, layout)[0] <= TOLERANCE


def test_masked_equals_slim_on_the_built_in_architecture():
    unet, groups = models.build("built_in"), models.groups("built_in")
    layout = build_layout(unet, groups, choose_widths(unet, groups, 0.3, 0.03))
    assert layout.unaligned  # so the switch is needed here
    difference, size = compared(unet, layout)
    assert difference <= TOLERANCE < 0.01 < size


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.57, 0.37])
def test_masked_equals_slim_on_ddpm_cifar10(keep):
    unet = models.build("cifar")
    groups = models.groups("cifar")
    layout = build_layout(unet, groups, choose_widths(unet, groups, keep, 0.03))
    dense = unet_cost(unet)
    assert dense.params == 35_746_307
    assert 6.0e9 < dense.macs < 6.3e9  # 6.1G in Diff-Pruning's table, which leaves attention out
    difference, size = compared(unet, layout)
    assert difference <= TOLERANCE < 0.01 < size


def test_a_removed_channel_cannot_come_back_through_its_producer():
    unet, layout = models.build("plain"), models.layout("plain", (4, 8))
    soft = SoftUNet(unet, layout).eval()
    soft.mask.copy_(models.binary_mask(layout))
    sample, timestep = models.inputs(unet)
    parameters = dict(soft.unet.named_parameters())
    with torch.no_grad():
        before = soft(sample, timestep)
        for group, offset in zip(layout.groups, layout.offsets, strict=True):
            for unit in (soft.mask[offset : offset + group.units] == 0).nonzero().flatten():
                for name, side, index in models.slices(unet, group, int(unit)):
                    if side != "in":
                        parameters[name][index] = 100 * torch.randn_like(parameters[name][index])
        after = soft(sample, timestep)
    assert torch.allclose(before, after, atol=TOLERANCE)


def reference_forward(unet, layout, mask, sample, timestep):
    """The masked net by hooks on activations: no weight is touched, no layout table is read."""
    unet = copy.deepcopy(unet)
    modules = dict(unet.named_modules())
    factors: dict[tuple[str, str], torch.Tensor] = {}
    for group, offset in zip(layout.groups, layout.offsets, strict=True):
        for slot in group.slots:
            module = modules[slot.module]
            width = module.num_channels if slot.side == "norm" else module.weight.shape[1]
            if slot.side == "out":
                width = module.weight.shape[0]
            factor = factors.setdefault((slot.module, slot.side), mask.new_ones(width))
            for position, channel in zip(slot.positions, slot.channels, strict=True):
                factor[position] = mask[offset + channel // group.unit]

    def broadcast(factor, module, x):
        linear = isinstance(module, torch.nn.Linear)
        return factor if linear else factor.view(1, -1, *([1] * (x.dim() - 2)))

    for (name, side), factor in factors.items():
        module = modules[name]
        if side == "in":
            module.register_forward_pre_hook(
                lambda module, args, factor=factor: args[0] * broadcast(factor, module, args[0])
            )
        elif side == "norm":
            module.register_forward_hook(
                lambda module, args, _, factor=factor: loop_norm(
                    args[0], module.weight, module.bias, factor, module.num_groups, module.eps
                )
            )
        elif name.endswith("to_q") and unet.config.attention_head_dim is None:
            module.register_forward_hook(lambda module, _, output, factor=factor: output * factor)
    return unet(sample, timestep).sample


def loop_norm(x, weight, bias, mask, groups, eps):
    """Mask-weighted GroupNorm as a loop over samples and groups."""
    output = torch.empty_like(x)
    size = x.shape[1] // groups
    for image, group in itertools.product(range(len(x)), range(groups)):
        inside = slice(group * size, (group + 1) * size)
        part = x[image, inside].flatten(1)
        weights = mask[inside, None].expand_as(part)
        mean = (weights * part).sum() / weights.sum()
        variance = (weights * (part - mean) ** 2).sum() / weights.sum()
        normal = (part - mean) / torch.sqrt(variance + eps)
        affine = normal * weight[inside, None] + bias[inside, None]
        output[image, inside] = affine.view_as(x[image, inside])
    return output


@pytest.mark.parametrize(
    ("name", "widths"), [("plain", (4, 12)), ("one_head", (4, 8)), ("scale_shift", (4, 8))]
)
def test_fractional_masks_act_once_at_every_consumers_input(name, widths):
    unet, layout = models.build(name).double(), models.layout(name, widths)
    mask = models.soft_mask(layout).double()
    sample, timestep = models.inputs(unet)
    with torch.no_grad():
        soft = SoftUNet(unet, layout).double()
        actual = soft(sample.double(), timestep, mask)
        expected = reference_forward(unet, layout, mask, sample.double(), timestep)
    assert (actual - expected).abs().max() < 1e-10


def norm_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(3, 12, 4, 5, generator=generator, dtype=torch.float64)
    vectors = torch.rand(3, 12, generator=generator, dtype=torch.float64)
    return x.to(dtype), *(v.to(dtype) for v in vectors)


def test_masked_group_norm_equals_the_explicit_loop():
    x, weight, bias, mask = norm_inputs()
    member = torch.arange(12) // 4
    actual = masked_group_norm(x, weight, bias, mask, member, 3, 1e-5)
    expected = loop_norm(x, weight, bias, mask, 3, 1e-5)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)
    tokens = masked_group_norm(x.flatten(2), weight, bias, mask, member, 3, 1e-5)
    assert torch.allclose(tokens, expected.flatten(2), rtol=0, atol=1e-12)


def test_masked_group_norm_takes_any_membership():
    x, weight, bias, mask = norm_inputs()
    order = torch.randperm(12)
    member = torch.empty(12, dtype=torch.long)
    member[order] = torch.arange(12) // 4
    arguments = (t[order] for t in (weight, bias, mask))
    expected = torch.empty_like(x)
    expected[:, order] = loop_norm(x[:, order], *arguments, 3, 1e-5)
    actual = masked_group_norm(x, weight, bias, mask, member, 3, 1e-5)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)


def test_masked_group_norm_with_ones_is_group_norm():
    x, weight, bias, _ = norm_inputs(torch.float32)
    member = torch.arange(12) // 4
    actual = masked_group_norm(x, weight, bias, torch.ones(12), member, 3, 1e-5)
    assert torch.allclose(actual, F.group_norm(x, 3, weight, bias, 1e-5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32_under_autocast(dtype):
    # as PyTorch's own GroupNorm; activations of 300 have variances that float16 cannot hold
    x, weight, bias, mask = norm_inputs(torch.float32)
    member = torch.arange(12) // 4
    for scale in (1.0, 300.0):
        expected = masked_group_norm(scale * x, weight, bias, mask, member, 3, 1e-5)
        with torch.autocast("cpu", dtype=dtype):
            actual = masked_group_norm(scale * x, weight, bias, mask, member, 3, 1e-5)
        assert torch.allclose(actual, expected, rtol=0, atol=1e-5)


def test_the_given_unet_is_never_changed():
    unet, layout = models.build("plain"), models.layout("plain", (4, 8))
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    names = [(name, type(module)) for name, module in unet.named_modules()]
    soft = SoftUNet(unet, layout).train()
    soft.mask.copy_(models.binary_mask(layout))
    soft.adopt_slim_membership()
    optimizer = torch.optim.SGD(soft.parameters(), lr=0.1)
    soft(*models.inputs(unet)).square().mean().backward()
    optimizer.step()
    soft = SoftUNet(models.narrowed(unet, layout), layout)
    soft.mask.copy_(models.binary_mask(layout))
    surgery.perform(soft.unet, layout, soft.mask)
    assert [(name, type(module)) for name, module in unet.named_modules()] == names
    assert not unet.training
    assert all(p.grad is None for p in unet.parameters())
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_all_weights_learn_under_a_soft_mask():
    unet, layout = models.build("plain"), models.layout("plain", (4, 8))
    soft = SoftUNet(unet, layout).train()
    soft.mask.copy_(models.soft_mask(layout))
    soft(*models.inputs(unet)).square().mean().backward()
    names = dict(unet.named_parameters())
    assert list(dict(soft.unet.named_parameters())) == list(names)
    for name, parameter in soft.unet.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize(("name", "widths"), [("plain", (4, 12)), ("one_head", (4, 8))])
def test_gradient_of_the_mask_equals_finite_differences(name, widths):
    unet, layout = models.build(name), models.layout(name, widths)
    soft = SoftUNet(unet, layout).double()
    sample, timestep = models.inputs(unet)
    sample, mask = sample.double(), models.soft_mask(layout).double().requires_grad_()

    def loss(mask):
        return (soft(sample, timestep, mask) - 0.1).square().mean()

    (gradient,) = torch.autograd.grad(loss(mask), mask)
    step = 1e-5
    with torch.no_grad():
        for offset in layout.offsets[::2]:
            move = torch.zeros_like(mask)
            move[offset] = step
            difference = (loss(mask + move) - loss(mask - move)) / (2 * step)
            assert gradient[offset].item() == pytest.approx(difference.item(), rel=1e-4, abs=1e-9)


def test_membership_switches_only_for_unaligned_norms():
    aligned = SoftUNet(models.build("plain"), models.layout("plain", (4, 8)))
    aligned.mask.copy_(models.binary_mask(aligned.layout))
    assert aligned.adopt_slim_membership() == 0
    soft = SoftUNet(models.build("plain"), models.layout("plain", (4, 12)))
    soft.mask.copy_(models.binary_mask(soft.layout))
    assert 0 < soft.adopt_slim_membership() <= len(soft.layout.unaligned)
    assert soft.adopt_slim_membership() == 0  # a second call finds nothing left to switch
    extended = soft.layout.extend(soft.mask)
    for name in soft.layout.unaligned:
        norm = soft.unet.get_submodule(name)
        kept = norm.member[extended[soft.layout.norms[name]] == 1]
        # as the slim norm will: equal runs in order
        size = len(kept) // norm.num_groups
        assert torch.equal(kept, torch.arange(len(kept)) // size)


@pytest.mark.parametrize("name", ["plain", "scale_shift"])
def test_checkpointed_blocks_have_the_gradients_of_the_masked_weights(name):
    # plain checkpointing would compute the blocks again without the mask: the same shapes
    unet, layout = models.build(name, dropout=0.1), models.layout(name, (4, 8))
    soft = SoftUNet(unet, layout).train()
    soft.mask.copy_(models.soft_mask(layout))
    found, saved = [], []
    for checkpointed in (False, True):
        if checkpointed:
            soft.enable_gradient_checkpointing()
        torch.manual_seed(1)
        held = []

        def hold(tensor, held=held):
            held.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
            loss = soft(*models.inputs(unet)).square().mean()
        saved.append(sum(held))
        found.append(torch.autograd.grad(loss, list(soft.parameters())))
    for (parameter, _), one, other in zip(soft.named_parameters(), *found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=parameter)
    assert saved[1] < 0.9 * saved[0]
