"""What run-time methods counted while pages were read, as shares and as metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.eval.ocr import Prediction
from compress.eval.values import Value
from compress.methods.base import RuntimeMethod


def counted(methods: Sequence[RuntimeMethod], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """What the methods counted over all pages."""
    counts: dict[str, Any] = {}
    for method in methods:
        facts = [p.facts[method.name] for p in predictions if p.facts and method.name in p.facts]
        counts |= method.count(facts) if facts else {}
    return counts


def counted_metrics(
    methods: Sequence[RuntimeMethod], counts: Mapping[str, Any], pages: int
) -> dict[str, Value]:
    """The metrics among what :func:`counted` returns; they have no interval."""
    return {
        name: Value(counts[name], metric.how, pages)
        for method in methods
        for name, metric in method.metrics.items()
        if name in counts
    }
