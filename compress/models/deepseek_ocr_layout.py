"""The layout of DeepSeek-OCR's checkpoint and that of transformers: settings and tensor names.

`deepseek-ai/DeepSeek-OCR` (arXiv 2510.18234) ships code for transformers 4.46. Transformers 5 has
the same network as ``UnlimitedOcrForConditionalGeneration``, whose decoder slides a window over
what it has written; with full attention in every layer it computes DeepSeek-OCR. Sizes are read
from ``config.json``; those that the checkpoint's code fixes (patch, window, ...) may stand beside
them, which is how a small model is stored.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    DeepseekOcr2Config,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
)
from transformers.core_model_loading import revert_weight_conversion

ARCHITECTURE = "DeepseekOCRForCausalLM"
ARCHITECTURE_2 = "DeepseekOCR2ForCausalLM"
SAM, CLIP, QWEN = "sam_vit_b", "clip-l-14-224", "qwen2-0-5b"

# config.json -> transformers; a name that is absent from config.json has the value of the original
TEXT: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 1280,
    "intermediate_size": 6848,
    "moe_intermediate_size": 896,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rms_norm_eps": 1e-6,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
}
SAM_SIZES = {
    "width": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "global_attn_indexes": ("global_attn_indexes", [2, 5, 8, 11]),
    "downsample_channels": ("downsample_channels", [512, 1024]),
}
SAM_FIXED = {"patch_size": 16, "window_size": 14, "output_channels": 256, "mlp_dim": 3072}
CLIP_SIZES = {
    "width": ("hidden_size", 1024),
    "layers": ("num_hidden_layers", 24),
    "heads": ("num_attention_heads", 16),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
}
CLIP_FIXED = {"intermediate_size": 4096}
QWEN_SIZES = {"dim": ("hidden_size", 896)}
QWEN_FIXED = {
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
}
# what the native classes compute, and therefore all that config.json may say
REQUIRED = {
    "use_mla": False,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "rope_scaling": None,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "tile_tag": "2D",
}


# ---- configuration ---------------------------------------------------------------------------


def native_config(original: Mapping[str, Any]) -> UnlimitedOcrConfig:
    """Translate the checkpoint's ``config.json``."""
    sizes, dense, tied = text_settings(original)
    layers = ["full_attention"] * sizes["num_hidden_layers"]
    sam, width = _sam_settings(original, SAM_SIZES)
    encoder = _sizes(width.get(CLIP, {}), CLIP_SIZES, CLIP_FIXED)
    return UnlimitedOcrConfig(
        text_config={**sizes, "first_k_dense_replace": dense, "layer_types": layers},
        vision_config={"sam_config": sam, "encoder_config": encoder},
        tie_word_embeddings=tied,
    )


def native_config_2(original: Mapping[str, Any]) -> DeepseekOcr2Config:
    """Translate the ``config.json`` of `deepseek-ai/DeepSeek-OCR-2` (arXiv 2601.20552).

    Its tensor names are known to transformers.
    """
    sizes, dense, tied = text_settings(original)
    layers = ["dense"] * dense + ["sparse"] * (sizes["num_hidden_layers"] - dense)
    channels = {"downsample_channels": ("downsample_channels", [512, 896])}
    sam, width = _sam_settings(original, SAM_SIZES | channels)
    encoder = {
        "vocab_size": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        **_sizes(width.get(QWEN, {}), QWEN_SIZES, QWEN_FIXED),
    }
    return DeepseekOcr2Config(
        text_config={**sizes, "mlp_layer_types": layers},
        vision_config={"sam_config": sam, "encoder_config": encoder},
        tie_word_embeddings=tied,
    )


