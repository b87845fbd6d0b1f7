"""The methods that there are: recipes, the Python API, benchmarks and tables follow from this list.

A new method is an import and an entry of ``_KINDS``.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union

from pydantic import Field, TypeAdapter

from compress.methods.base import Method, RuntimeMethod, WeightMethod
from compress.methods.fastocr import FastOCR
from compress.methods.gradflow import GradFlow, OneShot
from compress.methods.pixelprune import PixelPrune
from compress.methods.rtprune import RTPrune

M = TypeVar("M", bound=Method)

_KINDS: tuple[type[Method], ...] = (GradFlow, OneShot, RTPrune, FastOCR, PixelPrune)


def _named(base: type[M]) -> dict[str, type[M]]:
    kinds = {kind.model_fields["name"].default: kind for kind in _KINDS if issubclass(kind, base)}
    return dict(kinds)


METHODS = _named(Method)
WEIGHT_METHODS = _named(WeightMethod)
RUNTIME_METHODS = _named(RuntimeMethod)

if TYPE_CHECKING:
    from compress.bench.suite import Benchmark

    AnyWeightMethod = WeightMethod
    AnyRuntimeMethod = RuntimeMethod
else:  # what recipes and checkpoints are validated by; the name decides
    AnyWeightMethod, AnyRuntimeMethod = (
        Annotated[Union[tuple(named.values())], Field(discriminator="name")]  # noqa: UP007
        for named in (WEIGHT_METHODS, RUNTIME_METHODS)
    )

_RUNTIME: TypeAdapter[RuntimeMethod] = TypeAdapter(AnyRuntimeMethod)


def named(name: str) -> type[Method]:
    """The method of a name."""
    if name not in METHODS:
        raise ValueError(f"methods are {', '.join(METHODS)}; got {name!r}; name one of them")
    return METHODS[name]


def runtime_method(settings: Mapping[str, Any]) -> RuntimeMethod:
    """A run-time method from its settings as JSON, as checkpoints and metrics hold them."""
    return _RUNTIME.validate_python(settings)


def benchmarks() -> dict[str, "Benchmark"]:
    """What ``compress bench`` times, by name: methods that have a benchmark, and the kernels."""
    from compress.bench.kernels import BENCHMARK

    return {b.name: b for b in (*(kind.benchmark() for kind in _KINDS), BENCHMARK) if b is not None}
