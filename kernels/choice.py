"""Open the best groups of cached tokens: the rows that one query reads, for each key head.

A group has the mean of its tokens' keys, key head by key head. Its score is the logarithm of what
its mean would weigh, summed over the head's queries: ``s_g = log sum_h exp(scaling q_h.m_g)``. The
groups are opened from the best one on until the budget is spent; of the group that does not fit,
the first tokens are, so that every head reads as many. What is left of a group is read as its mean,
which stands for ``n_g - opened_g`` tokens: the logarithm of that number is to be added to its
logit, -inf for none.

On the GPU one program chooses for one key head. It sorts nothing: a group begins in the list where
those before it end, ``start_g = sum_j n_j [j before g]``.
"""

from __future__ import annotations  # Triton may be missing, and tl.constexpr with it

from functools import lru_cache

import torch

from compress.kernels.backend import Launch, jit, tl
from compress.kernels.sparse_decode import LOG2_E, block, packed

TILE = 32  # groups whose scores are computed together
SLOTS = 16  # rows of each group that are listed together
WARPS = 4


@jit(do_not_specialize=("width", "visual", "groups"))
def _choice_kernel(  # type: ignore[no-untyped-def]
    query_ptr,  # (batch, heads, dim)
    keys_ptr,  # (batch, kv_heads, groups, dim), means
    sizes_ptr,  # (batch, kv_heads, groups) int32
    first_ptr,  # as the sizes: where each group begins in the order
    order_ptr,  # (batch, kv_heads, visual) int32, rows of the cache, group by group
    budgets_ptr,  # (batch,) int32
    scores_ptr,  # (batch, kv_heads, groups) float32, written first
    rows_ptr,  # (batch, kv_heads, width) int32
    bias_ptr,  # as the scores
    scale,  # of the products, for base 2
    width,
    visual,
    groups,
    kv_heads,
    query_batch,  # from here on strides
    query_head,
    query_dim,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_TILE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    batch = head // kv_heads
    member = tl.arange(0, BLOCK_GROUP)
    d = tl.arange(0, BLOCK_DIM)
    query_ptr += batch * query_batch + head % kv_heads * GROUP * query_head
    query = tl.load(
        query_ptr + member[:, None] * query_head + d[None, :] * query_dim,
        mask=(member < GROUP)[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    for begin in range(0, groups, BLOCK_TILE):
        g = begin + tl.arange(0, BLOCK_TILE)
        key = tl.load(
            keys_ptr + (head * groups + g)[:, None] * DIM + d[None, :],
            mask=(g < groups)[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logits = tl.where((member < GROUP)[:, None], logits, -float("inf"))
        top = tl.max(logits, 0)
        score = top + tl.log2(tl.sum(tl.exp2(logits - top[None, :]), 0))
        # what is no number would leave places of the list empty
        score = tl.where(score == score, score, -float("inf"))
        tl.store(scores_ptr + head * groups + g, score, mask=g < groups)
    tl.debug_barrier()
    g = tl.arange(0, BLOCK_GROUPS)
    place = head * groups + g
    score = tl.load(scores_ptr + place, mask=g < groups, other=-float("inf"))
    size = tl.load(sizes_ptr + place, mask=g < groups, other=0)
    start = tl.zeros([BLOCK_GROUPS], tl.int32)
    for begin in range(0, groups, BLOCK_TILE):
        j = begin + tl.arange(0, BLOCK_TILE)
        other = tl.load(scores_ptr + head * groups + j, mask=j < groups, other=-float("inf"))
        others = tl.load(sizes_ptr + head * groups + j, mask=j < groups, other=0)
        tied = (other[None, :] == score[:, None]) & (j[None, :] < g[:, None])
        before = (other[None, :] > score[:, None]) | tied
        start += tl.sum(tl.where(before, others[None, :], 0), 1)
    opened = tl.minimum(tl.maximum(tl.load(budgets_ptr + batch) - start, 0), size)
    left = size - opened
    bias = tl.where(left > 0, tl.log(tl.maximum(left, 1).to(tl.float32)), -float("inf"))
    tl.store(bias_ptr + place, bias, mask=g < groups)
    first = tl.load(first_ptr + place, mask=g < groups, other=0)
    for begin in range(0, tl.max(opened, 0), BLOCK_SLOTS):
        n = begin + tl.arange(0, BLOCK_SLOTS)
        used = n[None, :] < opened[:, None]
        row = tl.load(order_ptr + head * visual + first[:, None] + n[None, :], mask=used, other=0)
        tl.store(rows_ptr + head * width + start[:, None] + n[None, :], row, mask=used)


def choose_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    sizes: torch.Tensor,
    first: torch.Tensor,
    order: torch.Tensor,
    budgets: torch.Tensor,
    width: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Open groups for one query of each sequence, on the GPU.

    Parameters
    ----------
    query : of the new token, ``(batch, heads, 1, dim)``, any strides.
    keys : means of the groups, ``(batch, kv_heads, groups, dim)``, in the query's dtype.
    sizes, first : how many tokens each group has and where they begin in the order, int32,
        ``(batch, kv_heads, groups)``.
    order : rows of the cache, group by group, ``(batch, kv_heads, visual)``, int32.
    budgets : rows to open for every key head, at most the tokens of all groups, ``(batch,)``,
        int32.
    width : the largest of them.
    scaling : of the products.

    Returns
    -------
    The opened rows, best group first, ``(batch, kv_heads, width)``, int32, any where a sequence has
    a smaller budget; and the logarithm of how many tokens of each group are left,
    ``(batch, kv_heads, groups)`` in float32, -inf for none.
    """
    parts = [part.contiguous() for part in (keys, sizes, first, order, budgets)]
    batch, kv_heads, groups = sizes.shape
    rows = order.new_empty_strided((batch, kv_heads, width), (kv_heads * width, width, 1))
    scores, bias = [torch.empty_like(parts[1], dtype=torch.float32) for _ in range(2)]
    launch = _launch(
        *(query.device, query.dtype, query.shape, query.stride()),
        *(kv_heads, groups, order.shape[2], width, scaling),
    )
    launch(query, *parts, scores, rows, bias)
    return rows, bias


@lru_cache(maxsize=256)
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int, int],
    kv_heads: int,
    groups: int,
    visual: int,
    width: int,
    scaling: float,
) -> Launch:
    """Of calls on a device with a query of this kind, and so many key heads and groups."""
    batch, heads, _, dim = shape
    return Launch(
        _choice_kernel,
        (batch * kv_heads, 1, 1),
        (
            *(scaling * LOG2_E, width, visual, groups, kv_heads),
            *(strides[axis] for axis in (0, 1, 3)),
        ),
        {
            "GROUP": heads // kv_heads,
            "DIM": dim,
            "BLOCK_GROUP": block(heads // kv_heads),
            "BLOCK_DIM": block(dim),
            "BLOCK_GROUPS": block(groups),
            "BLOCK_TILE": TILE,
            "BLOCK_SLOTS": SLOTS,
            "num_warps": WARPS,
        },
    )


def choose_rows_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    sizes: torch.Tensor,
    first: torch.Tensor,
    order: torch.Tensor,
    budgets: torch.Tensor,
    width: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`choose_rows` in plain torch, on any device: same arguments, same result."""
    logits = (packed(query, keys.shape[1]) @ keys.transpose(2, 3)).float() * scaling
    best = logits.logsumexp(2).argsort(dim=2, descending=True, stable=True)
    ends = sizes.gather(2, best).cumsum(2)
    starts = ends - sizes.gather(2, best)
    slots = torch.arange(width, device=query.device).expand(*sizes.shape[:2], -1).contiguous()
    place = torch.searchsorted(ends, slots, right=True).clamp(max=sizes.shape[2] - 1)
    within = slots - starts.gather(2, place)
    token = first.gather(2, best.gather(2, place)) + within
    rows = order.gather(2, token.clamp(max=order.shape[2] - 1))
    opened = (budgets[:, None, None] - starts).clamp(min=0).minimum(sizes.gather(2, best))
    left = sizes - torch.zeros_like(opened).scatter(2, best, opened)
    return rows, left.log()
