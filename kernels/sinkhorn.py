"""Entropic optimal transport with a dustbin, many small problems at once, in one kernel.

``T = argmax <T, S> + entropy(T)`` over the scores ``S`` of M x P with a row and a column of score
``dustbin`` added; marginals 1/(M+P) for every row and column, P/(M+P) for the row and M/(M+P) for
the column that were added. The result is ``(M+P) T`` without the two (SuperGlue, arXiv 1911.11763).

Sinkhorn's algorithm alternates ``u = a / (K v)`` and ``v = b / (K^T u)`` with
``K = exp(S - dustbin)``: one exponential an element, where the log domain takes two in every
iteration. It is as exact as long as no score is further than :data:`FARTHEST` from the dustbin, and
cosines are not; beyond, they count as that far. Marginals are multiplied by M+P, and with them the
plan. One program solves one problem. It writes ``K`` where the plan will be, and the dustbins,
which are ones, nowhere. What fits its registers is read again once and stays there; larger problems
are read tile by tile in every iteration, from the L2 cache where they fit that. As soon as ``u`` of
some rows is known, they enter the sums of the columns.

**Threads.** An iteration is bounded by what threads exchange. Each sums up its own elements first;
then a row is inside a warp (up to 255 columns), and only the sums of columns go through shared
memory, once. How Triton spreads a tensor over threads is decided where it is loaded: as a matrix
there is one way, (elements of a thread and threads, threads along a row), which is then reshaped.
Loaded with the elements in dimensions of their own, a tile went through shared memory twice in
every iteration under Triton 3.6, which took 50 times as long.

**Bytes.** The scores must be read and the plan written (:func:`bytes_moved`): 8 an element. An
iteration adds up all elements twice, over rows and over columns, so memory is not what bounds it.
"""

from __future__ import annotations  # Triton may be missing, and tl.constexpr with it

from functools import lru_cache

import torch

from compress.kernels.backend import Launch, jit, tl

LARGEST = 8191  # columns that are supported; with the dustbin a power of two
WARPS = 8  # 0.20 ms for 337 x 63 on an H200; 16, with 64 elements a thread, 0.23 ms
ACROSS = 8  # columns of a thread, at least
HELD = 128  # elements of a tile in the registers of a thread
FARTHEST = tl and tl.constexpr(80.0)  # exp of it, and of its negative, is a float32


@jit()
def _places(  # type: ignore[no-untyped-def]
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOWN: tl.constexpr, ALONG: tl.constexpr
):
    """Row and column of each element of a tile as it is loaded."""
    place = tl.arange(0, ROWS * COLUMNS * DOWN)[:, None]
    row = place // (COLUMNS * DOWN) * DOWN + place % DOWN
    return row, place // DOWN % COLUMNS * ALONG + tl.arange(0, ALONG)[None, :]


@jit()
def _affinity(  # type: ignore[no-untyped-def]
    plan_ptr,
    first,
    rows,
    columns,
    n_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOWN: tl.constexpr,
    ALONG: tl.constexpr,
):
    """``K`` of the tile from row ``first`` on, 1 in the dustbins, 0 where there is nothing."""
    row, column = _places(ROWS, COLUMNS, DOWN, ALONG)
    inside = (row < rows - first) & (column < columns)
    ones = tl.where((row <= rows - first) & (column <= columns), 1.0, 0.0)
    plan_ptr += tl.cast(first, tl.int64) * n_columns
    tile = tl.load(plan_ptr + row * n_columns + column, mask=inside, other=ones)
    return tl.reshape(tile, (ROWS, COLUMNS, DOWN, ALONG))


@jit()
def _row_scales(affinity, row, rows, columns, v):  # type: ignore[no-untyped-def]
    """``u`` of some rows; 0 of those that the problem does not have."""
    reached = tl.sum(tl.sum(affinity * v, 1, keep_dims=True), 3, keep_dims=True)
    return tl.where(row <= rows, tl.where(row == rows, columns, 1.0) / reached, 0.0)


