"""Attention of one new token to some rows of a cache, or to all rows with the weights returned.

For each sequence and query head, with the rows ``R`` that are read of the cache of its key head:
``o = sum_R p_r v_r``, ``p_r = exp(scaling q.k_r - lse)``, ``lse = logsumexp_R(scaling q.k_r)``.

**Split-KV** (flash decoding, Dao et al. 2023). One token has too few heads to fill a GPU: the rows
are cut into splits, and one program reads one split for one key head. Its query heads lie in one
tile, so that every key and value is read once for all of them. It keeps a running maximum, the
mass below it and the weighted sum in float32, in base 2. A second, small kernel adds up the splits
by their lse: ``o = sum_s 2^(lse_s - lse) o_s``. Where one split is enough, the first writes the
result.

**Sparse** (:func:`sparse_decode`): the rows are a list, of all key heads or of each one, gathered
in place and never copied together, and after it a range, which needs no list. Masked rows are not
loaded. The last split also reads rows of a head's own beside the cache, each with a number that is
added to its logit: the summaries of :mod:`compress.kernels.summaries`.

**Focal** (:func:`focal_decode`): all rows, and the mean over the heads of ``p``. This needs the
final lse, which is unknown while the keys pass: their logits are stored, and the second kernel
turns them into weights. The keys are read once.

**Bytes.** A row is used for two products of a few heads: memory bounds both functions. What must
be moved (:func:`bytes_moved`) is a row's key and value, ``kv_heads (dim + value_dim) itemsize``; of
a listed row also its index, 4; in the focal variant its weight, 4; and query and output.
Beyond this bound, ``4 (value_dim + 1)`` a head for each split where there are several, and, focal,
``4 heads`` a row for the logits are written and read again, mostly in the L2 cache.

Sizes are computed for an H100 (132 multiprocessors, 228 KiB of shared memory each), and so that
the tiles in flight fit the 99 KiB of smaller GPUs.
"""

from __future__ import annotations  # Triton may be missing, and tl.constexpr with it

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from compress.kernels.backend import Launch, jit, tl

Beside = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_DIM = 256
LARGEST_GROUP = 64  # query heads of a key head
MOST_SPLITS = 64
SCORES = 128  # rows whose weights one program computes,
HEADS = 16  # from so many heads at a time
LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """How a program reads its rows.

    Parameters
    ----------
    rows : that are loaded together.
    warps : of a program.
    stages : tiles in flight and in use.
    at_once : programs that a multiprocessor of an H100 holds at a time, by the registers and the
        shared memory that they are compiled to.
    """

    rows: int
    warps: int
    stages: int
    at_once: int


# By bytes of a number and size of a head, of keys or of values, whichever is larger: what
# `tile_and_splits` chooses from. The GPU suite times them all (.ci/gpu/extra.py tune).
TILES = {
    (2, 64): (Tile(128, 4, 3, 3), Tile(64, 4, 3, 4)),
    (2, 128): (Tile(64, 4, 3, 3), Tile(32, 4, 3, 3), Tile(16, 4, 3, 4)),
    (2, 256): (Tile(32, 4, 3, 2), Tile(16, 4, 3, 3)),
    (4, 64): (Tile(32, 4, 3, 2), Tile(16, 4, 3, 4)),
    (4, 128): (Tile(16, 4, 3, 3),),
    (4, 256): (Tile(16, 4, 3, 2),),
}
# In rows, as many as a multiprocessor reads in that time: until what is asked for arrives, for the
# instructions of a tile, and for the kernel that adds up the splits. Reasoned; what is chosen with
# them is 3% slower than the fastest of 30 tiles and splits on average of ten shapes on an H200.
LATENCY = 64
STEP = 4
MERGE = 64


@jit()
def _weigh(logits, value, best, mass, total):  # type: ignore[no-untyped-def]
    """Add a tile of rows to the maximum, the mass below it and the weighted sum of a split."""
    higher = tl.maximum(best, tl.max(logits, 1))
    # a tile may have nothing to attend to, and inf - inf is no number
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(best - base)
    mass = mass * shrink + tl.sum(weights, 1)
    total = total * shrink[:, None]
    total += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return higher, mass, total


