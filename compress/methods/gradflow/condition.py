"""Channel groups of ``UNet2DConditionModel``: Stable Diffusion 1.x, 2.x, XL and LDM shapes.

The supported blocks are few and their wiring is known, so the groups are read from the modules
themselves: no forward pass, no copy of the weights, seconds for a UNet of any size.

Heads stay legal in a plain config, whose ``attention_head_dim`` is the number of heads:

- an int (SD 1.x: 8 heads everywhere) stays, and every head loses the same number of channels;
  queries and keys go together, values and the output's columns go together;
- a list (SD 2.x, SDXL: heads of 64 channels) gets shorter entries: whole heads go.

A feed-forward's hidden channels, four for each channel of its level, keep the level's share; the
two halves of GEGLU's projection go together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU

from compress.methods.gradflow.groups import (
    ChannelGroup,
    Slot,
    in_forward_order,
    level_of,
    merged,
    out_width,
    whole_heads,
)


@dataclass
class _Stream:
    """Channels that several layers add into, with the slots found so far."""

    width: int
    slots: list[Slot] = field(default_factory=list)

    def add(self, module: str, side: str, start: int = 0, copies: int = 1) -> None:
        """Note that ``module`` holds these channels, from ``start`` on, ``copies`` times."""
        count = self.width * copies
        channels = tuple(range(self.width)) * copies
        self.slots.append(Slot(module, side, tuple(range(start, start + count)), channels))


class _Walk:
    """Follows the forward pass over the module names and collects the streams."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet: Any = unet
        self.modules = dict(unet.named_modules())
        self.groups: list[ChannelGroup] = []
        self._streams: list[_Stream] = []

    def run(self) -> tuple[ChannelGroup, ...]:
        stream = self._stream("conv_in")
        skips = [stream]
        for i, block in enumerate(self.unet.down_blocks):
            for j, _ in enumerate(block.resnets):
                stream = self._resnet(f"down_blocks.{i}.resnets.{j}", [stream])
                self._attention(f"down_blocks.{i}.attentions.{j}", stream)
                skips.append(stream)
            for j, _ in enumerate(block.downsamplers or ()):
                stream = self._resample(f"down_blocks.{i}.downsamplers.{j}.conv", stream)
                skips.append(stream)
        if self.unet.mid_block is not None:
            for j, _ in enumerate(self.unet.mid_block.resnets):
                if j > 0:
                    self._attention(f"mid_block.attentions.{j - 1}", stream)
                stream = self._resnet(f"mid_block.resnets.{j}", [stream])
        for i, block in enumerate(self.unet.up_blocks):
            for j, _ in enumerate(block.resnets):
                stream = self._resnet(f"up_blocks.{i}.resnets.{j}", [stream, skips.pop()])
                self._attention(f"up_blocks.{i}.attentions.{j}", stream)
            for j, _ in enumerate(block.upsamplers or ()):
                stream = self._resample(f"up_blocks.{i}.upsamplers.{j}.conv", stream)
        stream.add("conv_norm_out", "norm")
        stream.add("conv_out", "in")
        for each in self._streams:
            self._group(each.slots, each.width)
        return in_forward_order(self.groups, self.unet)

    def _stream(self, producer: str) -> _Stream:
        stream = _Stream(out_width(self.modules[producer]))
        stream.add(producer, "out")
        self._streams.append(stream)
        return stream

    def _group(
        self, slots: Iterable[Slot], width: int, unit: int = 1, expansion: int = 1, parts: int = 1
    ) -> None:
        slots = merged(slots)
        producers = [slot.module for slot in slots if slot.side == "out"]
        levels = len(self.unet.down_blocks)
        level = min(level_of(producer, levels) for producer in producers)
        self.groups.append(
            ChannelGroup(producers[0], level, width, unit, slots, expansion=expansion, parts=parts)
        )

    def _resample(self, conv: str, stream: _Stream) -> _Stream:
        stream.add(conv, "in")
        return self._stream(conv)

    def _resnet(self, name: str, sources: Sequence[_Stream]) -> _Stream:
        shortcut = f"{name}.conv_shortcut" in self.modules
        readers = [("norm1", "norm"), ("conv1", "in")]
        if shortcut:
            readers.append(("conv_shortcut", "in"))
        start = 0
        for source in sources:
            for reader, side in readers:
                source.add(f"{name}.{reader}", side, start)
            start += source.width
        inner = self._stream(f"{name}.conv1")
        inner.add(f"{name}.norm2", "norm")
        inner.add(f"{name}.conv2", "in")
        copies = self.modules[f"{name}.time_emb_proj"].out_features // inner.width
        inner.add(f"{name}.time_emb_proj", "out", copies=copies)
        if shortcut:
            result = self._stream(f"{name}.conv2")
            result.add(f"{name}.conv_shortcut", "out")
            return result
        if len(sources) > 1:
            raise ValueError(
                f"gradflow expects a shortcut convolution after a concatenation; {name} has none; "
                "choose other block_out_channels"
            )
        sources[0].add(f"{name}.conv2", "out")
        return sources[0]

    def _attention(self, name: str, stream: _Stream) -> None:
        if name not in self.modules:
            return
        stream.add(f"{name}.norm", "norm")
        stream.add(f"{name}.proj_in", "in")
        inner = self._stream(f"{name}.proj_in")
        for k, _ in enumerate(self.modules[name].transformer_blocks):
            prefix = f"{name}.transformer_blocks.{k}"
            for norm, attention in (("norm1", "attn1"), ("norm2", "attn2")):
                inner.add(f"{prefix}.{norm}", "norm")
                self._heads(f"{prefix}.{attention}", inner)
            inner.add(f"{prefix}.norm3", "norm")
            self._feed_forward(f"{prefix}.ff", inner)
        inner.add(f"{name}.proj_out", "in")
        stream.add(f"{name}.proj_out", "out")

    def _heads(self, name: str, inner: _Stream) -> None:
        module = self.modules[name]
        inner.add(f"{name}.to_q", "in")
        if not module.is_cross_attention:
            inner.add(f"{name}.to_k", "in")
            inner.add(f"{name}.to_v", "in")
        inner.add(f"{name}.to_out.0", "out")
        queries, values = _Stream(inner.width), _Stream(inner.width)
        queries.add(f"{name}.to_q", "out")
        queries.add(f"{name}.to_k", "out")
        values.add(f"{name}.to_v", "out")
        values.add(f"{name}.to_out.0", "in")
        if whole_heads(self.unet):
            unit = inner.width // module.heads
            self._group([*queries.slots, *values.slots], inner.width, unit=unit)
        else:
            self._group(queries.slots, inner.width, parts=module.heads)
            self._group(values.slots, inner.width, parts=module.heads)

    def _feed_forward(self, name: str, inner: _Stream) -> None:
        first = self.modules[f"{name}.net.0"]
        if not isinstance(first, GEGLU):
            raise ValueError(
                f"gradflow expects GEGLU feed-forwards; {name} has {type(first).__name__}; choose "
                "another model"
            )
        inner.add(f"{name}.net.0.proj", "in")
        inner.add(f"{name}.net.2", "out")
        width = self.modules[f"{name}.net.2"].in_features
        hidden = _Stream(width)
        hidden.add(f"{name}.net.0.proj", "out", copies=2)
        hidden.add(f"{name}.net.2", "in")
        self._group(hidden.slots, width, expansion=width // inner.width)


def condition_groups(unet: UNet2DConditionModel) -> tuple[ChannelGroup, ...]:
    """All prunable channel groups, in the order of the module names.

    The image's and the text's channels keep their widths, and the time embedding's.
    """
    return _Walk(unet).run()
