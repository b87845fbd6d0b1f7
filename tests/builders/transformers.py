"""Tiny real transformers of every family."""

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from torch.utils._pytree import tree_map

from compress.common.cost import sample_size, unet_inputs

SIZES = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4}
LATENTS = {"in_channels": 4, "out_channels": 4, "sample_size": 8}
TEXTS = {"joint_attention_dim": 12, "pooled_projection_dim": 12}
FAMILIES = {
    "dit": lambda **sizes: DiTTransformer2DModel(
        **SIZES | LATENTS | sizes, num_embeds_ada_norm=1000, activation_fn="geglu"
    ),
    "pixart": lambda **sizes: PixArtTransformer2DModel(
        **SIZES | LATENTS | sizes, caption_channels=12, cross_attention_dim=16
    ),
    "sd3": lambda **sizes: SD3Transformer2DModel(
        **SIZES | LATENTS | TEXTS | sizes,
        caption_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ),
    "flux": lambda **sizes: FluxTransformer2DModel(
        **SIZES | TEXTS | sizes, num_single_layers=4, in_channels=4, axes_dims_rope=(2, 2, 4)
    ),
}


def build(name: str) -> torch.nn.Module:
    """A seeded transformer, its vectors far from 0 and 1, so that what is removed could leak."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Two noisy samples, their timesteps, and the other inputs."""
    torch.manual_seed(1)
    named = {
        key: tree_map(lambda t: torch.randn(t.shape) if t.is_floating_point() else t, value)
        for key, value in unet_inputs(model, 2, "cpu").items()
    }
    del named["timestep"]
    sample = named.pop("hidden_states")
    if "img_ids" in named:  # of Flux we give latents, four for a token
        sample = torch.randn(2, sample.shape[-1] // 4, *sample_size(model))
    return sample, torch.tensor([7, 30]), named
