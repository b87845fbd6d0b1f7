"""Entropic optimal transport with a dustbin, many small problems at once, in one kernel.

``T = argmax <T, S> + entropy(T)`` over the scores ``S`` of M x P with a row and a column of score
``dustbin`` added; marginals 1/(M+P) for every row and column, P/(M+P) for the row and M/(M+P) for
the column that were added. The result is ``(M+P) T`` without the two (SuperGlue, arXiv 1911.11763).

Sinkhorn's algorithm in the log domain alternates ``u = log a - logsumexp_j(S + v)`` and
``v = log b - logsumexp_i(S + u)``. One program solves one problem and reads the scores once an
iteration: as soon as ``u`` of some rows is known, they enter a running logsumexp of the columns.
The dustbins are two scalars; nothing is padded in memory.

**Bytes.** The scores must be read and the plan written (:func:`bytes_moved`): 8 an element. Each
iteration reads the scores again, from the L2 cache where they fit, and takes two exponentials an
element; with more than a few iterations memory is not what bounds it.
"""

from __future__ import annotations  # Triton may be missing, and tl.constexpr with it

import torch

from compress.kernels.backend import jit, tl

LARGEST = 8192  # elements of a tile: with 8 warps, 32 in the registers of each thread
WARPS = 8


@jit()
def _row_potentials(scores, v, v_bin, log_token, dustbin):  # type: ignore[no-untyped-def]
    z = scores + v[None, :]
    top = tl.maximum(tl.max(z, 1), dustbin + v_bin)
    mass = tl.sum(tl.exp(z - top[:, None]), 1) + tl.exp(dustbin + v_bin - top)
    return log_token - top - tl.log(mass)


@jit()
def _sinkhorn_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,  # (problems, n_rows, n_columns) float32
    rows_ptr,  # (problems,) int32: rows in use
    columns_ptr,  # (problems,) int32
    plan_ptr,  # (problems, n_rows, n_columns) float32, zeros
    n_rows,
    n_columns,
    dustbin,
    iterations,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.load(rows_ptr + problem)
    columns = tl.load(columns_ptr + problem)
    total = (rows + columns).to(tl.float32)
    log_token = -tl.log(total)
    log_row_bin = tl.log(columns.to(tl.float32)) + log_token
    log_column_bin = tl.log(rows.to(tl.float32)) + log_token
    start = problem * n_rows * n_columns
    column = tl.arange(0, BLOCK_COLUMNS)
    used = column < columns
    v = tl.where(used, 0.0, -float("inf"))
    v_bin = 0.0
    v_before = v  # the last u is computed from it again, which is cheaper than storing it
    v_bin_before = v_bin
    for _ in range(iterations):
        top = tl.maximum(tl.max(v, 0), v_bin)
        u_bin = (
            log_row_bin - dustbin - top - tl.log(tl.sum(tl.exp(v - top), 0) + tl.exp(v_bin - top))
        )
        best = tl.zeros([BLOCK_COLUMNS], tl.float32) + dustbin + u_bin
        mass = tl.zeros([BLOCK_COLUMNS], tl.float32) + 1.0
        bin_best = dustbin + u_bin
        bin_mass = 1.0
        for first in range(0, rows, BLOCK_ROWS):
            row = first + tl.arange(0, BLOCK_ROWS)
            where = start + row[:, None] * n_columns + column[None, :]
            inside = (row < rows)[:, None] & used[None, :]
            scores = tl.load(scores_ptr + where, mask=inside, other=-float("inf"))
            u = _row_potentials(scores, v, v_bin, log_token, dustbin)
            u = tl.where(row < rows, u, -float("inf"))
            moved = scores + u[:, None]
            higher = tl.maximum(best, tl.max(moved, 0))
            mass = mass * tl.exp(best - higher) + tl.sum(tl.exp(moved - higher[None, :]), 0)
            best = higher
            bin_higher = tl.maximum(bin_best, dustbin + tl.max(u, 0))
            bin_mass = bin_mass * tl.exp(bin_best - bin_higher)
            bin_mass += tl.sum(tl.exp(dustbin + u - bin_higher), 0)
            bin_best = bin_higher
        v_before = v
        v_bin_before = v_bin
        v = tl.where(used, log_token - best - tl.log(mass), -float("inf"))
        v_bin = log_column_bin - bin_best - tl.log(bin_mass)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        where = start + row[:, None] * n_columns + column[None, :]
        inside = (row < rows)[:, None] & used[None, :]
        scores = tl.load(scores_ptr + where, mask=inside, other=-float("inf"))
        u = _row_potentials(scores, v_before, v_bin_before, log_token, dustbin)
        tl.store(
            plan_ptr + where, tl.exp(scores + u[:, None] + v[None, :] - log_token), mask=inside
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
    block_columns = _next_power_of_2(scores.shape[2])
    block_rows = min(_next_power_of_2(scores.shape[1]), LARGEST // block_columns)
    scores = scores.contiguous()
    plan = torch.zeros_like(scores)
    with torch.cuda.device_of(scores):
        _sinkhorn_kernel[(problems,)](
            scores,
            rows.to(torch.int32),
            columns.to(torch.int32),
            plan,
            scores.shape[1],
            scores.shape[2],
            dustbin,
            iterations,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=WARPS,
        )
    return plan


def why_unsupported(columns: int) -> str | None:
    """Why the kernel cannot solve problems with so many columns; None where it can."""
    return f"at most {LARGEST} columns fit a tile" if columns > LARGEST else None


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
