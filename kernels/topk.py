"""Choose the cached tokens with the highest weights: what a focal layer leaves to the others.

Each sequence has a list of tokens and a budget ``k``. Chosen are its ``k`` tokens with the highest
weights, of equal ones the first. They are listed in the order of the tokens, so that their rows are
read in the order of memory. Weights are not negative, so that their bits are integers in the same
order, and are compared as such: NaN comes before all numbers, or behind them where its sign is set.

One program chooses for one sequence and sorts nothing. It keeps the bits of the weights in
registers. The largest integer ``t`` with ``|{w >= t}| >= k`` is the k-th highest weight; its bits
are found from the highest down, a count for each, and the search ends early where
``|{w >= t}| = k``. The tokens are then read again, tile by tile: how many before a token are above
``t``, and equal to it, says where it goes in the list.
"""

from __future__ import annotations  # Triton may be missing, and tl.constexpr with it

from functools import lru_cache

import torch

from compress.kernels.backend import Launch, jit, tl

LARGEST = 32768  # tokens whose weights fit into the registers of one program
OF_WARP = 1024  # tokens of each warp
LINE, LINES = 32, 8  # tokens that a warp lists together, and how many times side by side


@jit()
def _keys(weights_ptr, tokens_ptr, valid_ptr, n, visual):  # type: ignore[no-untyped-def]
    """The rows of some tokens, and the bits of their weights; of padding, which comes last, 0."""
    real = n < visual
    if valid_ptr is not None:
        real = tl.load(valid_ptr + n, mask=real, other=False)
    row = tl.load(tokens_ptr + n, mask=real, other=0)
    weight = tl.load(weights_ptr + row, mask=real, other=0.0)
    return row, weight.to(tl.int32, bitcast=True)


