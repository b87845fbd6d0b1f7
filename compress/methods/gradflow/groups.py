"""Channel groups: the slices of all tensors that must go together when one channel goes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

UNet: TypeAlias = UNet2DModel | UNet2DConditionModel


@dataclass(frozen=True)
class Slot:
    """Where a group touches one module.

    ``positions[j]`` along the module's ``side`` ("in", "out" or "norm") is channel ``channels[j]``
    of the group.
    """

    module: str
    side: str
    positions: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Coupled channels of one width.

    Attributes
    ----------
    name : the first module that produces them.
    level : index into ``block_out_channels`` that sets the width.
    width : channels in the dense model.
    unit : channels that go together: the head size where heads are removed whole, else 1.
    slots : every place that holds these channels.
    expansion : channels for each channel of the level: 4 in a feed-forward, else 1.
    parts : equal parts that each keep the same number of channels: the heads where heads stay.
    """

    name: str
    level: int
    width: int
    unit: int
    slots: tuple[Slot, ...]
    expansion: int = 1
    parts: int = 1

    def slim_width(self, widths: Sequence[int]) -> int:
        """Channels in a slim model with these level widths."""
        return widths[self.level] * self.expansion

    @property
    def units(self) -> int:
        """Number of channels (or heads) that can go one by one."""
        return self.width // self.unit


def merged(slots: Iterable[Slot]) -> tuple[Slot, ...]:
    """One slot for each module and side: a concatenation may hold the same channels twice."""
    places: dict[tuple[str, str], dict[int, int]] = {}
    for slot in slots:
        place = places.setdefault((slot.module, slot.side), {})
        place.update(zip(slot.positions, slot.channels, strict=True))
    return tuple(
        Slot(module, side, *zip(*sorted(place.items()), strict=True))
        for (module, side), place in places.items()
    )


def in_forward_order(groups: Iterable[ChannelGroup], unet: nn.Module) -> tuple[ChannelGroup, ...]:
    """Groups in the order in which the UNet names their producers."""
    order = {name: i for i, (name, _) in enumerate(unet.named_modules())}
    return tuple(sorted(groups, key=lambda group: order[group.name]))


def level_of(module: str, levels: int) -> int:
    """The entry of ``block_out_channels`` that sets a producer's output width."""
    parts = module.split(".")
    if parts[0] == "down_blocks":
        return int(parts[1])
    if parts[0] == "up_blocks":
        return levels - 1 - int(parts[1])
    return levels - 1 if parts[0] == "mid_block" else 0


def out_width(module: Any) -> int:
    """Output channels of a convolution or linear layer."""
    return module.out_channels if isinstance(module, nn.Conv2d) else module.out_features


def attention_modules(unet: nn.Module) -> dict[str, Attention]:
    """All attention modules by name."""
    return {name: m for name, m in unet.named_modules() if isinstance(m, Attention)}


def whole_heads(unet: UNet) -> bool:
    """Whether pruning removes whole heads; otherwise every head gets narrower.

    Heads stay where a plain config has their number alone: one head in a ``UNet2DModel`` without
    ``attention_head_dim``, an int in a ``UNet2DConditionModel``.
    """
    heads = unet.config.attention_head_dim
    if isinstance(unet, UNet2DConditionModel):
        return not isinstance(heads, int)
    return heads is not None


def heads_of_levels(unet: UNet) -> tuple[int, ...]:
    """The number of heads of each level with attention, 0 elsewhere."""
    heads = [0] * len(dense_widths(unet))
    for name, module in attention_modules(unet).items():
        heads[level_of(name, len(heads))] = module.heads
    return tuple(heads)


def narrowed_queries(unet: UNet) -> tuple[str, ...]:
    """``to_q`` layers of attention whose heads get narrower: their softmax scale changes."""
    return () if whole_heads(unet) else tuple(f"{name}.to_q" for name in attention_modules(unet))


def dense_widths(unet: UNet) -> tuple[int, ...]:
    """``block_out_channels`` as a tuple."""
    return tuple(unet.config.block_out_channels)
