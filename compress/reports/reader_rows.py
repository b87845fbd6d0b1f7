"""A row of metrics.json of a run on a reader: how a variant is called and what it used."""

from collections.abc import Mapping, Sequence
from typing import Any

# what accuracy retention is measured on -> the metric that says how good a variant is by itself
MEASURES = {"1 - CER": "cer_corpus"}
SHARES = {"tokens_kept": "kept", "attended": "attended", "saccades": "saccades"}


def measure(accuracy: str) -> str:
    """The metric behind an accuracy: CER for ``1 - CER``; a benchmark's score is its own."""
    return MEASURES.get(accuracy, accuracy)


def used_text(row: Mapping[str, Any]) -> str:
    """What a variant used of the visual tokens, with what that is made of."""
    used = used_share(row)
    if used is None:
        return "100%"
    parts = [f"{name} {row[key]:.2%}" for key, name in SHARES.items() if key in row]
    return f"{used:.2%} ({', '.join(parts)})"


def used_share(row: Mapping[str, Any]) -> float | None:
    """Share of the visual tokens that a variant used: kept, times attended of the kept."""
    if "tokens_kept" not in row and "attended" not in row:
        return None
    return row.get("tokens_kept", 1.0) * row.get("attended", 1.0)


def series_name(row: Mapping[str, Any]) -> str:
    """The variants that differ in their budget only are one curve."""
    parts = []
    for method in row["methods"]:
        if method["name"] == "fastocr":
            part = "fastocr" if method["fixation"] == "dynamic" else method["fixation"]
            part += "" if method["reuse"] else ", no reuse"
            part += f", guard {method['min_mass']}" if method["min_mass"] else ""
            part += f", dilate {method['dilate']}" if method["dilate"] else ""
            # rows from before there was one have none
            part += f", periphery {method['periphery']}" if method.get("periphery") else ""
        else:
            part = method["select"]
            part += f", merge {method['merge']}" if method["merge"] != 0.1 else ""
            part += ", nearest" if method["transport"] == "nearest" else ""
        parts.append(part)
    return " + ".join(parts)


def keep_text(methods: Sequence[Mapping[str, Any]]) -> str:
    """What the methods of a row were told to keep."""
    kept = []
    for method in methods:
        value = method["keep_visual"] if method["name"] == "fastocr" else method["keep_tokens"]
        kept.append(value if isinstance(value, str) else f"{value:.2%}".replace(".00%", "%"))
    return " + ".join(kept)
