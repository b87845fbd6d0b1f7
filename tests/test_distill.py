"""Distillation from the dense network."""

import pytest
import torch

from builders import models
from compress.methods.gradflow import surgery
from compress.methods.gradflow.distill import Teacher
from compress.methods.gradflow.masks import SoftUNet

NAMES = {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"}


def hooks(unet) -> int:
    return sum(len(module._forward_hooks) for module in unet.modules())


def watched(teacher, student, unet, sample, timestep):
    """A student's prediction and its block outputs."""
    with teacher.watch(unet) as features:
        output = student(sample, timestep)
    return getattr(output, "sample", output), features


def test_without_weights_nothing_is_computed():
    unet, layout = models.build("plain"), models.layout("plain", (4, 8))

    class Unused(torch.nn.Module):
        down_blocks, mid_block, up_blocks = unet.down_blocks, unet.mid_block, unet.up_blocks

        def forward(self, *_):
            raise RuntimeError("the teacher ran")

    teacher = Teacher(Unused(), 0.0, 0.0, layout)
    sample, timestep = models.inputs(unet)
    predicted, features = watched(teacher, unet, unet, sample, timestep)
    loss = teacher.loss(sample, timestep, predicted, features, torch.ones(layout.units))
    assert loss.item() == 0 and loss.shape == () and features == {}


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_the_teacher_as_student_loses_nothing(weights):
    unet, layout = models.build("plain"), models.layout("plain", (4, 8))
    teacher = Teacher(unet, *weights, layout)
    sample, timestep = models.inputs(unet)
    predicted, features = watched(teacher, unet, unet, sample, timestep)
    assert set(features) == (NAMES if weights[1] else set())
    loss = teacher.loss(sample, timestep, predicted, features, torch.ones(layout.units))
    assert loss.item() == 0


def test_a_soft_student_with_ones_loses_nothing():
    unet = models.build("plain")
    layout = models.layout("plain", unet.config.block_out_channels)
    soft, teacher = SoftUNet(unet, layout), Teacher(unet, 1.0, 1.0, layout)
    sample, timestep = models.inputs(unet)
    predicted, features = watched(teacher, soft, soft.unet, sample, timestep)
    loss = teacher.loss(sample, timestep, predicted, features, soft.mask)
    assert 0 <= loss.item() < 1e-10


def expected_loss(unet, student, kept, weights, sample, timestep):
    """The two terms by hand; ``kept[block]`` weighs a block's channels, whatever their number."""
    outputs = {}
    for network in (unet, student):
        found = outputs[network] = {}
        for name in NAMES:
            network.get_submodule(name).register_forward_hook(
                lambda _m, _i, output, name=name, found=found: found.update(
                    {name: output[0] if isinstance(output, tuple) else output}
                )
            )
    with torch.no_grad():
        target, prediction = unet(sample, timestep).sample, student(sample, timestep).sample
    total = weights[0] * (prediction - target).square().mean()
    for name in NAMES:
        ours, theirs = outputs[student][name], outputs[unet][name][:, kept[name]]
        share = (ours - theirs).square().sum() / theirs.square().sum()
        total += weights[1] * share / len(NAMES)
    return total.item()


def test_a_slim_students_features_are_compared_with_the_kept_channels():
    unet, layout = models.build("plain"), models.layout("plain", (4, 8))
    mask, weights = models.binary_mask(layout), (0.3, 0.7)
    slim = surgery.perform(models.narrowed(unet, layout), layout, mask).eval()
    teacher = Teacher(unet, *weights, layout)
    sample, timestep = models.inputs(unet)
    predicted, features = watched(teacher, slim, slim, sample, timestep)
    loss = teacher.loss(sample, timestep, predicted, features, mask)
    # which channels a block's output keeps, from the groups: those of the layer that makes it
    producers = {
        "down_blocks.0": "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1": "down_blocks.1.attentions.0.to_out.0",
        "mid_block": "mid_block.resnets.1.conv2",
        "up_blocks.0": "up_blocks.0.upsamplers.0.conv",
        "up_blocks.1": "up_blocks.1.resnets.1.conv2",
    }
    kept = {}
    for group, offset in zip(layout.groups, layout.offsets, strict=True):
        for slot in group.slots:
            for block, producer in producers.items():
                if (slot.module, slot.side) == (producer, "out"):
                    kept[block] = mask[offset : offset + group.width] == 1
    expected = expected_loss(unet, slim, kept, weights, sample, timestep)
    assert expected > 0.01
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_masked_student_is_worth_what_its_slim_self_is():
    unet, layout = models.build("plain"), models.layout("plain", (4, 8))
    teacher = Teacher(unet, 0.3, 0.7, layout)
    soft = SoftUNet(models.narrowed(unet, layout), layout)
    soft.mask.copy_(models.binary_mask(layout))
    slim = surgery.perform(soft.unet, layout, soft.mask).eval()
    sample, timestep = models.inputs(unet)
    losses = [
        teacher.loss(sample, timestep, *watched(teacher, student, net, sample, timestep), soft.mask)
        for student, net in ((soft, soft.unet), (slim, slim))
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)


def test_a_change_in_a_removed_channel_does_not_count():
    unet, layout = models.build("plain"), models.layout("plain", (4, 8))
    teacher, mask = Teacher(unet, 0.0, 1.0, layout), models.binary_mask(layout)
    sample, timestep = models.inputs(unet)
    predicted, features = watched(teacher, unet, unet, sample, timestep)
    feature = features["mid_block"] = features["mid_block"].clone()
    removed = layout.extend(mask)[layout.outputs["mid_block.resnets.1.conv2"]] == 0
    feature[:, removed] += 5
    assert teacher.loss(sample, timestep, predicted, features, mask).item() == 0
    feature[:, ~removed] += 5
    assert teacher.loss(sample, timestep, predicted, features, mask).item() > 0


def test_hooks_are_removed_and_gradients_reach_the_student_only():
    unet, layout = models.build("plain"), models.layout("plain", (4, 8))
    teacher, mask = Teacher(unet, 1.0, 1.0, layout), models.binary_mask(layout)
    slim = surgery.perform(models.narrowed(unet, layout), layout, mask)
    sample, timestep = models.inputs(unet)
    predicted, features = watched(teacher, slim, slim, sample, timestep)
    teacher.loss(sample, timestep, predicted, features, mask).backward()
    assert hooks(unet) == hooks(slim) == 0
    assert all(p.grad is None for p in unet.parameters())
    assert all(p.grad is not None for p in slim.parameters())
    with pytest.raises(RuntimeError, match="stop"), teacher.watch(slim):
        assert hooks(slim) == len(NAMES)
        raise RuntimeError("stop")
    assert hooks(slim) == 0
