"""A row of metrics.json of a run on a reader: how a variant is called and what it used."""

import math
from collections.abc import Mapping
from typing import Any

from compress.methods.base import RuntimeMethod
from compress.methods.registry import runtime_method

# what accuracy retention is measured on -> the metric that says how good a variant is by itself
MEASURES = {"1 - CER": "cer_corpus"}


def measure(accuracy: str) -> str:
    """The metric behind an accuracy: CER for ``1 - CER``; a benchmark's score is its own."""
    return MEASURES.get(accuracy, accuracy)


def methods_of(row: Mapping[str, Any]) -> list[RuntimeMethod]:
    """The methods of a variant."""
    return [runtime_method(settings) for settings in row["methods"]]


def series_name(row: Mapping[str, Any]) -> str:
    """The methods of a variant; variants that differ in what they keep alone are one curve."""
    return " + ".join(method.label() for method in methods_of(row))


def keep_text(row: Mapping[str, Any]) -> str:
    """What the methods of a variant were told to keep."""
    return " + ".join(method.kept() for method in methods_of(row))


def used_share(row: Mapping[str, Any]) -> float | None:
    """Share of the visual tokens that a variant used, the product over its methods."""
    shares = [row[method.used] for method in methods_of(row) if method.used in row]
    return math.prod(shares) if shares else None


def used_text(row: Mapping[str, Any]) -> str:
    """What a variant used of the visual tokens, with what its methods counted."""
    used = used_share(row)
    if used is None:
        return "100%"
    names = [name for method in methods_of(row) for name in method.metrics if name in row]
    parts = [f"{name.replace('_', ' ')} {row[name]:.2%}" for name in names]
    return f"{used:.2%} ({', '.join(parts)})"