@jit(
    do_not_specialize=("length", "visual", "width", "listed"),
    do_not_specialize_on_alignment=(
        "weights_ptr", "tokens_ptr", "valid_ptr", "budgets_ptr", "index_ptr", "rows_ptr",
    ),
)  # fmt: skip
def _top_kernel(  # type: ignore[no-untyped-def]
    weights_ptr,  # (batch, length) float32
    tokens_ptr,  # (batch, visual) int32, rows of the cache
    valid_ptr,  # (batch, visual) bool; None is all
    budgets_ptr,  # (batch,) int32
    index_ptr,  # (batch, width) int64
    rows_ptr,  # (batch, listed) int32
    length,
    visual,
    width,
    listed,
    BLOCK: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_LINE: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    budget = tl.load(budgets_ptr + batch)
    weights_ptr += batch * length
    tokens_ptr += batch * visual
    if valid_ptr is not None:
        valid_ptr += batch * visual
    _, keys = _keys(weights_ptr, tokens_ptr, valid_ptr, tl.arange(0, BLOCK), visual)
    bound = tl.full([], 0, tl.int32)
    reached = visual.to(tl.int32)  # so many are not below the bound
    above = tl.full([], 0, tl.int32)  # so many are not below the last number that was too high
    shift = tl.full([], 30, tl.int32)
    while (shift >= 0) & (reached > budget):
        tried = bound + (tl.full([], 1, tl.int32) << shift)
        # the sign of a difference, which takes fewer instructions than a comparison
        other = (tried - 1 - keys).to(tl.uint32, bitcast=True)
        count = tl.sum((other >> 31).to(tl.int32))
        if count >= budget:
            reached = count
            bound = tried
        else:
            above = count
        shift -= 1
    equals = tl.where(reached > budget, budget - above, budget)  # that are chosen
    begun = tl.full([], 0, tl.int32)  # higher ones in the tiles before, and equal ones
    for begin in range(0, visual, BLOCK_LINES * BLOCK_LINE):
        # one axis where memory is read and written: of two Triton may take the wrong one first
        n = begin + tl.arange(0, BLOCK_LINES * BLOCK_LINE)
        row, key = _keys(weights_ptr, tokens_ptr, valid_ptr, n, visual)
        higher = key > bound
        equal = key == bound
        counts = higher.to(tl.int32) + (equal.to(tl.int32) << 16)
        lines = tl.reshape(counts, [BLOCK_LINES, BLOCK_LINE])
        of_line = tl.sum(lines, 1)
        before = begun + tl.cumsum(of_line, 0) - of_line
        before = tl.cumsum(lines, 1) - lines + before[:, None]
        before = tl.reshape(before, [BLOCK_LINES * BLOCK_LINE])
        equal_before = before >> 16
        place = (before & 0xFFFF) + tl.minimum(equal_before, equals)
        chosen = (higher | (equal & (equal_before < equals))) & (place < budget)
        tl.store(index_ptr + batch * width + place, n.to(tl.int64), mask=chosen)
        tl.store(rows_ptr + batch * listed + place, row, mask=chosen)
        begun += tl.sum(of_line)


def top_rows(
    weights: torch.Tensor,
    tokens: torch.Tensor,
    valid: torch.Tensor | None,
    budgets: torch.Tensor,
    index: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """List the tokens of each sequence with the highest weights, on the GPU.

    Parameters
    ----------
    weights : of the rows of the cache, not negative, ``(batch, length)`` in float32.
    tokens : rows of the cache to choose from, ``(batch, visual)``, int32; padding comes last.
    valid : which of them are not padding, ``(batch, visual)``; None is all.
    budgets : how many to choose, at most those of the sequence, ``(batch,)``, int32. What was
        chosen for a sequence before stays where it is 0.
    index : written: which of its tokens, in their order, ``(batch, width)``, int64. Places behind
        the budget stay as they are.
    rows : written: the same as rows of the cache, int32; the first ``width`` columns.
    """
    numbers = weights.shape[1], tokens.shape[1], index.shape[1], rows.shape[1]
    launch = _launch(weights.device, len(tokens), valid is None, *numbers)
    launch(weights, tokens, valid, budgets, index, rows)


@lru_cache(maxsize=256)
def _launch(
    device: torch.device, batch: int, whole: bool, length: int, visual: int, width: int, listed: int
) -> Launch:
    constants, options = blocks(visual)
    numbers = length, visual, width, listed
    return Launch(_top_kernel, (batch, 1, 1), numbers, constants | options)


def bytes_moved(batch: int, visual: int, kept: int) -> int:
    """Bytes that a call must move: each token's row and weight, and the two lists."""
    return batch * (visual * 8 + kept * 12)


def blocks(visual: int) -> tuple[dict[str, int], dict[str, int]]:
    """The kernel's constants for so many tokens, and its warps."""
    size = max(OF_WARP, 1 << (visual - 1).bit_length())
    warps = max(4, min(size // OF_WARP, 16))
    lines = min(LINES * warps, size // LINE)
    return {"BLOCK": size, "BLOCK_LINES": lines, "BLOCK_LINE": LINE}, {"num_warps": warps}


def why_unsupported(tokens: torch.Tensor) -> str | None:
    """Why the kernel cannot choose from these tokens; None where it can."""
    if tokens.shape[1] > LARGEST:
        return f"at most {LARGEST} tokens fit into a program; there are {tokens.shape[1]}"
    return None


def top_rows_reference(
    weights: torch.Tensor,
    tokens: torch.Tensor,
    valid: torch.Tensor | None,
    budgets: torch.Tensor,
    index: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """:func:`top_rows` in plain torch, on any device: same arguments, same result."""
    visual, width = tokens.shape[1], index.shape[1]
    keys = weights.gather(1, tokens.long()).view(torch.int32)
    if valid is not None:
        keys = keys.masked_fill(~valid, -1)
    places = torch.arange(visual, device=keys.device)
    # no two of them are equal, and of equal weights the first token has the largest
    best = ((keys.long() << 32) - places).topk(width, dim=1).indices
    inside = places[:width] < budgets[:, None]
    best = best.where(inside, visual).sort(1).values
    torch.where(inside, best, index, out=index)
    torch.gather(tokens, 1, index, out=rows[:, :width])
