"""What is tried by default, and what slowly."""

from collections.abc import Iterable

import pytest


def few(names: Iterable, *chosen: object) -> list:
    """Parameters of all names: the chosen ones are tried by default, the others slowly.

    A tuple is several parameters.
    """
    marks = [(n, () if n in chosen else pytest.mark.slow) for n in names]
    return [pytest.param(*(n if isinstance(n, tuple) else (n,)), marks=m) for n, m in marks]
