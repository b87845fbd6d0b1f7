"""Distillation from the dense network: its prediction, and its block outputs."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from compress.methods.gradflow import depth
from compress.methods.gradflow.groups import UNet
from compress.methods.gradflow.layout import Layout
from compress.models.objective import predicted as denoised
from compress.parallel import distributed


class Teacher:
    """The dense network as a teacher, in the soft stage and in recovery alike.

    Parameters
    ----------
    dense : evaluated without gradients.
    output_weight : weight of ``mean (prediction - dense prediction)^2``.
    feature_weight : weight of the mean over blocks of ``sum m (f - F)^2 / sum m F^2``, where f and
        F are the block's output and the dense one, m the mask of its channels (normalisation ours).
    layout : which mask entry belongs to which channel.
    """

    def __init__(
        self,
        dense: UNet,
        output_weight: float,
        feature_weight: float,
        layout: Layout,
    ) -> None:
        self.dense, self.layout = dense, layout
        self.output_weight, self.feature_weight = output_weight, feature_weight
        if feature_weight and depth.stacks_of(dense):
            raise ValueError(
                "distill_features compares the outputs of a UNet's blocks; got "
                f"distill_features={feature_weight:g} for a {type(dense).__name__}; set it to 0"
            )
        self.blocks = _block_indices(dense, layout) if feature_weight else {}

    @contextlib.contextmanager
    def watch(self, unet: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        """Collect block outputs ``(batch, channels, height, width)`` of a forward pass inside."""
        collected: dict[str, torch.Tensor] = {}

        def keep(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
            collected[name] = output[0] if isinstance(output, tuple) else output

        handles = [
            unet.get_submodule(name).register_forward_hook(partial(keep, name))
            for name in (self.blocks if self.feature_weight else ())
        ]
        try:
            yield collected
        finally:
            for handle in handles:
                handle.remove()

    def loss(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        predicted: torch.Tensor,
        features: dict[str, torch.Tensor],
        mask: torch.Tensor,
        condition: Mapping[str, Any] = MappingProxyType({}),
    ) -> torch.Tensor:
        """Distillation loss of a student's prediction and features.

        Parameters
        ----------
        noisy, timesteps : the student's inputs.
        predicted : its output ``(batch, channels, height, width)``.
        features : from :meth:`watch`; of dense width (masked student) or of slim width.
        mask : ``(units,)``; binary for a slim student.
        condition : further inputs of both UNets, by name.
        """
        if not (self.output_weight or self.feature_weight):
            return predicted.new_zeros(())
        with torch.no_grad(), self.watch(self.dense) as dense_features:
            target = denoised(self.dense, noisy, timesteps, condition)
        loss = self.output_weight * F.mse_loss(predicted.float(), target)
        extended = self.layout.extend(mask)
        errors: dict[str, torch.Tensor] = {}
        sizes: dict[str, torch.Tensor] = {}
        for name, feature in features.items():
            weight = extended[self.blocks[name].to(mask.device)]
            dense = dense_features[name]
            if feature.shape[1] != dense.shape[1]:
                dense, weight = dense[:, weight > 0.5], weight[weight > 0.5]
            weight = weight[:, None, None]
            error = (weight * (feature.float() - dense).square()).sum()
            sizes[name] = (weight * dense.square()).sum()
            errors[name] = error
        # over the whole batch, so that it does not matter how many processes share it
        for name, size in distributed.mean(sizes).items():
            loss = loss + self.feature_weight / len(self.blocks) * errors[name] / size
        return loss


def _block_indices(unet: UNet, layout: Layout) -> dict[str, torch.Tensor]:
    """For every block, the mask index of its output channels: those of its last convolution."""
    blocks: dict[str, Any] = {
        **{f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)},
        **({} if unet.mid_block is None else {"mid_block": unet.mid_block}),
        **{f"up_blocks.{i}": block for i, block in enumerate(unet.up_blocks)},
    }
    indices = {}
    for name, block in blocks.items():
        last = f"resnets.{len(block.resnets) - 1}.conv2"
        for samplers in ("downsamplers", "upsamplers"):
            if getattr(block, samplers, None) is not None:
                last = f"{samplers}.0.conv"
        indices[name] = layout.outputs[f"{name}.{last}"]
    return indices
