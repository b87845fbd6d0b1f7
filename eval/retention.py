"""How much of a dense model's accuracy a compressed one retains on the same pages."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.eval.values import Value, percentile_interval


@dataclass(frozen=True)
class Accuracy:
    """The number that retention is measured on, with its bootstrap.

    Parameters
    ----------
    name : such as ``1 - CER``.
    value : over all pages; higher is better.
    resampled : the same of each bootstrap sample, ``(RESAMPLES,)``. With one seed the samples of
        all models that read the same pages are the same, so ratios of two are paired.
    n : how many ``drawn`` there are.
    drawn : what the bootstrap draws.
    """

    name: str
    value: float
    resampled: NDArray[np.float64]
    n: int
    drawn: str = "pages"


def retention(compressed: Accuracy, dense: Accuracy) -> Value:
    """Accuracy of a compressed model over that of the dense one, with a paired interval.

    Accuracy is not clipped: a model that writes more than there is can fall below 0.

    Raises
    ------
    ValueError : when the two are not of the same pages, or the dense model reads nothing right.
    """
    if (compressed.name, compressed.n) != (dense.name, dense.n):
        raise ValueError(
            "both models must be measured alike on the same pages; got "
            f"{compressed.name} of {compressed.n} {compressed.drawn} and {dense.name} of "
            f"{dense.n} {dense.drawn}; read the same pages with both"
        )
    if dense.value <= 0:
        raise ValueError(
            f"retention is measured against a dense model that reads; its {dense.name} is "
            f"{dense.value:.4g} on these pages; choose pages that it can read"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = compressed.resampled / dense.resampled
    how = f"{dense.name} over that of the dense model, paired bootstrap over {dense.drawn}"
    interval = percentile_interval(resampled, dense.n)
    return Value(compressed.value / dense.value, how, dense.n, interval)


def worst_page_delta(compressed: Mapping[str, float], dense: Mapping[str, float]) -> Value:
    """Largest rise of a page's normalised edit distance, and on which page it is.

    Parameters
    ----------
    compressed, dense : page -> distance in [0, 1], of at least one page. Only pages of both count.
    """
    rise = {page: compressed[page] - dense[page] for page in dense if page in compressed}
    worst = max(rise, key=lambda page: rise[page])
    how = (
        f"page {worst}, edit distance {dense[worst]:.4g} dense, {compressed[worst]:.4g} compressed"
    )
    return Value(rise[worst], f"{how}; the largest rise of {len(rise)} pages", len(rise))