# sizes that are known to be multiples of 16 would be loaded four at a time, and spread differently
@jit(do_not_specialize=("n_rows", "n_columns", "iterations"))
def _sinkhorn_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,  # (problems, n_rows, n_columns) float32
    rows_ptr,  # (problems,) int32: rows in use
    columns_ptr,  # (problems,) int32
    plan_ptr,  # (problems, n_rows, n_columns) float32
    n_rows,
    n_columns,
    dustbin,
    iterations,
    ROWS: tl.constexpr,  # of a thread
    COLUMNS: tl.constexpr,
    DOWN: tl.constexpr,  # threads
    ALONG: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.load(rows_ptr + problem)
    columns = tl.load(columns_ptr + problem)
    scores_ptr += problem * n_rows * n_columns
    plan_ptr += problem * n_rows * n_columns
    at_row, at_column = _places(1, COLUMNS, DOWN, ALONG)
    for first in range(0, rows, DOWN):
        at = tl.cast(first, tl.int64) * n_columns + at_row * n_columns + at_column
        inside = (at_row < rows - first) & (at_column < columns)
        above = tl.load(scores_ptr + at, mask=inside, other=0.0) - dustbin
        above = tl.minimum(tl.maximum(above, -FARTHEST), FARTHEST)
        tl.store(plan_ptr + at, tl.exp(above), mask=inside)
    tl.debug_barrier()  # all that was written is there for all threads
    down = tl.arange(0, DOWN)[None, None, :, None]
    row = tl.arange(0, ROWS)[:, None, None, None] * DOWN + down
    column = tl.arange(0, COLUMNS)[None, :, None, None] * ALONG + tl.arange(0, ALONG)
    if ONE_TILE:
        held = _affinity(plan_ptr, 0, rows, columns, n_columns, ROWS, COLUMNS, DOWN, ALONG)
    v = tl.where(column <= columns, 1.0, 0.0)
    # The last u is computed from this v again, which is cheaper than storing it. No "= v" here: to
    # Triton, a copy of v that stays a copy of v is nothing that a loop changes.
    v_before = tl.zeros_like(v)
    for _ in range(iterations):
        if ONE_TILE:
            u = _row_scales(held, row, rows, columns, v)
            reached = tl.sum(held * u, 0, keep_dims=True)
        else:
            reached = tl.zeros([1, COLUMNS, DOWN, ALONG], tl.float32)
            for first in range(0, rows + 1, ROWS * DOWN):
                tile = _affinity(
                    plan_ptr, first, rows, columns, n_columns, ROWS, COLUMNS, DOWN, ALONG
                )
                u = _row_scales(tile, first + row, rows, columns, v)
                reached += tl.sum(tile * u, 0, keep_dims=True)
        reached = tl.sum(reached, 2, keep_dims=True)
        v_before = v
        v = tl.where(column == columns, rows, 1.0) / reached
        v = tl.where(column <= columns, v, 0.0)
    for first in range(0, n_rows, DOWN):
        tile = _affinity(plan_ptr, first, rows, columns, n_columns, 1, COLUMNS, DOWN, ALONG)
        u = _row_scales(tile, first + down, rows, columns, v_before)
        inside = (first + down < rows) & (column < columns)
        plan = tl.where(inside, tile * u * v, 0.0)
        tl.store(
            plan_ptr + tl.cast(first, tl.int64) * n_columns + at_row * n_columns + at_column,
            tl.reshape(plan, (COLUMNS * DOWN, ALONG)),
            mask=(at_row < n_rows - first) & (at_column < n_columns),
        )


