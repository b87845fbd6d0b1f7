"""One measured number with its interval, and how intervals are made."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES = 2000


@dataclass(frozen=True)
class Value:
    """One measured number.

    Parameters
    ----------
    value : the number.
    how : tool, extractor, samples, device.
    n : what it was measured on: images, repeats, or 1 for a count.
    ci95 : 95% confidence interval, or None where there is none (a count, a single seed).
    """

    value: float
    how: str
    n: int = 1
    ci95: tuple[float, float] | None = None


def share_interval(hits: int, n: int) -> tuple[float, float]:
    """95% Wilson interval of a share; it stays inside [0, 1] at the ends too."""
    low, high = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    return float(low), float(high)


def resampled_sums(rows: ArrayLike, seed: int = 0) -> NDArray[np.float64]:
    """Column sums of bootstrap samples: n rows drawn from n with replacement, `RESAMPLES` times.

    Whatever is a function of sums over pages (a mean, a ratio, a mean of means) gets its interval
    from these, with the columns of a page drawn together.

    Parameters
    ----------
    rows : ``(n, columns)``, one row per page or per test.
    seed : of the draws; the same seed gives the same intervals.

    Returns
    -------
    ndarray : float64 ``(RESAMPLES, columns)``.
    """
    values = np.asarray(rows, dtype=np.float64)
    n = len(values)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return draws @ values


def percentile_interval(statistics: ArrayLike, n: int) -> tuple[float, float] | None:
    """Middle 95% of bootstrapped statistics; None for n < 2, where they cannot vary.

    Statistics that are not finite (a resample without any page that has the thing) are left out.
    """
    values = np.asarray(statistics, dtype=np.float64)
    values = values[np.isfinite(values)]
    if n < 2 or len(values) == 0:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def ratio_of_sums(numerators: ArrayLike, denominators: ArrayLike, how: str, seed: int = 0) -> Value:
    """Sum of numerators over sum of denominators, with a bootstrap interval over the pages.

    Parameters
    ----------
    numerators, denominators : ``(n,)``, one pair per page; the denominators sum to more than 0.
    how : what `Value.how` says.
    seed : of the bootstrap.
    """
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if above.ndim != 1 or above.shape != below.shape or not below.sum() > 0:
        raise ValueError(
            "a ratio of sums needs one numerator and one denominator per page and a positive sum "
            f"of denominators; got shapes {above.shape} and {below.shape}, sum {below.sum():g}; "
            "leave out what has nothing to divide by"
        )
    sums = resampled_sums(np.stack([above, below], axis=1), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = sums[:, 0] / sums[:, 1]
    n = len(above)
    value = float(above.sum() / below.sum())
    return Value(value, how, n, percentile_interval(resampled, n))


def page_mean(values: ArrayLike, how: str, seed: int = 0) -> Value:
    """Mean of one number per page, each page counting the same, with a bootstrap interval."""
    return ratio_of_sums(values, np.ones(len(np.asarray(values))), how, seed)


def share(hits: int, n: int, how: str) -> Value:
    """Share of pages, with its Wilson interval."""
    return Value(hits / n, how, n, share_interval(hits, n))
