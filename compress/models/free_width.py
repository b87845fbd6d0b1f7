"""A UNet2DModel whose inner widths differ from layer to layer.

diffusers' own class has one width per level. Here each resnet's hidden width (between its two
convolutions), each attention's inner width (its heads) and the width of the timestep sinusoid are
entries of the configuration.

Checkpoints carry a copy of this file, for those who have diffusers but not this package: it imports
nothing else.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import ModelMixin, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

# diffusers asks the module of a class that is not its own for the base by which to load it
__all__ = ["FreeWidthUNet2DModel", "ModelMixin", "inner_width"]


class FreeWidthUNet2DModel(UNet2DModel):
    """A UNet2DModel with inner widths of its own.

    ``DDPMPipeline.from_pretrained(folder, trust_remote_code=True)`` loads an exported pipeline that
    has one, by the copy of this module in its folder; :func:`compress.load` needs no such copy.

    Parameters
    ----------
    inner_widths : by the name of a resnet or attention module, such as
        ``down_blocks.0.resnets.1``; modules that are not named have the width of their level.
    sinusoid_width : values of the timestep sinusoid; None is the width of the first level.
    plain : the parameters of UNet2DModel.

    Raises
    ------
    ValueError : for a module that has no inner width, or a width that norm groups or heads do not
        divide.
    """

    def __init__(
        self,
        inner_widths: Mapping[str, int] | None = None,
        sinusoid_width: int | None = None,
        **plain: Any,
    ) -> None:
        super().__init__(**plain)
        widths = dict(inner_widths or {})
        self.register_to_config(inner_widths=widths, sinusoid_width=sinusoid_width)
        if sinusoid_width is not None:
            _set_sinusoid_width(self, sinusoid_width)
        modules = dict(self.named_modules())
        for name, width in widths.items():
            module = modules.get(name)
            if isinstance(module, ResnetBlock2D):
                _set_hidden_width(name, module, width)
            elif isinstance(module, Attention):
                _set_attention_width(name, module, width, plain.get("attention_head_dim", 8))
            else:
                raise ValueError(
                    f"inner_widths should name resnets and attentions of the model; got {name!r}; "
                    "remove it"
                )

    @staticmethod
    def _get_init_keys(input_class: Any) -> set[str]:
        # what diffusers reads from a stored configuration: it asks signatures, and `**plain` in
        # ours stands for those of the plain class
        keys = set(inspect.signature(input_class.__init__).parameters)
        return keys - {"plain"} | set(inspect.signature(UNet2DModel.__init__).parameters)


def inner_width(module: nn.Module) -> int:
    """The inner width of a resnet or attention module."""
    if isinstance(module, ResnetBlock2D):
        return module.conv1.out_channels
    if isinstance(module, Attention):
        return module.to_q.out_features
    raise ValueError(f"a resnet or an attention has an inner width; got {type(module).__name__}")


def _set_sinusoid_width(unet: UNet2DModel, width: int) -> None:
    old = unet.time_proj
    unet.time_proj = Timesteps(width, old.flip_sin_to_cos, old.downscale_freq_shift)
    labelled = unet.config.class_embed_type == "timestep"
    for reader in (unet.time_embedding, *([unet.class_embedding] if labelled else [])):
        reader.linear_1 = nn.Linear(width, reader.linear_1.out_features)


def _set_hidden_width(name: str, resnet: ResnetBlock2D, width: int) -> None:
    norm, first, second = resnet.norm2, resnet.conv1, resnet.conv2
    _check(name, width, norm.num_groups, "the norm's groups")
    resnet.conv1 = nn.Conv2d(first.in_channels, width, 3, first.stride, first.padding)
    resnet.norm2 = nn.GroupNorm(norm.num_groups, width, norm.eps)
    resnet.conv2 = nn.Conv2d(width, second.out_channels, 3, second.stride, second.padding)
    if resnet.time_emb_proj is not None:
        # with scale and shift there are two values a channel
        values = resnet.time_emb_proj.out_features // first.out_channels
        resnet.time_emb_proj = nn.Linear(resnet.time_emb_proj.in_features, values * width)


def _set_attention_width(name: str, attention: Attention, width: int, head: int | None) -> None:
    _check(name, width, head or 1, "the head's size")
    for key in ("to_q", "to_k", "to_v"):
        old = getattr(attention, key)
        setattr(attention, key, nn.Linear(old.in_features, width, bias=old.bias is not None))
    out = attention.to_out[0]
    attention.to_out[0] = nn.Linear(width, out.out_features, bias=out.bias is not None)
    attention.heads = width // head if head else 1
    attention.sliceable_head_dim = attention.heads
    attention.inner_dim = attention.inner_kv_dim = width


def _check(name: str, width: int, part: int, what: str) -> None:
    if width < part or width % part:
        raise ValueError(
            f"the inner width of {name} should be a multiple of {what}, {part}; got {width}; "
            "change inner_widths"
        )
