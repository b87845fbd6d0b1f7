"""Work that reports its progress is a generator of events; this runs one to its end."""

from collections.abc import Generator
from typing import TypeVar

R = TypeVar("R")


def drain(events: Generator[object, None, R]) -> R:
    """Run a generator to its end, ignore what it yields, and return its result."""
    while True:
        try:
            next(events)
        except StopIteration as stop:
            return stop.value