def _sam_settings(
    original: Mapping[str, Any], sizes: Mapping[str, tuple[str, Any]]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The settings of SAM, and the sizes of all vision encoders by their names."""
    vision = original.get("vision_config", {})
    width = vision.get("width", {})
    image_size = {"image_size": vision.get("image_size", 1024)}
    return image_size | _sizes(width.get(SAM, {}), sizes, SAM_FIXED), width


def text_settings(original: Mapping[str, Any]) -> tuple[dict[str, Any], int, bool]:
    """The text model's settings, its dense layers, and whether its embeddings are tied.

    Raises
    ------
    ValueError : listing every setting that the native classes do not compute.
    """
    # the checkpoint's code reads the top level; `language_config` says the same once more
    text = {**original.get("language_config", {}), **original}
    wrong = [
        f"{name} should be {value!r} but is {text[name]!r}"
        for name, value in REQUIRED.items()
        if text.get(name, value) != value
    ]
    kind = original.get("projector_config", {}).get("projector_type", "linear")
    if kind != "linear":
        wrong.append(f"projector_config.projector_type should be 'linear' but is {kind!r}")
    if wrong:
        raise ValueError(
            f"this config.json is not one of DeepSeek-OCR: {'; '.join(wrong)}; convert the model"
        )
    sizes = {name: text.get(name, value) for name, value in TEXT.items()}
    tied = sizes.pop("tie_word_embeddings")
    sizes["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": text.get("rope_theta", 10000.0),
    }
    return sizes, text.get("first_k_dense_replace", 1), tied


def _sizes(
    width: Mapping[str, Any], named: Mapping[str, tuple[str, Any]], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    sizes = {ours: width.get(theirs, value) for theirs, (ours, value) in named.items()}
    return {**sizes, **{name: width.get(name, value) for name, value in fixed.items()}}


def original_config(config: UnlimitedOcrConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What the checkpoint's ``config.json`` says of a model with full attention.

    Raises
    ------
    ValueError : when a layer of the decoder slides a window: that is Unlimited-OCR.
    """
    text, vision = config.text_config, config.vision_config
    if set(text.layer_types) != {"full_attention"}:
        raise ValueError(
            "DeepSeek-OCR has full attention in every layer; layer_types are "
            f"{sorted(set(text.layer_types))}; save Unlimited-OCR with save_pretrained"
        )
    language = {name: getattr(text, name) for name in TEXT if name != "tie_word_embeddings"} | {
        "first_k_dense_replace": text.mlp_layer_types.count("dense"),
        "kv_lora_rank": None,
        "lm_head": True,
        "q_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "rm_head": False,
        "use_mla": False,
        "v_head_dim": 0,
    }
    return {
        "_name_or_path": "deepseek-ai/DeepSeek-OCR",
        "candidate_resolutions": [[1024, 1024]],
        "global_view_pos": "head",
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": "modeling_deepseekocr.DeepseekOCRConfig",
            "AutoModel": f"modeling_deepseekocr.{ARCHITECTURE}",
        },
        "language_config": {
            "architectures": ["DeepseekV2ForCausalLM"],
            "torch_dtype": str(dtype).removeprefix("torch."),
            **language,
        },
        "model_type": "deepseek_vl_v2",
        "projector_config": {
            "input_dim": vision.sam_config.downsample_channels[-1]
            + vision.encoder_config.hidden_size,
            "model_type": "mlp_projector",
            "n_embed": text.hidden_size,
            "projector_type": "linear",
        },
        "tile_tag": "2D",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.46.3",
        "vision_config": {
            "image_size": vision.sam_config.image_size,
            "mlp_ratio": 3.7362,
            "model_name": "deeplip_b_l",
            "model_type": "vision",
            "width": {
                CLIP: _width(vision.encoder_config, CLIP_SIZES, CLIP_FIXED),
                SAM: _width(vision.sam_config, SAM_SIZES, SAM_FIXED),
            },
        },
        **language,
        "rope_theta": text.rope_parameters["rope_theta"],
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _width(
    config: Any, named: Mapping[str, tuple[str, Any]], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    sizes = {theirs: getattr(config, ours) for theirs, (ours, _) in named.items()}
    unusual = {
        name: getattr(config, name) for name in fixed if getattr(config, name) != fixed[name]
    }
    return {**sizes, **unusual}


# ---- weights ---------------------------------------------------------------------------------


def original_weights(model: UnlimitedOcrForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The tensors of a network under the checkpoint's names.

    Experts are split, the encoder's query, key and value joined.
    """
    weights = revert_weight_conversion(model, model.state_dict())
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}


def unused_weights(config: UnlimitedOcrConfig) -> dict[str, torch.Tensor]:
    """What the checkpoint stores beside: CLIP's patches, which SAM's features replace, and ids."""
    clip = config.vision_config.encoder_config
    positions = (clip.image_size // clip.patch_size) ** 2 + 1
    embeddings = "model.vision_model.embeddings."
    return {
        f"{embeddings}patch_embedding.weight": torch.zeros(
            clip.hidden_size, clip.num_channels, clip.patch_size, clip.patch_size
        ),
        f"{embeddings}position_ids": torch.arange(positions)[None],
    }


def weight_shapes(config: UnlimitedOcrConfig) -> dict[str, tuple[int, ...]]:
    """Name, in the checkpoint, and shape of the tensors that the network computes with."""
    with torch.device("meta"):
        weights = original_weights(UnlimitedOcrForConditionalGeneration(config))
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}