def sinkhorn(
    scores: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    dustbin: float,
    iterations: int,
) -> torch.Tensor:
    """Solve every problem of a batch on the GPU.

    Parameters
    ----------
    scores : larger for more similar, ``(problems, rows, columns)`` float32; what a problem does not
        use is not read.
    rows, columns : how many of them each problem uses, at least 1, ``(problems,)``.
    dustbin : score of not being transported.
    iterations : at least 1.

    Returns
    -------
    ``(problems, rows, columns)`` float32, zero where a problem does not use it.

    Raises
    ------
    ValueError : for other shapes or dtypes, or more columns than a tile holds.
    """
    problems = len(scores)
    if scores.ndim != 3 or scores.dtype != torch.float32 or iterations < 1:
        raise ValueError(
            "float32 scores (problems, rows, columns) and an iteration are expected; got "
            f"{scores.dtype} {tuple(scores.shape)}, iterations={iterations}; convert them"
        )
    if rows.shape != (problems,) or columns.shape != (problems,):
        raise ValueError(
            f"a number of rows and one of columns is expected for each of {problems} problems; got "
            f"{tuple(rows.shape)} and {tuple(columns.shape)}; give ({problems},) each"
        )
    if reason := why_unsupported(scores.shape[2]):
        raise ValueError(f"{reason}; got {scores.shape[2]}; prune fewer tokens of a page")
    scores = scores.contiguous()
    plan = torch.empty_like(scores)
    launch = _launch(scores.device, scores.shape, dustbin, iterations)
    launch(scores, rows.to(torch.int32), columns.to(torch.int32), plan)
    return plan


@lru_cache(maxsize=256)
def _launch(
    device: torch.device, shape: tuple[int, int, int], dustbin: float, iterations: int
) -> Launch:
    """Of calls on a device with scores of a shape."""
    numbers = *shape[1:], dustbin, iterations
    constants = tile(*shape[1:]) | {"num_warps": WARPS}
    return Launch(_sinkhorn_kernel, (shape[0], 1, 1), numbers, constants)


def why_unsupported(columns: int) -> str | None:
    """Why the kernel cannot solve problems with so many columns; None where it can."""
    return f"at most {LARGEST} columns fit a tile" if columns > LARGEST else None


def tile(rows: int, columns: int) -> dict[str, int]:
    """Sides of a tile for problems of this size: of all of it where the registers hold that."""
    columns = _next_power_of_2(columns + 1)  # the dustbin
    along = min(max(columns // ACROSS, ACROSS), 32 * WARPS)
    down, across = 32 * WARPS // along, max(columns // along, 1)
    needed = _next_power_of_2(-(-(rows + 1) // down))
    one = across * needed <= HELD
    held = needed if one else max(HELD // 2 // across, 1)
    sides = {"ROWS": held, "COLUMNS": across, "DOWN": down, "ALONG": along}
    return sides | {"ONE_TILE": one}


def bytes_moved(rows: torch.Tensor, columns: torch.Tensor) -> int:
    """Bytes that must be moved to solve problems of these sizes; see the module."""
    return 8 * int((rows.long() * columns.long()).sum())


def _next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def sinkhorn_reference(
    scores: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    dustbin: float,
    iterations: int,
) -> torch.Tensor:
    """:func:`sinkhorn` in plain torch, on any device: same arguments, same result."""
    padded = torch.nn.functional.pad(scores, (0, 1, 0, 1), value=dustbin)
    rows, columns = rows.to(scores)[:, None], columns.to(scores)[:, None]
    row = torch.arange(padded.shape[1], device=scores.device)
    column = torch.arange(padded.shape[2], device=scores.device)
    row_bin, column_bin = row == scores.shape[1], column == scores.shape[2]
    total = rows + columns
    log_a = torch.where(row_bin, columns / total, 1 / total).log()
    log_b = torch.where(column_bin, rows / total, 1 / total).log()
    unused = ~(((row < rows) | row_bin)[:, :, None] & ((column < columns) | column_bin)[:, None])
    padded = padded.masked_fill(unused, -torch.inf)
    u, v = torch.zeros_like(log_a), torch.zeros_like(log_b)
    for _ in range(iterations):
        u = log_a - (padded + v[:, None]).logsumexp(2).clamp(min=-1e30)
        v = log_b - (padded + u[:, :, None]).logsumexp(1).clamp(min=-1e30)
    plan = (padded + u[:, :, None] + v[:, None]).exp() * total[:, :, None]
    return plan[:, :-1, :-1]