@jit(
    do_not_specialize=("picked", "start", "read", "split_rows", "beside"),
    do_not_specialize_on_alignment=("rows_ptr", "rows_mask_ptr", "dense_mask_ptr"),
)
def _read_kernel(  # type: ignore[no-untyped-def]
    query_ptr,  # (batch, heads, dim)
    key_ptr,  # (batch, kv_heads, length, dim)
    value_ptr,  # (batch, kv_heads, length, value_dim)
    rows_ptr,  # (batch, kv_heads, picked) integers; None is no list
    rows_mask_ptr,  # (batch, kv_heads, picked) bool; None is all of the list
    dense_mask_ptr,  # (batch, read - picked) bool; None is all of the range
    beside_key_ptr,  # (batch, kv_heads, beside, dim) rows of a head's own; None is none
    beside_value_ptr,  # (batch, kv_heads, beside, value_dim)
    bias_ptr,  # (batch, kv_heads, beside) float32, added to the logits; -inf hides
    output_ptr,  # (batch, heads, splits, value_dim): float32 parts, or of one split the result
    lse_ptr,  # (batch, heads, splits) float32, in base 2; None where they are not needed
    logits_ptr,  # (batch, heads, read) float32, in base 2; None where they are not needed
    scale,  # of the dot products, for base 2
    picked,  # rows of the list
    start,  # first row of the range
    read,  # rows of both
    split_rows,  # rows of a split, a multiple of BLOCK_ROWS
    beside,  # rows of a head's own
    lse_start,  # where they are behind their pointers
    logits_start,
    kv_heads,
    query_batch,  # from here on strides
    query_head,
    query_dim,
    key_batch,
    key_head,
    key_row,
    key_dim,
    value_batch,
    value_head,
    value_row,
    value_dim,
    rows_batch,
    rows_head,
    rows_mask_batch,
    rows_mask_head,
    dense_mask_batch,
    logits_row,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    problem = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    batch = (problem // kv_heads).to(tl.int64)
    kv_head = (problem % kv_heads).to(tl.int64)
    member = tl.arange(0, BLOCK_GROUP)
    d = tl.arange(0, BLOCK_DIM)
    e = tl.arange(0, BLOCK_VALUE)
    in_group = member < GROUP
    in_dim = d < DIM
    in_value = e < VALUE_DIM
    query_ptr += batch * query_batch + kv_head * GROUP * query_head
    query = tl.load(
        query_ptr + member[:, None] * query_head + d[None, :] * query_dim,
        mask=in_group[:, None] & in_dim[None, :],
        other=0.0,
    )
    key_ptr += batch * key_batch + kv_head * key_head
    value_ptr += batch * value_batch + kv_head * value_head
    heads = (batch * kv_heads + kv_head) * GROUP + member  # of all sequences
    if rows_ptr is not None:
        rows_ptr += batch * rows_batch + kv_head * rows_head
    if rows_mask_ptr is not None:
        rows_mask_ptr += batch * rows_mask_batch + kv_head * rows_mask_head
    best = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    mass = tl.zeros([BLOCK_GROUP], tl.float32)
    total = tl.zeros([BLOCK_GROUP, BLOCK_VALUE], tl.float32)
    first = split * split_rows
    last = tl.minimum(first + split_rows, read)
    for begin in range(first, last, BLOCK_ROWS):
        n = begin + tl.arange(0, BLOCK_ROWS)
        used = n < last
        row = (start + n - picked).to(tl.int64)
        if rows_ptr is not None:
            listed = used & (n < picked)
            index = tl.load(rows_ptr + n, mask=listed, other=0)
            row = tl.where(listed, index.to(tl.int64), row)
            if rows_mask_ptr is not None:
                mask = tl.load(rows_mask_ptr + n, mask=listed, other=True)
                used = used & mask
        if dense_mask_ptr is not None:
            ranged = (n < last) & (n >= picked)
            mask = tl.load(
                dense_mask_ptr + batch * dense_mask_batch + (n - picked), mask=ranged, other=True
            )
            used = used & mask
        key = tl.load(
            key_ptr + row[:, None] * key_row + d[None, :] * key_dim,
            mask=used[:, None] & in_dim[None, :],
            other=0.0,
        )
        value = tl.load(
            value_ptr + row[:, None] * value_row + e[None, :] * value_dim,
            mask=used[:, None] & in_value[None, :],
            other=0.0,
        )
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logits = tl.where(used[None, :], logits, -float("inf"))
        if logits_ptr is not None:
            tl.store(
                logits_ptr + logits_start + heads[:, None] * logits_row + n[None, :],
                logits,
                mask=in_group[:, None] & (n < last)[None, :],
            )
        best, mass, total = _weigh(logits, value, best, mass, total)
    if beside_key_ptr is not None:
        own = tl.where(split == splits - 1, beside, 0)  # the last split has them
        for begin in range(0, own, BLOCK_ROWS):
            n = begin + tl.arange(0, BLOCK_ROWS)
            row = (batch * kv_heads + kv_head) * beside + n
            bias = tl.load(bias_ptr + row, mask=n < beside, other=-float("inf"))
            used = bias > -float("inf")
            key = tl.load(
                beside_key_ptr + row[:, None] * DIM + d[None, :],
                mask=used[:, None] & in_dim[None, :],
                other=0.0,
            )
            value = tl.load(
                beside_value_ptr + row[:, None] * VALUE_DIM + e[None, :],
                mask=used[:, None] & in_value[None, :],
                other=0.0,
            )
            logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            logits = logits + bias[None, :] * 1.4426950408889634  # log2(e)
            best, mass, total = _weigh(logits, value, best, mass, total)
    total = total / tl.where(mass > 0, mass, 1.0)[:, None]
    part = heads * splits + split
    tl.store(
        output_ptr + part[:, None] * VALUE_DIM + e[None, :],
        total.to(output_ptr.dtype.element_ty),
        mask=in_group[:, None] & in_value[None, :],
    )
    if lse_ptr is not None:
        tl.store(lse_ptr + lse_start + part, best + tl.log2(mass), mask=in_group)


@jit()
def _lse(lse_ptr, head, there, splits, BLOCK_SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of some heads: the masses of the splits relative to the largest, and the lse in base 2."""
    split = tl.arange(0, BLOCK_SPLITS)
    parts = tl.load(
        lse_ptr + head[:, None] * splits + split[None, :],
        mask=there[:, None] & (split < splits)[None, :],
        other=-float("inf"),
    )
    top = tl.max(parts, 1)
    top = tl.where(top == -float("inf"), 0.0, top)
    shares = tl.exp2(parts - top[:, None])
    return shares, top + tl.log2(tl.sum(shares, 1))


@jit(do_not_specialize=("splits", "read"))
def _merge_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,  # (batch, heads, splits, value_dim) float32
    lse_ptr,  # (batch, heads, splits) float32, in base 2
    output_ptr,  # (batch, heads, value_dim)
    logits_ptr,  # (batch, heads, read) float32, in base 2; None where weights are not needed
    weights_ptr,  # (batch, read) float32
    splits,
    read,
    lse_start,
    logits_start,
    logits_row,
    heads,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    job = tl.program_id(1)  # the heads first, then blocks of rows
    lse_ptr += lse_start
    if job < heads:
        head = batch * heads + job + tl.arange(0, 1)
        shares, _ = _lse(lse_ptr, head, head >= 0, splits, BLOCK_SPLITS)
        shares = tl.sum(shares, 0)  # of the one head
        split = tl.arange(0, BLOCK_SPLITS)
        e = tl.arange(0, BLOCK_VALUE)
        head = batch * heads + job
        parts = tl.load(
            parts_ptr + (head * splits + split)[:, None] * VALUE_DIM + e[None, :],
            mask=(split < splits)[:, None] & (e < VALUE_DIM)[None, :],
            other=0.0,
        )
        mass = tl.sum(shares, 0)
        output = tl.sum(parts * shares[:, None], 0) / tl.where(mass > 0, mass, 1.0)
        tl.store(
            output_ptr + head * VALUE_DIM + e,
            output.to(output_ptr.dtype.element_ty),
            mask=e < VALUE_DIM,
        )
    elif logits_ptr is not None:
        logits_ptr += logits_start
        n = (job - heads) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        weights = tl.zeros([BLOCK_ROWS], tl.float32)
        for begin in range(0, heads, BLOCK_HEADS):
            member = begin + tl.arange(0, BLOCK_HEADS)
            head = batch * heads + member
            _, lse = _lse(lse_ptr, head, member < heads, splits, BLOCK_SPLITS)
            logits = tl.load(
                logits_ptr + head[:, None] * logits_row + n[None, :],
                mask=(member < heads)[:, None] & (n < read)[None, :],
                other=-float("inf"),
            )
            # of a head that is not there exp2(-inf + inf) would be no number
            lse = tl.where(member < heads, lse, 0.0)
            weights += tl.sum(tl.exp2(logits - lse[:, None]), 0)
        tl.store(weights_ptr + batch * read + n, weights / heads, mask=n < read)


def sparse_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    rows_mask: torch.Tensor | None,
    dense: tuple[int, int],
    dense_mask: torch.Tensor | None,
    scaling: float,
    beside: Beside | None = None,
) -> torch.Tensor:
    """Attention of one token to listed rows of the cache and a range of them, on the GPU.

    Parameters
    ----------
    query : of the new token, ``(batch, heads, 1, dim)``, any strides.
    key, value : the cache, ``(batch, kv_heads, length, dim)``, any strides, in the query's dtype;
        ``heads`` is a multiple of ``kv_heads``, and values may have another dim.
    rows : which rows are read, in any order, int64 or int32, ``(batch, picked)``; or of each key
        head, ``(batch, kv_heads, picked)``.
    rows_mask : True where attended, as the rows; None attends to all of them.
    dense : first row of a range that is read as well, by all sequences, and the one after its last.
    dense_mask : True where attended, ``(batch, stop - start)``; None attends to all of them.
    scaling : of the dot products.
    beside : keys and values ``(batch, kv_heads, rows, dim)`` that every key head has beside the
        cache, in its dtype, and what is added to their logits, ``(batch, kv_heads, rows)`` in
        float32, -inf where a row is hidden. None is none.

    Returns
    -------
    ``(batch, heads, 1, value_dim)``, equal to attention over the whole cache with -inf elsewhere;
    zero where a sequence attends to nothing.

    Raises
    ------
    ValueError : for shapes that do not fit each other, or what :func:`why_unsupported` names.
    """
    inputs = query, key, value, rows, rows_mask, dense_mask, *(beside or (None, None, None))
    return _decode(inputs, dense, scaling, None)


def focal_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one token to the whole cache, and its weights, on the GPU.

    Parameters
    ----------
    query, key, value, scaling : as in :func:`sparse_decode`.
    mask : True where attended, ``(batch, 1, 1, length)``; None attends to all.

    Returns
    -------
    The output ``(batch, heads, 1, value_dim)``, and the mean of the weights over the heads
    ``(batch, length)`` in float32.

    Raises
    ------
    ValueError : for shapes that do not fit each other, or what :func:`why_unsupported` names.
    """
    batch, length = len(query), key.shape[2]
    inputs = query, key, value, None, None, mask, None, None, None
    weights = query.new_empty_strided((batch, length), (length, 1), dtype=torch.float32)
    return _decode(inputs, (0, length), scaling, weights), weights


def why_unsupported(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *masks: torch.Tensor | None
) -> str | None:
    """Why the kernels cannot compute with these tensors; None where they can.

    Parameters
    ----------
    query, key, value, masks : of either function above.
    """
    dtypes = tuple([None if mask is None else mask.dtype for mask in masks])
    return _why_unsupported(
        query.size(1) / key.size(1),
        (query.size(3), value.size(3)),
        (query.dtype, key.dtype, value.dtype),
        dtypes,
        _trains((query, key, value)),
    )


def _trains(inputs: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether gradients are required of one of them."""
    return torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in inputs)


@cache
def _why_unsupported(
    group: float,
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    masks: tuple[torch.dtype | None, ...],
    trains: bool,
) -> str | None:
    if dtypes[0] not in DTYPES or len(set(dtypes)) > 1:
        return (
            "query, key and value should have one dtype, float16, bfloat16 or float32; they have "
            f"{dtypes[0]}, {dtypes[1]} and {dtypes[2]}"
        )
    if max(dims) > LARGEST_DIM:
        return f"heads should have at most {LARGEST_DIM} numbers; they have {max(dims)}"
    if group > LARGEST_GROUP:
        return f"at most {LARGEST_GROUP} query heads should share a key head; {group:g} do"
    if any(mask not in (None, torch.bool) for mask in masks):
        return "masks should be True where attended; one is added to the logits"
    if trains:
        return "gradients are required, and the kernels have none"
    return None


def bytes_moved(
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int,
    itemsize: int,
    picked: int,
    dense: int,
    value_dim: int | None = None,
    focal: bool = False,
) -> int:
    """Bytes that a call must move; see the module.

    Parameters
    ----------
    batch, heads, kv_heads, dim, value_dim : of query and cache; values are like keys when None.
    itemsize : bytes of a number of the cache.
    picked, dense : rows of the list and of the range that are attended to, a sequence.
    focal : of :func:`focal_decode`, where ``dense`` is the whole cache and ``picked`` 0.
    """
    numbers = dim + (dim if value_dim is None else value_dim)
    cached = kv_heads * (picked + dense) * numbers * itemsize
    own = heads * numbers * itemsize  # query and output
    index = picked * 4
    return batch * (cached + own + index + (4 * dense if focal else 0))


# ---- launching -----------------------------------------------------------------------------------


Inputs = tuple[torch.Tensor | None, ...]  # query, key, value, rows, masks, beside


class _Signature(NamedTuple):
    """What a launch depends on of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Launch:
    """All that two calls with equal signatures have in common, so that it is computed once."""

    output: tuple[tuple[int, ...], tuple[int, ...]]  # its shape and strides
    plain: bool  # whether the kernels take the inputs as they are
    split: bool  # whether there is more than one; the only one writes the result
    buffer: int  # numbers of the splits' outputs, their lse, and the logits
    read: Launch
    merge: Launch | None


def _decode(
    inputs: Inputs, dense: tuple[int, int], scaling: float, weights: torch.Tensor | None
) -> torch.Tensor:
    """Launch the kernels; ``weights`` (batch, length) are written where they are passed."""
    query: Any = inputs[0]
    signatures = [None if p is None else (p.shape, p.stride(), p.dtype) for p in inputs]
    focal, trains = weights is not None, _trains(inputs)
    launch = _launch(query.device, dense, scaling, focal, trains, tuple(signatures))
    if not launch.plain:
        lists = [None if part is None else _last_dense(part) for part in inputs[3:6]]
        beside = [None if part is None else part.contiguous() for part in inputs[6:]]
        inputs = *inputs[:3], *lists, *beside
    # takes the host less time than new_empty
    output: torch.Tensor = query.new_empty_strided(*launch.output)
    if not launch.merge:
        launch.read(*inputs, output, None, None)
        return output
    buffer = query.new_empty_strided((launch.buffer,), (1,), dtype=torch.float32)
    parts, logits = buffer if launch.split else output, buffer if focal else None
    launch.read(*inputs, parts, buffer, logits)
    launch.merge(parts, buffer, output, logits, weights)
    return output


@lru_cache(maxsize=256)
def _launch(
    device: torch.device,
    dense: tuple[int, int],
    scaling: float,
    focal: bool,
    trains: bool,
    signatures: tuple[Any, ...],
) -> _Launch:
    """Check what a call is passed, and plan it.

    Parameters
    ----------
    dense, scaling : of the call.
    focal, trains : whether weights are returned, whether gradients are required.
    signatures : of query, key, value, rows, their mask, that of the range and the rows beside.
    """
    parts: list[Any] = [None if part is None else _Signature(*part) for part in signatures]
    query, key, value, rows, rows_mask, dense_mask, *beside = parts
    _check(query, key, value, (rows_mask, dense_mask), trains)
    batch, heads, _, dim = query.shape
    kv_heads, length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    start, stop = dense
    picked = 0
    if rows is not None:
        listed = rows.shape[:-1] in ((batch,), (batch, kv_heads))
        if not listed or not 0 <= start <= stop <= length:
            raise ValueError(
                f"rows ({batch}, picked) or ({batch}, {kv_heads}, picked) and a range in a cache "
                f"of {length} rows are expected; got {tuple(rows.shape)} and {start} to {stop}; "
                "list rows of each sequence"
            )
        picked = rows.shape[-1]
        if rows_mask is not None:
            _check_mask("rows_mask", rows_mask.shape, tuple(rows.shape))
    if dense_mask is not None and focal:
        once = len(dense_mask.shape) == 4 and dense_mask.shape[0] == 1  # for all sequences
        _check_mask("mask", dense_mask.shape, (1 if once else batch, 1, 1, length))
    elif dense_mask is not None:
        _check_mask("dense_mask", dense_mask.shape, (batch, stop - start))
    if beside[0] is not None:
        own = (batch, kv_heads, beside[2].shape[-1])
        expected = [(*own, dim), (*own, value_dim), own]
        if [tuple(part.shape) for part in beside] != expected:
            raise ValueError(
                f"keys, values and biases {expected} are expected beside the cache; got "
                f"{[tuple(part.shape) for part in beside]}; give rows of each key head"
            )
    read = picked + stop - start
    problems, group = batch * kv_heads, heads // kv_heads
    block_dim, block_value = block(dim), block(value_dim)
    tile, splits = tile_and_splits(
        problems,
        read,
        query.dtype.itemsize,
        max(block_dim, block_value),
        _multiprocessors(device),
    )
    split_rows = max(1, -(-read // (splits * tile.rows))) * tile.rows
    splits = max(1, -(-read // split_rows))
    merges = splits > 1 or focal
    output = batch, heads, 1, value_dim
    lse_start = _whole_lines(batch * heads * splits * value_dim) if splits > 1 else 0
    logits_start = _whole_lines(lse_start + batch * heads * splits)
    logits_row = _whole_lines(read) if focal else 0
    merge = Launch(
        _merge_kernel,
        (batch, heads + (-(-read // SCORES) if focal else 0), 1),
        (splits, read, lse_start, logits_start, logits_row, heads),
        {
            "VALUE_DIM": value_dim,
            "BLOCK_VALUE": block_value,
            "BLOCK_SPLITS": 1 << (splits - 1).bit_length(),
            "BLOCK_HEADS": min(HEADS, 1 << (heads - 1).bit_length()),
            "BLOCK_ROWS": SCORES,
        },
    )
    return _Launch(
        output=(output, _strides(output)),
        plain=all(p is None or p.strides[-1] == 1 for p in (rows, rows_mask, dense_mask))
        and all(p is None or p.strides == _strides(p.shape) for p in beside),
        split=splits > 1,
        buffer=logits_start + batch * heads * logits_row if merges else 0,
        read=Launch(
            _read_kernel,
            (problems, splits, 1),
            (
                scaling * LOG2_E,
                picked,
                start,
                read,
                split_rows,
                0 if beside[0] is None else beside[2].shape[2],
                lse_start,
                logits_start,
                kv_heads,
                *(query.strides[axis] for axis in (0, 1, 3)),
                *key.strides,
                *value.strides,
                *_head_strides(rows),
                *_head_strides(rows_mask),
                _head_strides(dense_mask)[0],
                logits_row,
            ),
            {
                "GROUP": group,
                "DIM": dim,
                "VALUE_DIM": value_dim,
                "BLOCK_GROUP": block(group),
                "BLOCK_DIM": block_dim,
                "BLOCK_VALUE": block_value,
                "BLOCK_ROWS": tile.rows,
                "num_warps": tile.warps,
                "num_stages": triton_stages(tile, listed=rows is not None),
            },
        ),
        merge=merge if merges else None,
    )


def _whole_lines(numbers: int) -> int:
    """So many that what follows begins a cache line."""
    return -(-numbers // 32) * 32


def _check(query: Any, key: Any, value: Any, masks: tuple[Any, ...], trains: bool) -> None:
    """Raise ValueError unless signatures fit each other and the kernels."""
    batch, kv_heads, length = key.shape[:3]
    if (
        len(query.shape) != 4
        or query.shape[0] != batch
        or query.shape[1] % kv_heads
        or query.shape[2:] != (1, key.shape[3])
        or value.shape[:3] != (batch, kv_heads, length)
    ):
        raise ValueError(
            "query (batch, heads, 1, dim), key and value (batch, kv_heads, length, dim) with heads "
            f"a multiple of kv_heads are expected; got {tuple(query.shape)}, {tuple(key.shape)} "
            f"and {tuple(value.shape)}; give one new token of each sequence and its cache"
        )
    reason = _why_unsupported(
        query.shape[1] / kv_heads,
        (query.shape[3], value.shape[3]),
        (query.dtype, key.dtype, value.dtype),
        tuple(None if mask is None else mask.dtype for mask in masks),
        trains,
    )
    if reason:
        raise ValueError(f"{reason}; convert them, or use the plain torch reference")


def _check_mask(name: str, got: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if got != shape:
        raise ValueError(
            f"{name} of shape {shape} is expected; got {tuple(got)}; give one for each row that "
            "is read"
        )


def block(size: int) -> int:
    """Next power of two, for a side of a tile; 16 is the least that a dot product takes."""
    return max(16, 1 << (size - 1).bit_length())


def triton_stages(tile: Tile, listed: bool) -> int:
    """For Triton: the list is loaded as far ahead of its rows as these are of their use."""
    return 2 * tile.stages - 1 if listed else tile.stages


def tile_and_splits(
    problems: int, read: int, itemsize: int, dim: int, multiprocessors: int
) -> tuple[Tile, int]:
    """The tile, and into how many splits the rows are cut.

    Memory bounds the kernel, and the programs of a multiprocessor share its part of the bandwidth:
    the time is that of the multiprocessor with most to read, longer where too little is in flight
    to hide the latency, a latency for each round of programs that are there at once, and what adds
    up the splits.

    Parameters
    ----------
    problems : key heads of all sequences.
    read : rows that each of them reads.
    itemsize, dim : bytes of a number, size of a head.
    multiprocessors : of the GPU.
    """
    # one choice for many steps of a growing answer
    return _tile_and_splits(problems, -(-read // 64) * 64, itemsize, dim, multiprocessors)


@cache
def _tile_and_splits(
    problems: int, read: int, itemsize: int, dim: int, multiprocessors: int
) -> tuple[Tile, int]:
    def cost(tile: Tile, splits: int) -> float:
        here = -(-problems * splits // multiprocessors)  # programs of the busiest multiprocessor
        rounds = -(-here // tile.at_once)
        busiest = here * -(-read // (tile.rows * splits)) * (tile.rows + STEP)
        in_flight = min(here, tile.at_once) * tile.rows * (tile.stages - 1)
        late = max(1, LATENCY / in_flight)
        return busiest * late + rounds * LATENCY + (MERGE if splits > 1 else 0)

    options = [
        (tile, splits)
        for tile in TILES[itemsize, max(dim, 64)]
        for splits in range(1, max(1, min(MOST_SPLITS, -(-read // tile.rows))) + 1)
    ]
    return min(options, key=lambda option: (cost(*option), option[1], -option[0].rows))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # Triton's interpreter
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor without gaps."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _last_dense(part: torch.Tensor) -> torch.Tensor:
    """A list without gaps, but for those between sequences and heads."""
    return part if part.stride(-1) == 1 else part.contiguous()


def _head_strides(part: _Signature | None) -> tuple[int, int]:
    """From one sequence's list to the next one's, and from a key head's; 0 where it is the same.

    Of what :func:`_last_dense` returns of a list like this one.
    """
    if part is None:
        return 0, 0
    strides = part.strides if part.strides[-1] == 1 else _strides(part.shape)
    return strides[0] * (part.shape[0] > 1), strides[1] * (len(strides) > 2)


def sparse_decode_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    rows_mask: torch.Tensor | None,
    dense: tuple[int, int],
    dense_mask: torch.Tensor | None,
    scaling: float,
    beside: Beside | None = None,
) -> torch.Tensor:
    """:func:`sparse_decode` in plain torch, on any device: same arguments, same result.

    Masks may also be added to the logits, both of them.
    """
    rows, mask = listed(rows, rows_mask, dense, dense_mask)
    picked_key, picked_value = gathered(key, value, rows)
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask[:, :, None]
    if beside is not None:
        keys, values, bias = beside
        picked_key = torch.cat([picked_key, keys], 2)
        picked_value = torch.cat([picked_value, values], 2)
        added = query.new_zeros(len(query), 1, 1, rows.shape[-1]) if mask is None else mask
        if added.dtype == torch.bool:
            added = torch.zeros_like(added, dtype=query.dtype).masked_fill(~added, -torch.inf)
        own = bias.to(query.dtype)[:, :, None]
        mask = torch.cat([added.expand(-1, own.shape[1], -1, -1), own], 3)
    output = scaled_dot_product_attention(
        packed(query, key.shape[1]), picked_key, picked_value, attn_mask=mask, scale=scaling
    )
    return output.reshape(len(query), query.shape[1], 1, -1)


def focal_decode_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    reduce: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`focal_decode` in plain torch, on any device: same arguments, same result.

    A mask may also be added to the logits, and ``reduce`` may be "max" instead of the mean over the
    heads.
    """
    logits = (packed(query, key.shape[1]) @ key.transpose(2, 3)).float() * scaling
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask
    weights = logits.softmax(-1)
    output = weights.to(value.dtype) @ value
    over_heads = weights.amax((1, 2)) if reduce == "max" else weights.mean((1, 2))
    return output.reshape(*query.shape[:3], -1), over_heads


def packed(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The query heads that share a key head, side by side: (batch, kv_heads, group, dim)."""
    return query.reshape(query.shape[0], kv_heads, -1, query.shape[-1])


def listed(
    rows: torch.Tensor,
    rows_mask: torch.Tensor | None,
    dense: tuple[int, int],
    dense_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows of a list and of a range as one list, and its mask; of each key head or of all."""
    ranged = torch.arange(*dense, dtype=rows.dtype, device=rows.device)
    every = torch.cat([rows, ranged.expand(*rows.shape[:-1], -1)], -1)
    if rows_mask is None and dense_mask is None:
        return every, None
    if rows_mask is None:
        rows_mask = torch.ones_like(rows, dtype=torch.bool)
    if dense_mask is None:
        dense_mask = torch.ones_like(ranged, dtype=torch.bool).expand(len(rows), -1)
    if rows.ndim == 3:
        dense_mask = dense_mask[:, None].expand(-1, rows.shape[1], -1)
    return every, torch.cat([rows_mask, dense_mask], -1)


def gathered(
    key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some rows of the cache, ``(batch, kv_heads, read, dim)`` each.

    The rows are those of all key heads, ``(batch, read)``, or of each one.
    """
    batch, kv_heads = key.shape[:2]
    head = torch.arange(batch * kv_heads, device=key.device).view(batch, kv_heads, 1)
    tables = [_table(part) for part in (key, value)]
    # whole rows of one long table: index_select copies them as blocks, gather by elements
    rows = rows[:, None] if rows.ndim == 2 else rows
    index = {apart: (head * apart + rows).flatten() for _, apart in tables}
    picked_key, picked_value = (
        table.index_select(0, index[apart]).view(batch, kv_heads, -1, table.shape[1])
        for table, apart in tables
    )
    return picked_key, picked_value


def _table(part: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Keys or values as rows of one table, and how many lie from one head's first to the next's.

    Nothing is copied where a cache has room behind each head's rows: the table has it too.
    """
    batch, kv_heads, length, dim = part.shape
    apart = part.stride(1) // dim
    if part.stride() != (kv_heads * apart * dim, apart * dim, dim, 1):
        part, apart = part.contiguous(), length
    rows = (batch * kv_heads - 1) * apart + length
    return part.as_strided((rows, dim), (dim, 1)), apart
