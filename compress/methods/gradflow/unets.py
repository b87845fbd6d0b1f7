"""The UNets that gradflow prunes, and their channel groups.

The coupling of a UNet2DModel (residual adds, skip concatenations, time-embedding projections,
attention's q/k/v/out, samplers) is what torch-pruning's dependency graph finds; that of a
UNet2DConditionModel is read from its modules by :mod:`compress.methods.gradflow.condition`.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch_pruning
from diffusers import Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from compress.common.cost import unet_inputs
from compress.methods.gradflow import depth
from compress.methods.gradflow.condition import condition_groups
from compress.methods.gradflow.groups import (
    ChannelGroup,
    Slot,
    UNet,
    in_forward_order,
    level_of,
    merged,
    out_width,
    whole_heads,
)

BLOCKS: dict[type, set[str]] = {
    UNet2DModel: {
        "DownBlock2D",
        "AttnDownBlock2D",
        "UNetMidBlock2D",
        "UpBlock2D",
        "AttnUpBlock2D",
    },
    UNet2DConditionModel: {
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "UNetMidBlock2D",
        "UNetMidBlock2DCrossAttn",
        "UpBlock2D",
        "CrossAttnUpBlock2D",
    },
}
# what each option may be; anything else adds layers or wiring that is not followed
OPTIONS: dict[type, Mapping[str, tuple[Any, ...]]] = {
    UNet2DModel: {
        "time_embedding_type": ("positional",),
        "downsample_type": ("conv",),
        "upsample_type": ("conv",),
        "class_embed_type": (None, "timestep", "identity"),
    },
    UNet2DConditionModel: {
        "time_embedding_type": ("positional",),
        "class_embed_type": (None, "timestep", "identity", "projection"),
        "addition_embed_type": (None, "text_time"),
        "encoder_hid_dim_type": (None,),
        "attention_type": ("default",),
        "cross_attention_norm": (None,),
        "dual_cross_attention": (False,),
        "class_embeddings_concat": (False,),
        "time_cond_proj_dim": (None,),
    },
}


def find_groups(unet: UNet) -> tuple[ChannelGroup, ...]:
    """Find all prunable channel groups of a UNet, in forward order; a transformer's blocks.

    The time embedding keeps its width (our choice: it costs under 1% of the MACs and every
    resnet reads it), and so do the channels of images and texts.
    """
    check_supported(unet)
    if depth.stacks_of(unet):
        return depth.depth_groups(unet)
    conditional = isinstance(unet, UNet2DConditionModel)
    return condition_groups(unet) if conditional else _traced_groups(unet)


def check_supported(unet: nn.Module) -> None:
    """Refuse, by name, what gradflow cannot prune."""
    kind = next((kind for kind in BLOCKS if isinstance(unet, kind)), None)
    config: Any = getattr(unet, "config", {})
    if config.get("inner_widths"):
        raise ValueError(
            "gradflow prunes models with one width per level; this one has inner widths of its "
            "own; prune the model that it was made from"
        )
    if depth.stacks_of(unet):
        return
    if kind is None:
        raise ValueError(
            f"gradflow prunes diffusers UNet2DModel, UNet2DConditionModel and "
            f"{', '.join(depth.STACKS)}; got {type(unet).__name__}; choose a pipeline with one of "
            "them"
        )
    if config.sample_size is None:
        raise ValueError(
            "gradflow expects the UNet's config to say its sample_size; it is None; set it to the "
            "height and width of the images"
        )
    if config.block_out_channels[0] % 2:
        raise ValueError(
            "gradflow expects an even block_out_channels[0], as wide as the sinusoid's sines and "
            f"cosines; got {config.block_out_channels[0]}; choose another model"
        )
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]  # type: ignore[misc]
    unknown = sorted({type(b).__name__ for b in blocks if b is not None} - BLOCKS[kind])
    if unknown:
        raise ValueError(
            f"gradflow prunes the blocks {', '.join(sorted(BLOCKS[kind]))}; this UNet has "
            f"{', '.join(unknown)}; choose a model without them"
        )
    for option, known in OPTIONS[kind].items():
        if config[option] not in known:
            raise ValueError(
                f"gradflow expects {option} = {' or '.join(map(repr, known))}; this UNet's config "
                f"has {config[option]!r}; choose a model with a supported value"
            )
    if kind is UNet2DConditionModel and not isinstance(config.cross_attention_dim, int):
        raise ValueError(
            "gradflow expects one cross_attention_dim for all levels; this UNet's config has "
            f"{config.cross_attention_dim!r}; choose a model with one"
        )
    for name, module in unet.named_modules():
        if isinstance(module, Transformer2DModel):
            sizes = (module.in_channels, module.inner_dim, module.num_attention_heads)
        elif isinstance(module, Attention):
            sizes = (module.to_q.in_features, module.to_q.out_features, module.heads)
        else:
            continue
        width, inner, heads = sizes
        if inner != width:
            raise ValueError(
                f"attention_head_dim={config.attention_head_dim} should divide the width of every "
                f"level with attention; {name} has {width} channels and {heads} heads; choose a "
                "model whose heads fill its levels"
            )


def _traced_groups(unet: UNet) -> tuple[ChannelGroup, ...]:
    # traced on a copy, so that the caller's model gets no gradients
    traced = copy.deepcopy(unet).cpu().float().eval().requires_grad_(True)
    graph = torch_pruning.DependencyGraph().build_dependency(
        traced,
        example_inputs=unet_inputs(traced, device="cpu"),
        forward_fn=lambda model, inputs: model(**inputs),
        output_transform=lambda output: output.sample,
    )
    names = {module: name for name, module in traced.named_modules()}
    groups, seen = [], set()
    for name, module in traced.named_modules():
        if name in seen or not _is_root(name, module):
            continue
        cut = graph.get_pruner_of_module(module).prune_out_channels
        width = out_width(module)
        slots = _slots(graph.get_pruning_group(module, cut, list(range(width))), names)
        producers = [slot.module for slot in slots if slot.side == "out"]
        seen.update(producers)
        # levels of equal width are tied by an identity residual between them
        level = min(level_of(producer, len(unet.down_blocks)) for producer in producers)
        groups.append(ChannelGroup(producers[0], level, width, _unit(producers, unet), slots))
    return in_forward_order(groups, unet)


def _is_root(name: str, module: nn.Module) -> bool:
    """Whether a module's output channels may start a group.

    The embeddings of time and label keep their widths, and so does the image; projections of an
    embedding only follow (with scale and shift they are twice as wide as the channels that they
    act on).
    """
    fixed = name.startswith(("time_embedding.", "class_embedding.")) or name == "conv_out"
    follows = name.endswith("time_emb_proj")
    return isinstance(module, nn.Conv2d | nn.Linear) and not fixed and not follows


def _slots(dependencies: Any, names: Mapping[nn.Module, str]) -> tuple[Slot, ...]:
    """The slots of one of torch-pruning's groups."""
    slots = []
    for item in dependencies:
        module = item.dep.target.module
        if isinstance(module, nn.GroupNorm):
            side = "norm"
        elif isinstance(module, nn.Conv2d | nn.Linear):
            side = "out" if "out" in item.dep.handler.__name__ else "in"
        else:
            continue
        slots.append(Slot(names[module], side, tuple(item.idxs), tuple(item.root_idxs)))
    return merged(slots)


def _unit(producers: Sequence[str], unet: UNet) -> int:
    """Channels of a head where heads go whole."""
    if not whole_heads(unet):
        return 1
    for producer in producers:
        name, _, projection = producer.rpartition(".")
        if projection in ("to_q", "to_k", "to_v"):
            attention: Any = unet.get_submodule(name)
            return attention.to_q.out_features // attention.heads
    return 1
