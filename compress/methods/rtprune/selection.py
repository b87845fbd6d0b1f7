"""Which tokens of a page stay: the first stage of RTPrune (arXiv 2605.00392), and newlines.

Tokens that the decoder attends to first have a large norm.
"""

import torch


def by_norm(features: torch.Tensor) -> torch.Tensor:
    """The tokens ``(..., tokens, dim)`` by their L2 norm, those that stay first.

    Returns
    -------
    Their indices, ``(..., tokens)``; of equal norms the one that comes first on the page is first.
    """
    check_features(features)
    return ranked(features.float().norm(dim=-1))


def ranked(scores: torch.Tensor) -> torch.Tensor:
    """Indices of scores ``(..., tokens)``, the largest first, of equal ones the first.

    ``topk`` would take any of these, and others in a batch.
    """
    return scores.argsort(dim=-1, descending=True, stable=True)


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
