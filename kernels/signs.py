"""Score cached tokens by one bit for each number of their keys, for each key head.

A token's key is known as the mean of its group plus, number by number, the sign of what is left
times a scale of the key head: ``k ~ m_g + a * sign``. Its score is the logarithm of what that would
weigh, summed over the head's queries: ``s = log sum_h exp(scaling q_h.(m_g + a * sign))``. So a
token costs ``dim / 8`` bytes and the number of its group, instead of its key and value.

On the GPU one program scores a tile of tokens of one key head.
"""

from __future__ import annotations  # Triton may be missing, and tl.constexpr with it

from functools import lru_cache

import torch

from compress.kernels.backend import Launch, jit, tl
from compress.kernels.sparse_decode import LOG2_E, block, packed

TILE = 64  # tokens of a program
WARPS = 4


@jit(do_not_specialize=("visual", "groups"))
def _signs_kernel(  # type: ignore[no-untyped-def]
    query_ptr,  # (batch, kv_heads, group, dim), times the scales of the signs
    logits_ptr,  # (batch, kv_heads, group, groups) float32, of the means
    member_ptr,  # (batch, kv_heads, visual), group of each token
    codes_ptr,  # (batch, kv_heads, visual, bytes) uint8
    scores_ptr,  # (batch, kv_heads, visual) float32, written
    scale,  # of the products, for base 2
    visual,
    groups,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = n < visual
    h = tl.arange(0, BLOCK_GROUP)
    d = tl.arange(0, BLOCK_DIM)
    query = tl.load(
        query_ptr + (head * GROUP + h)[:, None] * DIM + d[None, :],
        mask=(h < GROUP)[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    code = tl.load(
        codes_ptr + (head * visual + n)[:, None] * BYTES + (d // 8)[None, :],
        mask=there[:, None] & (d < DIM)[None, :],
        other=0,
    )
    bit = (code.to(tl.int32) >> (d % 8)[None, :]) & 1
    signs = (2 * bit - 1).to(query.dtype)
    member = tl.load(member_ptr + head * visual + n, mask=there, other=0).to(tl.int32)
    means = tl.load(
        logits_ptr + (head * GROUP + h)[:, None] * groups + member[None, :],
        mask=(h < GROUP)[:, None] & there[None, :],
        other=-float("inf"),
    )
    logits = (tl.dot(query, tl.trans(signs), input_precision="ieee") + means) * scale
    logits = tl.where((h < GROUP)[:, None] & there[None, :], logits, -1e30)
    top = tl.max(logits, 0)
    score = top + tl.log2(tl.sum(tl.exp2(logits - top[None, :]), 0))
    tl.store(scores_ptr + head * visual + n, score / 1.4426950408889634, mask=there)


def sign_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    member: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Score the tokens for one query of each sequence, on the GPU.

    Parameters
    ----------
    query : of the new token, ``(batch, heads, 1, dim)``, any strides.
    keys : means of the groups, ``(batch, kv_heads, groups, dim)``, in the query's dtype.
    member : group of each token, ``(batch, kv_heads, visual)``, of any integer type.
    codes : of :func:`pack`, ``(batch, kv_heads, visual, ceil(dim / 8))``.
    scales : of the signs, ``(batch, kv_heads, dim)``, in the query's dtype.
    scaling : of the products.

    Returns
    -------
    ``(batch, kv_heads, visual)`` in float32.
    """
    scaled, logits = _products(query, keys, scales)
    parts = [part.contiguous() for part in (scaled, logits, member, codes)]
    scores = torch.empty_like(parts[2], dtype=torch.float32)
    launch = _launch(
        query.device, query.dtype, member.dtype, scaled.shape, codes.shape, keys.shape[2], scaling
    )
    launch(*parts, scores)
    return scores


@lru_cache(maxsize=256)
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    of_members: torch.dtype,
    queries: tuple[int, int, int, int],
    codes: tuple[int, int, int, int],
    groups: int,
    scaling: float,
) -> Launch:
    """Of calls on a device with queries by key head and codes of these shapes."""
    batch, kv_heads, group, dim = queries
    visual, size = codes[2:]
    return Launch(
        _signs_kernel,
        (batch * kv_heads, -(-visual // TILE), 1),
        (scaling * LOG2_E, visual, groups),
        {
            "GROUP": group,
            "DIM": dim,
            "BYTES": size,
            "BLOCK_GROUP": block(group),
            "BLOCK_DIM": block(dim),
            "BLOCK": TILE,
            "num_warps": WARPS,
        },
    )


def sign_scores_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    member: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """:func:`sign_scores` in plain torch, on any device: same arguments, same result."""
    scaled, means = _products(query, keys, scales)
    means = means.gather(3, member.long()[:, :, None].expand(-1, -1, means.shape[2], -1))
    bits = codes[..., None] >> torch.arange(8, dtype=torch.uint8, device=codes.device) & 1
    signs = bits.flatten(3)[..., : query.shape[3]].to(query.dtype) * 2 - 1
    logits = means + (scaled @ signs.transpose(2, 3)).float()
    return (logits * scaling).logsumexp(2)


def _products(
    query: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The query times the scales, and its products with the means in float32, by key head."""
    grouped = packed(query, keys.shape[1])
    return grouped * scales[:, :, None], (grouped @ keys.transpose(2, 3)).float()


def pack(positive: torch.Tensor) -> torch.Tensor:
    """Eight flags of the last axis as one byte, the first the lowest bit, uint8."""
    flags = torch.nn.functional.pad(positive.to(torch.uint8), (0, -positive.shape[-1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=positive.device)
    return (flags.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
