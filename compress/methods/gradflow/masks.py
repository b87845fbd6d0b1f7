"""Soft masks whose binary case is exactly the slim network.

A unit's mask acts exactly once, at every consumer's input: it multiplies the columns of the
convolution or linear layer that reads the channel. Norms use it as a weight in mean and variance,
so a binary mask gives exactly the network that surgery exports.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from compress.methods.gradflow.groups import UNet
from compress.methods.gradflow.layout import Layout
from compress.models.objective import predicted


def masked_group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor,
    member: torch.Tensor,
    groups: int,
    eps: float,
) -> torch.Tensor:
    r"""GroupNorm with mask-weighted statistics.

    ``mean = sum(m x) / sum(m)`` and ``var = sum(m (x - mean)^2) / sum(m)`` over the channels of a
    group and all positions; with a mask of ones this is GroupNorm. The output of masked channels
    is not zeroed: their consumers' columns are.

    Parameters
    ----------
    x : ``(batch, channels, ...)``.
    weight, bias : ``(channels,)`` affine parameters.
    mask : ``(channels,)`` in [0, 1], with a positive sum in every group.
    member : ``(channels,)`` the group of each channel, in [0, groups).
    groups : number of groups.
    eps : added to the variance.
    """
    # statistics in float32 whatever autocast says, as PyTorch's own GroupNorm
    with torch.autocast(x.device.type, enabled=False):
        x = x if x.dtype == torch.float64 else x.float()
        share = nn.functional.one_hot(member, groups).to(mask.dtype) * mask[:, None]
        share = share / share.sum(0)
        spread = (x.shape[0], x.shape[1], *([1] * (x.dim() - 2)))
        mean = (x.flatten(2).mean(2) @ share)[:, member]
        # two passes, not torch.var_mean: more exact, and 0.6 of its time on a CPU
        centred = x - mean.view(spread)
        variance = centred.square().flatten(2).mean(2) @ share
        scale = torch.rsqrt(variance + eps)[:, member] * weight
        return torch.addcmul(bias.view(spread[1:]), centred, scale.view(spread))


class MaskedNorm(nn.Module):
    """GroupNorm or LayerNorm with mask-weighted statistics; it shares the norm's parameters.

    Buffers are the ``mask`` and ``member``, the group of each channel. A LayerNorm is one group,
    and normalises every token of its input ``(batch, tokens, channels)`` by itself.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    mask: torch.Tensor
    member: torch.Tensor

    def __init__(self, norm: nn.GroupNorm | nn.LayerNorm) -> None:
        super().__init__()
        self.by_token = isinstance(norm, nn.LayerNorm)
        self.num_groups = 1 if isinstance(norm, nn.LayerNorm) else norm.num_groups
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias
        channels = len(norm.weight)
        member = torch.arange(channels, device=norm.weight.device) // (channels // self.num_groups)
        self.register_buffer("mask", torch.ones_like(member, dtype=torch.float), persistent=False)
        self.register_buffer("member", member, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``(batch, channels, ...)``, or ``(batch, tokens, channels)`` by token."""
        channels = x.reshape(-1, x.shape[-1], 1) if self.by_token else x
        normed = masked_group_norm(
            channels, self.weight, self.bias, self.mask, self.member, self.num_groups, self.eps
        )
        return normed.view(x.shape).to(x.dtype)


class SoftUNet(nn.Module):
    """A denoiser evaluated at f(theta * m), the network that trains while the flow moves m.

    Works on a deep copy; parameters keep their names under ``unet.``. Its buffer ``mask``
    ``(units,)`` starts at 1, where the network is the given one.

    Parameters
    ----------
    unet : the dense model, not modified; with the sinusoid of the slim one, from
        :func:`compress.methods.gradflow.sinusoid.narrowed`, the masked network is the slim one
        when the mask is binary.
    layout : where each unit acts.
    """

    mask: torch.Tensor

    def __init__(self, unet: UNet, layout: Layout) -> None:
        super().__init__()
        self.unet = copy.deepcopy(unet)
        self.layout = layout
        for name, module in list(self.unet.named_modules()):
            parent, _, attribute = name.rpartition(".")
            if name in layout.norms and isinstance(module, nn.GroupNorm | nn.LayerNorm):
                setattr(self.unet.get_submodule(parent), attribute, MaskedNorm(module))
        self.register_buffer("mask", torch.ones(layout.units), persistent=False)
        columns = {f"{name}.weight": index for name, index in layout.inputs.items()}
        self._columns = {
            name: index for name, index in columns.items() if bool((index != layout.units).any())
        }

    def effective(self, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters and buffers that carry the mask, by name: theta * m."""
        extended = self.layout.extend(mask)
        parameters = dict(self.unet.named_parameters())
        changed: dict[str, torch.Tensor] = {}
        for name, index in self._columns.items():
            weight = parameters[name]
            shape = (1, -1, *([1] * (weight.dim() - 2)))
            changed[name] = weight * extended[index.to(mask.device)].view(shape)
        for name, index in (self.layout.queries | self.layout.gated).items():
            rows = extended[index.to(mask.device)]
            key = f"{name}.weight"
            changed[key] = (changed[key] if key in changed else parameters[key]) * rows[:, None]
            if f"{name}.bias" in parameters:
                changed[f"{name}.bias"] = parameters[f"{name}.bias"] * rows
        for name, index in self.layout.norms.items():
            changed[f"{name}.mask"] = extended[index.to(mask.device)]
        return changed

    def enable_gradient_checkpointing(self) -> None:
        """Compute the blocks' activations again in the backward pass instead of keeping them."""
        self.unet.enable_gradient_checkpointing(_checkpoint_masked)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        mask: torch.Tensor | None = None,
        condition: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Predict noise ``(batch, channels, height, width)``.

        Parameters
        ----------
        sample : ``(batch, channels, height, width)``.
        timestep : ``(batch,)``.
        mask : ``(units,)``; the buffer ``mask`` when not given.
        condition : further inputs of the UNet by name, such as ``encoder_hidden_states``.
        """
        mask = self.mask if mask is None else mask
        held = self.effective(mask)
        return predicted(
            lambda *inputs, **named: functional_call(self.unet, held, inputs, named),
            sample,
            timestep,
            condition or {},
        )

    def adopt_slim_membership(self) -> int:
        """Group the kept channels of unaligned norms as in the slim network.

        The mask must be binary. Returns the number of norms whose membership changed.
        """
        extended = self.layout.extend(self.mask)
        changed = 0
        for name in self.layout.unaligned:
            norm: Any = self.unet.get_submodule(name)
            kept = extended[self.layout.norms[name].to(extended.device)] > 0.5
            rank = kept.long().cumsum(0) - 1
            member = torch.where(kept, rank // (int(kept.sum()) // norm.num_groups), norm.member)
            changed += bool((member != norm.member).any())
            norm.member.copy_(member)
        return changed


def _checkpoint_masked(module: nn.Module, *inputs: Any) -> Any:
    """Checkpoint a block together with its current masked weights.

    In the backward pass :meth:`SoftUNet.forward` is over and the module has its own weights again:
    plain checkpointing would silently recompute other activations of the same shapes.
    """
    held = dict(module.named_parameters()) | dict(module.named_buffers())

    def again(*inputs: Any) -> Any:
        return functional_call(module, held, inputs)

    return checkpoint(again, *inputs, use_reentrant=False)
