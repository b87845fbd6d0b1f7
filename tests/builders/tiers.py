"""What is tried by default, and what slowly."""

from collections.abc import Iterable

import pytest


def few(names: Iterable, *chosen: object) -> list:
    """Parameters of all names: the chosen ones are tried by default, the others slowly."""
    return [pytest.param(n, marks=() if n in chosen else pytest.mark.slow) for n in names]
