"""Channel groups: the slices of all tensors that must go together when one channel goes.

torch-pruning's dependency graph finds the coupling (residual adds, skip concatenations,
time-embedding projections, attention's q/k/v/out, samplers); we keep only its result.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from compress.common.cost import unet_inputs

SUPPORTED_BLOCKS = {
    "DownBlock2D",
    "AttnDownBlock2D",
    "UNetMidBlock2D",
    "UpBlock2D",
    "AttnUpBlock2D",
}


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
    name : the producer that torch-pruning started from.
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


def check_blocks(unet: Any, known: set[str]) -> None:
    """Raise ValueError, naming them, for blocks of a UNet that are not among the known classes."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    unknown = sorted({type(b).__name__ for b in blocks if b is not None} - known)
    if unknown:
        raise ValueError(
            f"gradflow prunes the blocks {', '.join(sorted(known))}; this UNet has "
            f"{', '.join(unknown)}; choose a model without them"
        )


def check_supported(unet: nn.Module) -> None:
    """Refuse, by name, what gradflow cannot prune.

    Raises
    ------
    ValueError : naming the model class, block or option, and what is supported.
    """
    if not isinstance(unet, UNet2DModel | UNet2DConditionModel):
        raise ValueError(
            f"gradflow prunes diffusers UNet2DModel and UNet2DConditionModel; got "
            f"{type(unet).__name__}; choose a pipeline whose unet is one of them"
        )
    if unet.config.get("inner_widths"):
        raise ValueError(
            "gradflow prunes models with one width per level; this one has inner widths of its "
            "own; prune the model that it was made from"
        )
    _check_size(unet)
    if isinstance(unet, UNet2DConditionModel):
        from compress.methods.gradflow.condition import check_condition_unet

        check_condition_unet(unet)
        return
    check_blocks(unet, SUPPORTED_BLOCKS)
    for name, module in attention_modules(unet).items():
        if module.to_q.out_features != module.to_q.in_features:
            raise ValueError(
                f"attention_head_dim={unet.config.attention_head_dim} should divide the width of "
                f"every level with attention; {name} has {module.to_q.in_features} channels and "
                f"{module.heads} heads; choose a model whose heads fill its levels"
            )
    options = {
        "time_embedding_type": ("positional",),
        "downsample_type": ("conv",),
        "upsample_type": ("conv",),
        "class_embed_type": (None, "timestep", "identity"),
    }
    for option, known in options.items():
        if unet.config[option] not in known:
            raise ValueError(
                f"gradflow expects {option} = {' or '.join(map(repr, known))}; this UNet's config "
                f"has {unet.config[option]!r}; choose a model with the supported value"
            )


def _check_size(unet: Any) -> None:
    """Raise ValueError without a sample size, or with an odd sinusoid."""
    if unet.config.sample_size is None:
        raise ValueError(
            "gradflow expects the UNet's config to say its sample_size; it is None; set it to the "
            "height and width of the images"
        )
    first = unet.config.block_out_channels[0]
    if first % 2:
        raise ValueError(
            "gradflow expects an even block_out_channels[0], as wide as the sinusoid's sines and "
            f"cosines; got {first}; choose another model"
        )


def attention_modules(unet: nn.Module) -> dict[str, Attention]:
    """All attention modules by name."""
    return {name: m for name, m in unet.named_modules() if isinstance(m, Attention)}


