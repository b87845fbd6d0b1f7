"""The flow of the mask: energy, projection onto the sparse space, binarisation.

Pure functions of tensors. The formulation is ours; it realises what the abstract of Wan et al.,
"Pruning for Sparse Diffusion Models based on Gradient Flow" (arXiv 2501.09464) names.
"""

import math

import torch
from scipy import stats

from compress.methods.gradflow.schedule import steepest_fall


def block_sums(values: torch.Tensor, block: torch.Tensor, blocks: int) -> torch.Tensor:
    """Sum of ``(units,)`` values per block, ``(blocks,)``."""
    return torch.zeros(blocks, dtype=values.dtype, device=values.device).index_add_(
        0, block, values
    )


def project(
    mask: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    budget: torch.Tensor,
    block: torch.Tensor,
    iterations: int = 60,
) -> torch.Tensor:
    """Exact Euclidean projection onto ``{low <= m <= high, sum of m per block = budget}``.

    The projection is ``clamp(mask + shift, low, high)`` with one shift per block, found by
    bisection for all blocks at once (float64).

    Parameters
    ----------
    mask, low, high : ``(units,)``.
    budget : ``(blocks,)`` with ``sum(low) <= budget <= sum(high)`` in every block.
    block : ``(units,)`` block of each unit.

    Raises
    ------
    ValueError : when a block's budget lies outside what its bounds allow.
    """
    x, lo, hi = mask.double(), low.double(), high.double()
    target = budget.double()
    blocks = len(target)
    least, most = block_sums(lo, block, blocks), block_sums(hi, block, blocks)
    slack = 1e-6 * (1 + target.abs())
    if bool(((target < least - slack) | (target > most + slack)).any()):
        worst = int(torch.maximum(least - target, target - most).argmax())
        raise ValueError(
            f"block {worst} must sum to {target[worst]:.4f}, but its bounds allow only "
            f"[{least[worst]:.4f}, {most[worst]:.4f}]; allow larger moves (max_move) or use more "
            "flow steps"
        )
    reach = float((hi - x).abs().max() + (x - lo).abs().max()) + 1.0
    below = torch.full_like(target, -reach)
    above = torch.full_like(target, reach)
    for _ in range(iterations):
        middle = (below + above) / 2
        total = block_sums((x + middle[block]).clamp(lo, hi), block, blocks)
        too_small = total < target
        below = torch.where(too_small, middle, below)
        above = torch.where(too_small, above, middle)
    return (x + ((below + above) / 2)[block]).clamp(lo, hi).to(mask.dtype)


def energy_gradient(mask: torch.Tensor, scores: torch.Tensor, gamma: float) -> torch.Tensor:
    """Gradient of ``E(m) = -<s, m> + gamma sum m (1 - m)``, shape ``(units,)``."""
    return -scores + gamma * (1 - 2 * mask)


def flow_step(
    mask: torch.Tensor,
    scores: torch.Tensor,
    *,
    gamma: float,
    rate: float,
    max_move: float,
    budget: torch.Tensor,
    block: torch.Tensor,
) -> torch.Tensor:
    """One step ``m <- projection(m - rate * grad E(m))`` that moves no unit by more than max_move.

    Parameters
    ----------
    mask, scores : ``(units,)``; larger scores are kept.
    gamma : weight of the term that drives the mask to 0 or 1.
    rate : step size of the flow.
    max_move : continuity bound on every unit.
    budget, block : as in :func:`project`.
    """
    moved = mask - rate * energy_gradient(mask, scores, gamma)
    low, high = (mask - max_move).clamp(min=0), (mask + max_move).clamp(max=1)
    return project(moved, low, high, budget, block)


def binarise(
    mask: torch.Tensor,
    scores: torch.Tensor,
    block: torch.Tensor,
    keep_counts: torch.Tensor,
    layers: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keep the units with the largest mask in every block; scores break ties.

    Parameters
    ----------
    mask, scores, block : ``(units,)``.
    keep_counts : ``(blocks,)`` integers.
    layers : ``(units,)``; the best unit of every layer is kept in any case.

    Returns
    -------
    ``(units,)`` of exactly 0 and 1.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(mask[order], descending=True, stable=True)]
    if layers is not None:
        by_layer = order[torch.argsort(layers[order], stable=True)]
        follows = torch.zeros_like(block)
        follows[by_layer[1:]] = (layers[by_layer].diff() == 0).to(block.dtype)
        order = order[torch.argsort(follows[order], stable=True)]
    order = order[torch.argsort(block[order], stable=True)]
    sizes = torch.bincount(block, minlength=len(keep_counts))
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(mask), device=mask.device) - starts[block[order]]
    result = torch.zeros_like(mask)
    result[order] = (rank < keep_counts[block[order]]).to(mask.dtype)
    return result


def updates_fit(
    updates: int, sizes: torch.Tensor, keep_counts: torch.Tensor, max_move: float, schedule: str
) -> None:
    """Check that the continuity bound lets the budget fall as scheduled."""
    drop = steepest_fall(updates, schedule) * float(((sizes - keep_counts) / sizes).max())
    if drop > max_move:
        raise ValueError(
            f"max_move must be at least the largest mean drop of one mask update, {drop:.4f} "
            f"(over {updates} updates); got max_move={max_move}; raise it, or use more steps or "
            "a smaller update_every"
        )


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two score vectors ``(units,)``; nan when one is constant."""
    if bool((a == a[:1]).all()) or bool((b == b[:1]).all()):
        return math.nan
    return float(stats.spearmanr(a.cpu().numpy(), b.cpu().numpy()).statistic)
