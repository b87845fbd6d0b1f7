"""Weights that are cut over the processes: FSDP2, where accelerate's configuration asks for it.

Masks, scores and surgery act on whole weights. So the masked network is one unit: its weights are
gathered for a step and cut again after it, while gradients, Adam's moments and averages stay cut.
The slim network after surgery is wrapped as the configuration says.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor


def check(plugin: FullyShardedDataParallelPlugin, device: str) -> None:
    """Raise ValueError for a way to cut weights that pruning does not support.

    Parameters
    ----------
    plugin : accelerate's configuration of FSDP.
    device : where the processes work.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"expected fsdp_version: 2 in accelerate's configuration; got {plugin.fsdp_version}, "
            "which flattens weights, while pruning needs their shapes; set fsdp_version to 2"
        )
    if not device.startswith("cuda"):
        raise ValueError(
            f"accelerate cuts weights (FSDP) on GPUs only; got --device {device}; take GPUs, or "
            "set distributed_type to MULTI_CPU, where processes share data (DDP)"
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "expected fsdp_activation_checkpointing: false, got true, which would compute "
            "activations again without the masks; set it to false, and gradient_checkpointing: "
            "true in the recipe"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "expected fsdp_offload_params: false; got true, where Adam's moments would lie "
            "elsewhere than what pruning makes of them; set it to false"
        )


def gather_in_float32(accelerator: Accelerator) -> None:
    """Let accelerate gather weights, and reduce gradients, in float32.

    The criterion needs it; autocast makes the network's own operations cheaper, as it does where
    weights are not cut. Does nothing where they are not.
    """
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None


# a part of a DiT's blocks that is called without its block, whose weights are cut again by then
CALLED_ALONE = "CombinedTimestepLabelEmbeddings"


def check_blocks(accelerator: Accelerator, unet: torch.nn.Module) -> None:
    """Raise ValueError where the configuration wraps blocks that a UNet does not have.

    accelerate would find out after the flow, when it wraps the slim one.
    """
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.auto_wrap_policy is not transformer_auto_wrap_policy:
        return
    requested = (
        plugin.transformer_cls_names_to_wrap or getattr(unet, "_no_split_modules", None) or []
    )
    there = {type(module).__name__ for module in unet.modules()}
    absent = sorted(set(requested) - there)
    if absent:
        blocks = sorted(name for name in there if "Block" in name)
        raise ValueError(
            "expected fsdp_transformer_layer_cls_to_wrap to name blocks of the UNet, which are "
            f"{', '.join(blocks)}; got {', '.join(absent)}; remove what is not there"
        )
    if CALLED_ALONE in there - set(requested):
        raise ValueError(
            f"expected fsdp_transformer_layer_cls_to_wrap to name {CALLED_ALONE}, too, since the "
            f"output layer calls the first block's; got {', '.join(requested)}; add it"
        )


@contextlib.contextmanager
def one_unit(accelerator: Accelerator) -> Iterator[None]:
    """A network that is prepared inside is gathered at once, not block by block."""
    if not accelerator.is_fsdp2:
        yield
        return
    plugin = accelerator.state.fsdp_plugin
    policy, plugin.auto_wrap_policy = plugin.auto_wrap_policy, None
    try:
        yield
    finally:
        plugin.auto_wrap_policy = policy


@contextlib.contextmanager
def whole(network: torch.nn.Module) -> Iterator[None]:
    """Inside, the parameters of ``network`` are plain whole tensors on every process."""
    units = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def gathered(tensors: Mapping[str, torch.Tensor], *, keep: bool = True) -> dict[str, torch.Tensor]:
    """Whole tensors in place of those that are cut, which come to the CPU one by one.

    Parameters
    ----------
    tensors : by name, the same on every process.
    keep : whether this process wants them; all must take part.
    """
    wholes = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor().detach()
            tensor = tensor.cpu() if keep else tensor
        if keep:
            wholes[name] = tensor
    return wholes


def cut_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy of ``tensor`` where ``parameter`` is, cut as it is if it is cut.

    It has the parameter's strides, since a fused optimiser walks both in the order of memory.
    """
    if isinstance(parameter, DTensor):
        tensor = tensor.to(parameter.device)
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
