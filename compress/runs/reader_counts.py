"""What run-time methods counted while pages were read, as shares and as metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.eval.ocr import Prediction
from compress.eval.values import Value

HOW = {
    "tokens_kept": "share of the visual tokens that reach the decoder, over all pages, counted",
    "attended": "share of the visual tokens that a layer attends to in a decode step, mean over "
    "layers and steps, counted in the attention function",
    "saccades": "share of the decode steps that the guard opened, counted",
}


def counted_metrics(counts: Mapping[str, Any], pages: int) -> dict[str, Value]:
    """The shares among what :func:`counted` returns, as metrics; they have no interval."""
    return {name: Value(counts[name], how, pages) for name, how in HOW.items() if name in counts}


def counted(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """What the methods counted over all pages.

    Returns
    -------
    ``tokens_kept``, of RTPrune: share of the visual tokens, newlines included, that reach the
    decoder; ``attended``, of FastOCR: share of the visual tokens that a layer attends to in a
    decode step, mean over layers and steps, and ``attended_by_layer``; ``saccades``: share of the
    steps that the guard opened; ``switched_off``: pages that it left to dense attention, if any.
    """
    facts = [p.facts for p in predictions if p.facts]
    found: dict[str, Any] = {}
    totals = [f["rtprune"]["total"] for f in facts if "rtprune" in f]
    if totals:
        given, kept = (sum(t[key] for t in totals) for key in ("visual_tokens", "visual_kept"))
        found["tokens_kept"] = kept / given
    counts = [f["fastocr"] for f in facts if "fastocr" in f and f["fastocr"]["steps"]]
    if counts:
        offered = [c["steps"] * c["visual_tokens"] for c in counts]
        found["attended_by_layer"] = [
            sum(share * weight for share, weight in zip(layer, offered, strict=True)) / sum(offered)
            for layer in zip(*(c["attended_by_layer"] for c in counts), strict=True)
        ]
        layers = found["attended_by_layer"]
        found["attended"] = sum(layers) / len(layers)
        if off := sum(c.get("switched_off", 0) for c in counts):
            found["switched_off"] = off
        steps = [c["steps"] for c in counts]
        found["saccades"] = sum(
            c["saccades"] * n for c, n in zip(counts, steps, strict=True)
        ) / sum(steps)
    return found
