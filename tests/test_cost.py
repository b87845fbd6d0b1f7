"""MACs against PyTorch's own FLOP counter."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from builders import models
from compress.common.cost import Cost, cost, layer_macs, unet_cost, unet_inputs


def counted(model, inputs) -> int:
    """MACs by torch.utils.flop_counter, which counts two FLOPs for each."""
    # some versions of torch do not count the fused attention of a CPU
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(**inputs)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("plain", 1),
        ("plain", 3),
        ("no_attention", 3),
        ("no_middle", 1),
        ("one_head", 3),
        ("deeper", 1),
        ("not_square", 3),
        ("built_in", 1),
    ],
)
def test_macs_equal_the_flop_counter(name, batch):
    unet = models.build(name)
    expected = counted(unet, unet_inputs(unet, batch, device="cpu"))
    assert unet_cost(unet, batch).macs == expected


def test_params_are_all_parameters():
    unet = models.build("plain")
    state = unet.state_dict()
    assert unet_cost(unet).params == sum(tensor.numel() for tensor in state.values())


def test_attention_is_counted():
    unet = models.build("plain")
    layers, attention = layer_macs(unet, unet_inputs(unet))
    # 4 attention modules (down, middle, two up) of 16 channels on 4x4 = 16 tokens
    assert attention == 4 * 2 * 16 * 16 * 16
    assert layer_macs(models.build("no_attention"), unet_inputs(unet))[1] == 0


def test_a_layer_counts_inputs_times_outputs_times_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=2)
            self.linear = nn.Linear(5, 7, bias=False)

        def forward(self, x):
            return self.linear(self.conv(self.conv(x)))

    model, inputs = Twice(), {"x": torch.zeros(2, 6, 4, 5)}
    layers, attention = layer_macs(model, inputs)
    assert [layer.name for layer in layers] == ["conv", "conv", "linear"]
    conv, linear = 2 * 4 * 5 * 9 * 3 * 6, 2 * 6 * 4 * 5 * 7
    assert cost(model, inputs) == Cost(params=6 * 3 * 9 + 6 + 35, macs=2 * conv + linear)
    assert counted(model, inputs) == 2 * conv + linear


def test_counting_leaves_the_model_alone():
    unet = models.build("plain").train()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    layer_macs(unet, unet_inputs(unet))
    assert unet.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    for name, tensor in unet.state_dict().items():
        assert tensor.device.type == "cpu" and torch.equal(tensor, before[name])
    assert all(p.grad is None and p.requires_grad for p in unet.parameters())


def test_hooks_go_when_the_forward_pass_fails():
    unet = models.build("plain")
    wrong = {"sample": torch.zeros(1, 5, 8, 8), "timestep": torch.zeros(1)}
    with pytest.raises(RuntimeError):
        layer_macs(unet, wrong)
    assert not any(m._forward_hooks for m in unet.modules())
