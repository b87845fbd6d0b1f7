"""Generators of events, drained or left before their end."""

from collections.abc import Generator
from itertools import islice
from typing import Any, TypeVar

Event = TypeVar("Event")
Result = TypeVar("Result")


def finish(events: Generator[Event, Any, Result]) -> tuple[list[Event], Result]:
    """Run to the end; returns all events and the result."""
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as stop:
            return seen, stop.value


def leave(events: Generator[Event, Any, Any], count: int) -> list[Event]:
    """Close the generator after so many events; returns these."""
    seen = list(islice(events, count))
    events.close()
    return seen
