"""Tiny real UNets and what the gradflow tests do with them."""

from collections.abc import Iterator
from functools import cache

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from torch import nn

from compress.data.batches import Batch, noise_and_timesteps
from compress.methods.gradflow import sinusoid
from compress.methods.gradflow.groups import ChannelGroup, UNet
from compress.methods.gradflow.layout import Layout, build_layout
from compress.methods.gradflow.unets import find_groups
from compress.models.builtin.train_ddpm_digits import build_unet

TWO_LEVELS = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
THREE_LEVELS = TWO_LEVELS | {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
CONFIGS = {
    "plain": TWO_LEVELS,
    "no_attention": TWO_LEVELS
    | {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
    },
    "no_middle": TWO_LEVELS | {"mid_block_type": None},
    "resnets": TWO_LEVELS
    | {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": None,
    },
    "smallest": TWO_LEVELS
    | {
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    },
    "one_level": TWO_LEVELS
    | {
        "block_out_channels": (8,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
        "mid_block_type": None,
    },
    "one_head": TWO_LEVELS
    | {"attention_head_dim": None, "freq_shift": 1, "flip_sin_to_cos": False},
    "scale_shift": TWO_LEVELS | {"resnet_time_scale_shift": "scale_shift"},
    "odd_norm_groups": TWO_LEVELS
    | {"block_out_channels": (12, 24), "norm_num_groups": 3, "attention_head_dim": 3},
    "deeper": THREE_LEVELS | {"layers_per_block": 2, "in_channels": 3, "out_channels": 3},
    "tied": THREE_LEVELS | {"block_out_channels": (8, 16, 16), "downsample_padding": 0},
    "not_square": TWO_LEVELS | {"sample_size": (8, 16), "freq_shift": 1},
    "scaled": TWO_LEVELS
    | {"mid_block_scale_factor": 2.0, "act_fn": "gelu", "center_input_sample": True},
    "middle_norm": TWO_LEVELS | {"attn_norm_num_groups": 8},
}
SD = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
TWO_SD = SD | {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# shapes of UNet2DConditionModel, with slim widths for each
CONDITION_CONFIGS = {
    "sd1": (SD, (8, 24, 24)),
    "sd2": (
        SD
        | {"attention_head_dim": (2, 4, 4), "use_linear_projection": True, "layers_per_block": 2},
        (8, 24, 24),
    ),
    "sdxl": (
        SD
        | {
            "block_out_channels": (16, 32, 64),
            "attention_head_dim": (2, 4, 8),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 58,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
        (8, 24, 48),
    ),
    "ldm": (TWO_SD | {"in_channels": 3, "out_channels": 3, "freq_shift": 1}, (12, 16)),
    "labels": (TWO_SD | {"num_class_embeds": 5}, (8, 16)),
    "timestep_labels": (TWO_SD | {"class_embed_type": "timestep"}, (8, 16)),
    "identity_labels": (TWO_SD | {"class_embed_type": "identity"}, (8, 16)),
    "projected_labels": (
        TWO_SD | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 10},
        (8, 16),
    ),
    "scale_shift": (TWO_SD | {"resnet_time_scale_shift": "scale_shift"}, (8, 16)),
    "only_cross": (TWO_SD | {"only_cross_attention": True}, (8, 24)),
    "plain_middle": (TWO_SD | {"mid_block_type": "UNetMidBlock2D"}, (8, 24)),
    "no_middle": (TWO_SD | {"mid_block_type": None}, (8, 24)),
}
CIFAR = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
}


def build(name: str = "plain", **changes) -> UNet2DModel:
    """A seeded UNet; vectors are far from 0 and 1, so removed channels have something to leak."""
    torch.manual_seed(1)
    if name == "built_in":
        unet = build_unet(dropout=0.0)
    else:
        configs = CONFIGS | {"cifar": CIFAR}
        unet = UNet2DModel(**(configs[name] | changes))
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return unet.eval()


def build_condition(name: str, **changes) -> UNet2DConditionModel:
    """A seeded UNet2DConditionModel, its vectors far from 0 and 1 too."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(**(CONDITION_CONFIGS[name][0] | changes))
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return unet.eval()


@cache
def groups(name: str) -> tuple[ChannelGroup, ...]:
    """Groups are found once for each name: they depend on the architecture alone."""
    return find_groups(build(name))


@cache
def _layout(name: str, *widths: int) -> Layout:
    return build_layout(build(name), groups(name), widths)


def layout(name: str, widths) -> Layout:
    """Of a seeded UNet; nobody may change it."""
    return _layout(name, *widths)


def inputs(unet: UNet2DModel, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(2)
    shape = (batch, unet.config.in_channels, height, width)
    return torch.randn(shape, generator=generator), torch.tensor([3, 700, 250, 999][:batch])


def narrowed(unet: UNet, layout: Layout, timesteps: int = 1000) -> UNet:
    """The model with the sinusoid of the slim one, where pruning starts."""
    return sinusoid.narrowed(unet, layout.widths[0], timesteps)


def binary_mask(layout: Layout, seed: int = 0) -> torch.Tensor:
    """A random mask that keeps every block's number of units."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(layout.units)
    for block, count in enumerate(layout.keep_counts.tolist()):
        units = (layout.block == block).nonzero().squeeze(1)
        mask[units[torch.randperm(len(units), generator=generator)[:count]]] = 1
    return mask


def soft_mask(layout: Layout, seed: int = 0) -> torch.Tensor:
    """A random mask with values in [0.2, 1]."""
    return 0.2 + 0.8 * torch.rand(layout.units, generator=torch.Generator().manual_seed(seed))


def batches(unet: UNet2DModel, count: int = 2, size: int = 4) -> list[Batch]:
    """Smooth random images with noise and timesteps."""
    shape = inputs(unet)[0].shape[1:]
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(size, shape[0], 1, 1, generator=generator) * 2 - 1 for _ in range(count)]
    return [
        noise_and_timesteps(image.expand(size, *shape).clone(), 1000, seed=4, step=k)
        for k, image in enumerate(images)
    ]


def in_double(batches: list[Batch]) -> list[Batch]:
    return [Batch(b.images.double(), b.noise.double(), b.timesteps) for b in batches]


def scheduler(**changes) -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, **changes)


def same_layers(unet: UNet2DModel, widths) -> bool:
    """Whether diffusers builds the same layers at these widths (shortcuts come and go)."""
    with torch.device("meta"):
        config = dict(unet.config) | {"block_out_channels": tuple(widths)}
        slim = UNet2DModel.from_config(config)
    return list(slim.state_dict()) == list(unet.state_dict())


def slices(unet: nn.Module, group: ChannelGroup, unit: int) -> Iterator[tuple[str, str, tuple]]:
    """Where one unit's weights lie: (parameter name, side, index), slot by slot."""
    channels = range(unit * group.unit, (unit + 1) * group.unit)
    for slot in group.slots:
        module = unet.get_submodule(slot.module)
        for position, channel in zip(slot.positions, slot.channels, strict=True):
            if channel not in channels:
                continue
            if slot.side == "in":
                yield f"{slot.module}.weight", "in", (slice(None), position)
            else:
                yield f"{slot.module}.weight", slot.side, (position,)
                if module.bias is not None:
                    yield f"{slot.module}.bias", slot.side, (position,)
