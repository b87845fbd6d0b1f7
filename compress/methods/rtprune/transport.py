"""How pruned tokens are merged into kept ones: the second stage of RTPrune (arXiv 2605.00392).

By entropic optimal transport with a dustbin, as in SuperGlue (Sarlin et al., CVPR 2020, arXiv
1911.11763). On the CPU, POT solves it (Flamary et al., "POT: Python Optimal Transport", JMLR 2021);
on a GPU, the kernel of ``compress.kernels.sinkhorn``, or the plain torch beside it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from compress.kernels.backend import use_triton
from compress.kernels.sinkhorn import sinkhorn, sinkhorn_reference, why_unsupported

DUSTBIN = 0.2
ITERATIONS = 100


def similarity(kept: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """Cosines of ``(..., kept, dim)`` and ``(..., pruned, dim)`` in float32, kept first."""
    left, right = F.normalize(kept.float(), dim=-1), F.normalize(pruned.float(), dim=-1)
    return left @ right.transpose(-1, -2)


def transport_plans(
    scores: torch.Tensor,
    kept: Sequence[int] | None = None,
    pruned: Sequence[int] | None = None,
    dustbin: float = DUSTBIN,
    iterations: int = ITERATIONS,
) -> torch.Tensor:
    """How much of each pruned token of a page goes to each kept one, for all pages at once.

    With M kept and P pruned tokens, a row and a column of score ``dustbin`` are added. The plan
    maximises ``<T, scores> + entropy(T)`` under the marginals 1/(M+P) for every token, P/(M+P) for
    the row and M/(M+P) for the column that were added; it is multiplied by M+P and the two are
    dropped. Scores are taken as given: nothing is differentiated.

    Parameters
    ----------
    scores : similarities, larger for more similar, ``(pages, kept, pruned)``, both positive.
    kept, pruned : how many each page has, at least 1; what is behind them is padding. None is all.
    dustbin : score of not being moved; the larger, the less is moved.
    iterations : of Sinkhorn's algorithm, in the log domain, in float32.

    Returns
    -------
    ``(pages, kept, pruned)``, in the dtype of the scores, 0 in padding; every column sums to at
    most 1.
    """
    pages, rows, columns = scores.shape
    kept, pruned = kept or [rows] * pages, pruned or [columns] * pages
    known = scores.detach().float()
    if use_triton("sinkhorn", scores.device, why_unsupported(columns)):
        solve = sinkhorn
    elif scores.is_cuda:  # POT would go from page to page
        solve = sinkhorn_reference
    else:
        by_pot = partial(_plan_by_pot, dustbin=dustbin, iterations=iterations)
        return one_by_one(by_pot, known, kept, pruned).to(scores.dtype)
    sizes = torch.tensor([kept, pruned], dtype=torch.int32).to(scores.device, non_blocking=True)
    return solve(known, sizes[0], sizes[1], dustbin, iterations).to(scores.dtype)


def one_by_one(
    plan_of: Callable[[torch.Tensor], torch.Tensor],
    scores: torch.Tensor,
    kept: Sequence[int],
    pruned: Sequence[int],
) -> torch.Tensor:
    """The plans of pages, each from its own scores ``(kept, pruned)``; as `transport_plans`."""
    plans = torch.zeros_like(scores)
    for plan, page, rows, columns in zip(plans, scores, kept, pruned, strict=True):
        plan[:rows, :columns] = plan_of(page[:rows, :columns])
    return plans


def _plan_by_pot(scores: torch.Tensor, dustbin: float, iterations: int) -> torch.Tensor:
    """:func:`transport_plans` of one page by POT, ``(kept, pruned)`` in float32."""
    from ot.bregman import sinkhorn_log  # takes long to import, and only CPUs need it

    rows, columns = scores.shape
    cost = -F.pad(scores, (0, 1, 0, 1), value=dustbin)
    source, target = scores.new_ones(rows + 1), scores.new_ones(columns + 1)
    source[-1], target[-1] = columns, rows
    total = rows + columns
    plan = sinkhorn_log(
        source / total, target / total, cost, 1.0, numItermax=iterations, stopThr=0, warn=False
    )
    return torch.as_tensor(plan).to(scores)[:-1, :-1] * total


def nearest_plan(scores: torch.Tensor) -> torch.Tensor:
    """Move all of each pruned token to the kept one that is most similar; for comparison.

    Parameters
    ----------
    scores : similarities, ``(..., kept, pruned)``.

    Returns
    -------
    One 1 in every column, ``(..., kept, pruned)``.
    """
    nearest = scores.argmax(dim=-2, keepdim=True)
    return torch.zeros_like(scores).scatter(-2, nearest, 1.0)


def merge(
    kept: torch.Tensor, pruned: torch.Tensor, plan: torch.Tensor, strength: float = 0.1
) -> torch.Tensor:
    """Add to the kept tokens what is moved onto them: ``kept + strength plan @ pruned``.

    Parameters
    ----------
    kept : ``(..., kept, dim)``.
    pruned : ``(..., pruned, dim)``.
    plan : ``(..., kept, pruned)``.
    strength : weight of what is moved; 0 leaves the kept tokens as they are.

    Returns
    -------
    ``(..., kept, dim)``, in the dtype of ``kept``; the sum is taken in float32.
    """
    return (kept.float() + strength * (plan.float() @ pruned.float())).to(kept.dtype)
