"""Entropic optimal transport with a dustbin, many small problems at once, in one kernel.

``T = argmax <T, S> + entropy(T)`` over the scores ``S`` of M x P with a row and a column of score
``dustbin`` added; marginals 1/(M+P) for every row and column, P/(M+P) for the row and M/(M+P) for
the column that were added. The result is ``(M+P) T`` without the two (SuperGlue, arXiv 1911.11763).

Sinkhorn's algorithm alternates ``u = a / (K v)`` and ``v = b / (K^T u)`` with
``K = exp(S - dustbin)``: one exponential an element, where the log domain takes two in every
iteration. It is as exact as long as no score is further than :data:`FARTHEST` from the dustbin, and
cosines are not; beyond, they count as that far. One program solves one problem. Where ``K`` fits
its registers, it reads the scores once and stays there; larger problems compute it tile by tile in
every iteration, from the L2 cache where the scores fit. As soon as ``u`` of some rows is known,
they enter the sums of the columns. The dustbins are two scalars; nothing is padded in memory.

**Bytes.** The scores must be read and the plan written (:func:`bytes_moved`): 8 an element. An
iteration adds up all elements twice, over rows and over columns, so memory is not what bounds it.
"""

from __future__ import annotations  # Triton may be missing, and tl.constexpr with it

import torch

from compress.kernels.backend import current_device_of, jit, tl

LARGEST = 8192  # columns that are supported
WARPS = 16
ACROSS = 8  # columns of a thread, at least
HELD = 64  # elements of a tile in the registers of a thread
FARTHEST = tl and tl.constexpr(80.0)  # exp of it, and of its negative, is a float32


@jit()
def _affinity(  # type: ignore[no-untyped-def]
    scores_ptr, row, column, rows, columns, n_columns, dustbin
):
    """``K`` of a tile, 0 where the problem does not use it."""
    inside = (row < rows) & (column < columns)
    above = tl.load(scores_ptr + row.to(tl.int64) * n_columns + column, mask=inside, other=0.0)
    above = tl.minimum(tl.maximum(above - dustbin, -FARTHEST), FARTHEST)
    return tl.where(inside, tl.exp(above), 0.0)


@jit()
def _over_columns(x):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(x, 1, keep_dims=True), 3, keep_dims=True)


@jit()
def _over_rows(x):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(x, 0, keep_dims=True), 2, keep_dims=True)


@jit()
def _row_scales(affinity, row, rows, v, v_bin, each):  # type: ignore[no-untyped-def]
    """``u`` of some rows; 0 of those that the problem does not have."""
    return tl.where(row < rows, each / (_over_columns(affinity * v) + v_bin), 0.0)


@jit()
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
    # A tile is (ROWS, COLUMNS, DOWN, ALONG): the last two are spread over threads, which sum the
    # others up before they exchange anything.
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.load(rows_ptr + problem)
    columns = tl.load(columns_ptr + problem)
    total = (rows + columns).to(tl.float32)
    each = 1.0 / total
    scores_ptr += problem * n_rows * n_columns
    plan_ptr += problem * n_rows * n_columns
    row = tl.arange(0, ROWS)[:, None, None, None] * DOWN + tl.arange(0, DOWN)[None, None, :, None]
    column = tl.arange(0, COLUMNS)[None, :, None, None] * ALONG + tl.arange(0, ALONG)
    if ONE_TILE:
        held = _affinity(scores_ptr, row, column, rows, columns, n_columns, dustbin)
    v = tl.where(column < columns, 1.0, 0.0)
    v_bin = 1.0
    v_before = v  # the last u is computed from it again, which is cheaper than storing it
    v_bin_before = v_bin
    for _ in range(iterations):
        u_bin = columns * each / (tl.sum(v) + v_bin)
        reach = tl.zeros([1, COLUMNS, 1, ALONG], tl.float32) + u_bin
        mass = u_bin
        if ONE_TILE:
            u = _row_scales(held, row, rows, v, v_bin, each)
            reach += _over_rows(held * u)
            mass += tl.sum(u)
        else:
            for first in range(0, rows, ROWS * DOWN):
                affinity = _affinity(
                    scores_ptr, first + row, column, rows, columns, n_columns, dustbin
                )
                u = _row_scales(affinity, first + row, rows, v, v_bin, each)
                reach += _over_rows(affinity * u)
                mass += tl.sum(u)
        v_before = v
        v_bin_before = v_bin
        v = tl.where(column < columns, each / reach, 0.0)
        v_bin = rows * each / mass
    for first in range(0, n_rows, ROWS * DOWN):
        if ONE_TILE:
            affinity = held
        else:
            affinity = _affinity(scores_ptr, first + row, column, rows, columns, n_columns, dustbin)
        u = _row_scales(affinity, first + row, rows, v_before, v_bin_before, each)
        tl.store(
            plan_ptr + (first + row).to(tl.int64) * n_columns + column,
            affinity * u * v * total,
            mask=(first + row < n_rows) & (column < n_columns),
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
    with current_device_of(scores):
        _sinkhorn_kernel[(problems,)](
            scores,
            rows.to(torch.int32),
            columns.to(torch.int32),
            plan,
            scores.shape[1],
            scores.shape[2],
            dustbin,
            iterations,
            **tile(*scores.shape[1:]),
            num_warps=WARPS,
        )
    return plan


def why_unsupported(columns: int) -> str | None:
    """Why the kernel cannot solve problems with so many columns; None where it can."""
    return f"at most {LARGEST} columns fit a tile" if columns > LARGEST else None


def tile(rows: int, columns: int) -> dict[str, int]:
    """Sides of a tile for problems of this size: of all of it where the registers hold that."""
    columns = _next_power_of_2(columns)
    along = min(max(columns // ACROSS, ACROSS), 32 * WARPS)
    down, across = 32 * WARPS // along, max(columns // along, 1)
    needed = _next_power_of_2(-(-rows // down))
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
