"""Sizes of published text models, and dense attention of one token: what benchmarks share."""

from typing import Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

ModelName = Literal["qwen2.5-vl-3b", "qwen2.5-vl-7b", "tiny"]
# text_config of Qwen/Qwen2.5-VL-{3B,7B}-Instruct; "tiny" is for trying the command
MODELS: dict[ModelName, dict[str, int]] = {
    "qwen2.5-vl-3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "qwen2.5-vl-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
}


def head_sizes(model: ModelName) -> tuple[int, int, int]:
    """Query heads, key heads, and the size of one."""
    sizes = MODELS[model]
    heads = sizes["num_attention_heads"]
    return heads, sizes["num_key_value_heads"], sizes["hidden_size"] // heads


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Dense attention by torch's own function; shapes as in :func:`two_products`."""
    return scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)


def two_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Dense attention of one token with the query heads of a key head side by side.

    Parameters
    ----------
    query : ``(batch, heads, 1, dim)``.
    key, value : ``(batch, kv_heads, length, dim)``.
    scaling : of the dot products.

    Returns
    -------
    ``(batch, heads, 1, dim)``.
    """
    packed = query.reshape(len(query), key.shape[1], -1, query.shape[3])
    weights = ((packed @ key.transpose(2, 3)).float() * scaling).softmax(-1)
    return (weights.to(value.dtype) @ value).reshape(*query.shape[:3], -1)
