"""Change how a model generates until a context is left, and refuse what cannot work there."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from transformers import GenerationConfig
from transformers.generation import GenerationMode

Check = Callable[[GenerationMode, GenerationConfig], None]
CAPTURES = "_captures_over_static_caches"


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute of its own until the context is left; one may lie in another."""
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:  # contexts that are not left are collected, in any order
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def replaced_method(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Let ``owner.name(...)`` call ``wrapper(original method, ...)`` until the context is left."""
    original = getattr(owner, name)
    value = functools.wraps(original)(functools.partial(wrapper, original))
    with _replaced(owner, name, value):
        yield


@contextmanager
def checked_generation(model: Any, check: Check) -> Iterator[None]:
    """Let ``check`` refuse calls of ``model.generate`` before they run anything.

    Decode steps are not compiled: transformers compiles those with a static cache on a GPU, which
    the forward hooks of a method cannot be.

    Parameters
    ----------
    model : of transformers.
    check : given the mode and the settings of a call, with all defaults filled in; raises
        ValueError for what cannot work.
    """

    def validate(original: Callable[..., Any], mode: Any, config: Any, kwargs: Any) -> Any:
        check(mode, config)
        result = original(mode, config, kwargs)
        config.disable_compile = True  # last: an earlier method's check is given what the user said
        return result

    with replaced_method(model, "_validate_generation_mode", validate):
        yield


def static_caches(model: Any, captures: Callable[[], bool]) -> AbstractContextManager[None]:
    """Let :func:`fastest_cache` choose a static cache for ``model`` until the context is left.

    Parameters
    ----------
    model : of transformers.
    captures : says, before an answer, whether its decode steps will be captured over such a cache.
    """
    return _replaced(model, CAPTURES, captures)


def fastest_cache(model: Any) -> dict[str, Any]:
    """Settings of ``model.generate`` by which a method that is attached decodes fastest."""
    captures = vars(model).get(CAPTURES)
    return {"cache_implementation": "static"} if captures and captures() else {}
