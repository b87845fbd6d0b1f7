"""Named parts of a computation that can be timed; where they are not, they cost nothing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

Watch = Callable[[str], AbstractContextManager[None]]
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A part of the computation; stages may lie inside each other."""
    watch = _watch.get()
    if watch is None:
        yield
        return
    with watch(name):
        yield


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Enter ``watch(name)`` around every stage inside."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
