"""Means of groups of cached tokens without those of a fixation, as rows beside the cache.

A group has the sum of its tokens' keys, that of their values, and their number, per key head. In
every step the tokens of the fixation are taken out: ``m_g = (S_g - sum_F k_i) / (n_g - |F_g|)``,
with ``log(n_g - |F_g|)`` to be added to the logits, so that a mean stands for its tokens. One
program computes some groups of one key head: it goes through the fixation once, and sums by a
product with the zeros and ones that say which token is in which group.
"""

from __future__ import annotations  # Triton may be missing, and tl.constexpr with it

from functools import lru_cache

import torch

from compress.kernels import sparse_decode
from compress.kernels.backend import Launch, jit, tl

GROUPS = 16  # of a program
ROWS = 32  # of a tile
WARPS = 4


@jit(do_not_specialize=("kept", "visual", "groups"))
def _summaries_kernel(  # type: ignore[no-untyped-def]
    key_ptr,  # (batch, kv_heads, length, dim)
    value_ptr,  # (batch, kv_heads, length, value_dim)
    rows_ptr,  # (batch, picked), the fixation's first
    index_ptr,  # (batch, kept) int64, of the visual tokens
    valid_ptr,  # (batch, kept) bool; None is all
    member_ptr,  # (batch, kv_heads, visual) int64
    key_sums_ptr,  # (batch, kv_heads, groups, dim) float32
    value_sums_ptr,  # (batch, kv_heads, groups, value_dim) float32
    sizes_ptr,  # (batch, kv_heads, groups) float32
    keys_ptr,  # means, as the sums
    values_ptr,
    bias_ptr,  # as the sizes, float32
    kept,
    visual,
    groups,
    kv_heads,
    key_batch,  # from here on strides
    key_head,
    key_row,
    key_dim,
    value_batch,
    value_head,
    value_row,
    value_dim,
    rows_batch,
    index_batch,
    valid_batch,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    batch = head // kv_heads
    kv_head = head % kv_heads
    g = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    d = tl.arange(0, BLOCK_DIM)
    e = tl.arange(0, BLOCK_VALUE)
    key_ptr += batch * key_batch + kv_head * key_head
    value_ptr += batch * value_batch + kv_head * value_head
    keys = tl.zeros([BLOCK_GROUPS, BLOCK_DIM], tl.float32)
    values = tl.zeros([BLOCK_GROUPS, BLOCK_VALUE], tl.float32)
    taken = tl.zeros([BLOCK_GROUPS], tl.float32)
    for begin in range(0, kept, BLOCK_ROWS):
        n = begin + tl.arange(0, BLOCK_ROWS)
        used = n < kept
        if valid_ptr is not None:
            used = used & (tl.load(valid_ptr + batch * valid_batch + n, mask=used, other=False))
        row = tl.load(rows_ptr + batch * rows_batch + n, mask=used, other=0).to(tl.int64)
        token = tl.load(index_ptr + batch * index_batch + n, mask=used, other=0)
        member = tl.load(member_ptr + head * visual + token, mask=used, other=-1)
        key = tl.load(
            key_ptr + row[:, None] * key_row + d[None, :] * key_dim,
            mask=used[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        value = tl.load(
            value_ptr + row[:, None] * value_row + e[None, :] * value_dim,
            mask=used[:, None] & (e < VALUE_DIM)[None, :],
            other=0.0,
        )
        share = (g[:, None] == member[None, :]).to(tl.float32)
        keys += tl.dot(share.to(key.dtype), key, input_precision="ieee")
        values += tl.dot(share.to(value.dtype), value, input_precision="ieee")
        taken += tl.sum(share, 1)
    there = g < groups
    place = head * groups + g
    left = tl.load(sizes_ptr + place, mask=there, other=0.0) - taken
    left = tl.floor(left + 0.5)  # whole numbers but for the sums' rounding
    count = tl.maximum(left, 1.0)[:, None]
    at = place[:, None] * DIM + d[None, :]
    mask = there[:, None] & (d < DIM)[None, :]
    mean = (tl.load(key_sums_ptr + at, mask=mask, other=0.0) - keys) / count
    tl.store(keys_ptr + at, mean.to(keys_ptr.dtype.element_ty), mask=mask)
    at = place[:, None] * VALUE_DIM + e[None, :]
    mask = there[:, None] & (e < VALUE_DIM)[None, :]
    mean = (tl.load(value_sums_ptr + at, mask=mask, other=0.0) - values) / count
    tl.store(values_ptr + at, mean.to(values_ptr.dtype.element_ty), mask=mask)
    bias = tl.where(left > 0, tl.log(tl.maximum(left, 1.0)), -float("inf"))
    tl.store(bias_ptr + place, bias, mask=there)


def summaries(
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    index: torch.Tensor,
    valid: torch.Tensor | None,
    member: torch.Tensor,
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> sparse_decode.Beside:
    """Means of the groups without a fixation, on the GPU.

    Parameters
    ----------
    key, value : the cache, ``(batch, kv_heads, length, dim)``, any strides.
    rows : of the cache, which the fixation's come first in, ``(batch, picked)``, int64 or int32.
    index : the fixation, which of the visual tokens, ``(batch, kept)``, int64.
    valid : False where it is padding, ``(batch, kept)``; None where nothing is.
    member : group of each visual token, ``(batch, kv_heads, visual)``, int64.
    sums : of keys and of values over the groups, ``(batch, kv_heads, groups, dim)``, and their
        sizes, ``(batch, kv_heads, groups)``, in float32.

    Returns
    -------
    Mean keys and values in the cache's dtype, and the logarithm of how many tokens each stands for;
    -inf for none.
    """
    key_sums, value_sums, sizes = [part.contiguous() for part in sums]
    member, rows, index = member.contiguous(), rows.contiguous(), index.contiguous()
    shown = None if valid is None else valid.contiguous()
    keys = torch.empty_like(key_sums, dtype=key.dtype)
    values = torch.empty_like(value_sums, dtype=value.dtype)
    bias = torch.empty_like(sizes)
    launch = _launch(
        *(key.device, key.dtype, rows.dtype, shown is None),
        *(tuple(key.shape), key.stride(), value.shape[3], value.stride()),
        *(rows.shape[1], index.shape[1], member.shape[2], sizes.shape[2]),
    )
    launch(
        *(key, value, rows, index, shown, member, key_sums, value_sums, sizes),
        *(keys, values, bias),
    )
    return keys, values, bias


@lru_cache(maxsize=256)
def _launch(
    device: torch.device,
    dtype: torch.dtype,
    of_rows: torch.dtype,
    whole: bool,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int, int],
    value_dim: int,
    value_strides: tuple[int, int, int, int],
    picked: int,
    kept: int,
    visual: int,
    groups: int,
) -> Launch:
    """Of calls on a device with a cache and rows of this kind; ``whole`` is without a mask."""
    batch, kv_heads, _, dim = shape
    return Launch(
        _summaries_kernel,
        (batch * kv_heads, -(-groups // GROUPS), 1),
        (
            *(kept, visual, groups, kv_heads, *strides, *value_strides),
            *(picked, kept, 0 if whole else kept),
        ),
        {
            "DIM": dim,
            "VALUE_DIM": value_dim,
            "BLOCK_DIM": sparse_decode.block(dim),
            "BLOCK_VALUE": sparse_decode.block(value_dim),
            "BLOCK_GROUPS": GROUPS,
            "BLOCK_ROWS": ROWS,
            "num_warps": WARPS,
        },
    )


def bytes_moved(
    *, batch: int, kv_heads: int, dim: int, itemsize: int, kept: int, groups: int
) -> int:
    """Bytes that a call must move: rows of the fixation, their groups, sums in and means out.

    Parameters
    ----------
    batch, kv_heads, dim, itemsize : of the cache, whose values are like its keys.
    kept, groups : tokens of the fixation of a sequence, groups of a key head.
    """
    rows = kept * (2 * dim * itemsize + 8)
    sums, means = groups * 4 * (2 * dim + 1), groups * (2 * dim * itemsize + 4)
    return batch * (kv_heads * (rows + sums + means) + kept * (4 + 8))


def summaries_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    index: torch.Tensor,
    valid: torch.Tensor | None,
    member: torch.Tensor,
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> sparse_decode.Beside:
    """:func:`summaries` in plain torch, on any device: same arguments, same result."""
    keys, values = sparse_decode.gathered(key, value, rows[:, : index.shape[1]])
    key_sums, value_sums, sizes = sums
    groups = torch.arange(sizes.shape[2], device=key.device)[:, None]
    of_kept = member.gather(2, index[:, None].expand(-1, member.shape[1], -1))
    share = (of_kept[:, :, None] == groups).float()
    if valid is not None:
        share = share * valid[:, None, None]
    left = (sizes - share.sum(3)).round()  # whole numbers but for the sums' rounding
    count = left.clamp(min=1)[..., None]
    return (
        ((key_sums - share @ keys.float()) / count).to(key.dtype),
        ((value_sums - share @ values.float()) / count).to(value.dtype),
        left.log(),
    )
