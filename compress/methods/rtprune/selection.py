"""Which tokens of a page stay: the first stage of RTPrune (arXiv 2605.00392), and newlines.

Tokens that the decoder attends to first have a large norm.
"""

import torch


def select(features: torch.Tensor, keep: int) -> torch.Tensor:
    """The ``keep`` tokens with the largest L2 norm, in the order of the page.

    Of equal norms, the one that comes first on the page stays.

    Parameters
    ----------
    features : of the prunable tokens, ``(..., tokens, dim)``.
    keep : how many stay, 1 to ``tokens``.

    Returns
    -------
    Indices of the tokens that stay, ascending, ``(..., keep)``.
    """
    check_keep(features, keep)
    return largest(features.float().norm(dim=-1), keep)


def largest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the ``keep`` largest scores ``(..., tokens)``, ascending, ``(..., keep)``.

    Of equal scores the first ones: ``topk`` would take any of them, and others in a batch.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :keep].sort(dim=-1).values


def check_keep(features: torch.Tensor, keep: int) -> None:
    """Raise ValueError unless 1 to all of the tokens ``(..., tokens, dim)`` are to stay."""
    check_features(features)
    if not 1 <= keep <= features.shape[-2]:
        raise ValueError(
            f"1 to {features.shape[-2]} tokens can be kept of features of shape "
            f"{tuple(features.shape)}; got keep={keep}; round it into this range"
        )


def check_features(features: torch.Tensor) -> None:
    """Raise ValueError unless features have an axis of tokens and one of dimensions."""
    if features.ndim < 2:
        raise ValueError(
            f"features of shape (..., tokens, dim) are expected; got {tuple(features.shape)}; add "
            "the missing dimension"
        )


def left_over(kept: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending indices of those of ``count`` tokens that are not in ``kept``, ``(pruned,)``."""
    pruned = torch.ones(count, dtype=torch.bool, device=kept.device)
    pruned[kept] = False
    return pruned.nonzero()[:, 0]


def drop_adjacent_newlines(indices: torch.Tensor, newline_indices: torch.Tensor) -> torch.Tensor:
    """Leave out each newline that follows a newline, so that an empty row has none.

    Parameters
    ----------
    indices : of the tokens that stay, newlines and separators among them, ascending, ``(kept,)``.
    newline_indices : which tokens are newlines, ``(newlines,)``.

    Returns
    -------
    The indices without those, ``(kept - dropped,)``: of neighbouring newlines the first stays.

    Raises
    ------
    ValueError : for the indices of several pages, as different numbers of them would be left.
    """
    if indices.ndim != 1:
        raise ValueError(
            f"the indices of one page are expected, (kept,); got shape {tuple(indices.shape)}; "
            "call it page by page"
        )
    newline = torch.isin(indices, newline_indices)
    follows = torch.zeros_like(newline)
    follows[1:] = newline[:-1]
    return indices[~(newline & follows)]