def find_groups(unet: UNet2DModel | UNet2DConditionModel) -> tuple[ChannelGroup, ...]:
    """Find all prunable channel groups of a UNet.

    The time embedding keeps its width (our choice: it costs under 1% of the MACs and every
    resnet reads it), and so do the image channels.

    Raises
    ------
    ValueError : for a UNet that gradflow does not support.
    """
    check_supported(unet)
    if isinstance(unet, UNet2DConditionModel):
        from compress.methods.gradflow.condition import condition_groups

        return condition_groups(unet)
    # the graph is traced on a copy without gradients' side effects on the caller's model
    traced = copy.deepcopy(unet).cpu().float().eval().requires_grad_(True)
    graph = torch_pruning.DependencyGraph().build_dependency(
        traced,
        example_inputs=unet_inputs(traced, device="cpu"),
        forward_fn=lambda model, inputs: model(**inputs),
        output_transform=lambda output: output.sample,
    )
    names = {module: name for name, module in traced.named_modules()}
    attention = attention_modules(unet)
    single_head = unet.config.attention_head_dim is None
    groups, seen = [], set()
    for name, module in traced.named_modules():
        if name in seen or not _is_root(name, module):
            continue
        cut = graph.get_pruner_of_module(module).prune_out_channels
        width = _out_channels(module)
        slots = _slots(graph.get_pruning_group(module, cut, list(range(width))), names)
        producers = [slot.module for slot in slots if slot.side == "out"]
        seen.update(producers)
        # levels of equal width are tied by an identity residual between them
        levels = sorted({level_of(producer, len(unet.down_blocks)) for producer in producers})
        groups.append(
            ChannelGroup(
                name=producers[0],
                level=levels[0],
                width=width,
                unit=_unit(producers, attention, single_head),
                slots=slots,
            )
        )
    # torch-pruning walks backwards from the output; readers expect the order of the forward pass
    order = {name: i for i, name in enumerate(names.values())}
    return tuple(sorted(groups, key=lambda group: order[group.name]))


def _is_root(name: str, module: nn.Module) -> bool:
    """Whether a module's output channels may start a group.

    The embeddings of time and label keep their widths, and so does the image; projections of an
    embedding only follow (with scale and shift they are twice as wide as the channels that they
    act on).
    """
    fixed = name.startswith(("time_embedding.", "class_embedding.")) or name == "conv_out"
    follows = name.endswith("time_emb_proj")
    return isinstance(module, nn.Conv2d | nn.Linear) and not fixed and not follows


def _out_channels(module: Any) -> int:
    return module.out_channels if isinstance(module, nn.Conv2d) else module.out_features


def _slots(found, names: Mapping[nn.Module, str]) -> tuple[Slot, ...]:
    merged: dict[tuple[str, str], dict[int, int]] = {}
    for item in found:
        module = item.dep.target.module
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
            continue
        if isinstance(module, nn.GroupNorm):
            side = "norm"
        else:
            side = "out" if "out" in item.dep.handler.__name__ else "in"
        places = merged.setdefault((names[module], side), {})
        places.update(zip(item.idxs, item.root_idxs, strict=True))
    return tuple(
        Slot(module, side, tuple(sorted(places)), tuple(places[p] for p in sorted(places)))
        for (module, side), places in merged.items()
    )


def level_of(module: str, levels: int) -> int:
    """The entry of ``block_out_channels`` that sets a producer's output width."""
    parts = module.split(".")
    if parts[0] == "down_blocks":
        return int(parts[1])
    if parts[0] == "up_blocks":
        return levels - 1 - int(parts[1])
    return levels - 1 if parts[0] == "mid_block" else 0


def _unit(producers: Sequence[str], attention: Mapping[str, Attention], single_head: bool) -> int:
    for producer in producers:
        name, _, projection = producer.rpartition(".")
        if name in attention and projection in ("to_q", "to_k", "to_v") and not single_head:
            return attention[name].to_q.out_features // attention[name].heads
    return 1


def narrowed_queries(unet: UNet2DModel | UNet2DConditionModel) -> tuple[str, ...]:
    """``to_q`` layers of attention whose heads get narrower: their softmax scale changes."""
    heads = unet.config.attention_head_dim
    kept = isinstance(heads, int) if isinstance(unet, UNet2DConditionModel) else heads is None
    if not kept:
        return ()
    return tuple(f"{name}.to_q" for name in attention_modules(unet))


def dense_widths(unet: UNet2DModel) -> tuple[int, ...]:
    """``block_out_channels`` as a tuple."""
    return tuple(unet.config.block_out_channels)


def index_of(positions: Sequence[int]) -> torch.Tensor:
    """Positions as an index tensor."""
    return torch.tensor(list(positions), dtype=torch.long)
