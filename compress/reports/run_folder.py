"""What a run folder holds: facts, log, samples, and the variants of a run on a reader."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

from compress.common.files import json_lines, read_json
from compress.common.foreign import foreign
from compress.eval.metrics import GROUPS, METRICS, Group, Metric, metric
from compress.methods.base import RunRecord, RuntimeMethod
from compress.methods.registry import METHODS, runtime_method

OF_METHODS = {
    name: known
    for method in METHODS.values()
    if issubclass(method, RuntimeMethod)
    for name, known in method.metrics.items()
}
# what accuracy retention is measured on -> the metric that says how good a variant is by itself
MEASURES = {"1 - CER": "cer_corpus"}


@dataclass(frozen=True)
class Run(RunRecord):
    """What a run folder holds, read once; the parts beside the metrics are empty where it has none.

    Attributes
    ----------
    folder : of the run.
    recipe_text, recipe : as it was resolved.
    samples : images by the side that they are of, uint8 ``(n, channels, height, width)``.
    """

    folder: Path
    recipe_text: str
    recipe: Mapping[str, Any]
    samples: Mapping[str, np.ndarray]


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Raises
    ------
    ValueError : when the folder is no finished run, or a file in it is damaged; names the file.
    """
    metrics = read_metrics(folder)
    recipe_file = folder / "recipe.yaml"
    recipe_text = recipe_file.read_text(encoding="utf8") if recipe_file.is_file() else ""
    with foreign(recipe_file, "YAML"):
        recipe = yaml.safe_load(recipe_text)
    return Run(
        metrics=metrics,
        log=_read_log(folder / "log.jsonl"),
        trace=_read_tensors(folder / "trace.safetensors"),
        folder=folder,
        recipe_text=recipe_text,
        recipe=recipe if isinstance(recipe, dict) else {},
        samples=_read_tensors(folder / "samples.safetensors"),
    )


def read_metrics(folder: Path) -> dict[str, Any]:
    """``metrics.json`` of a finished run, or of an evaluation, whose metrics have no sides."""
    folder = Path(folder)
    try:
        metrics = read_json(folder / "metrics.json")
    except (FileNotFoundError, NotADirectoryError) as error:
        state = "a folder without one" if folder.is_dir() else "no such folder"
        raise ValueError(
            f"a finished run has a metrics.json; {folder} is {state}; give the output folder of a "
            "finished run, or finish it with compress run --resume"
        ) from error
    if not isinstance(metrics, dict) or not isinstance(metrics.get("metrics"), dict):
        raise ValueError(
            f"{folder / 'metrics.json'} should hold an object with 'metrics' in it; it does not; "
            "run again with --overwrite"
        )
    return metrics


def _read_log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by stage in the order of steps; of a row written twice (after a resume) the last."""
    rows: dict[tuple[str, int, str], dict[str, Any]] = {}
    if path.is_file():
        for number, line in json_lines(path):
            what = "a JSON object with stage and step"
            with foreign(f"line {number} of {path}", what, "remove the line"):
                row = json.loads(line)
                rows[row["stage"], row["step"], row.get("net", "")] = row
    stages: dict[str, list[dict[str, Any]]] = {}
    for _, row in sorted(rows.items(), key=lambda item: item[0][1]):
        stages.setdefault(row["stage"], []).append(row)
    return stages


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    with foreign(path, "safetensors", "run again with --overwrite"):
        return load_file(path)


def metric_of(name: str) -> Metric:
    """What is known of a metric by its name in metrics.json, those of the methods included."""
    return metric(name, OF_METHODS)


def grouped(names: Iterable[str]) -> dict[Group, list[str]]:
    """Metrics by their group, groups and metrics in the order of the registry."""
    order = {name: place for place, name in enumerate([*OF_METHODS, *METRICS])}
    known = sorted(names, key=lambda name: order.get(name, len(order)))
    groups = {group: [n for n in known if metric_of(n).group == group] for group in GROUPS}
    return {group: members for group, members in groups.items() if members}


# ---- the variants of a run on a reader ---------------------------------------------------------


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
    """What the methods of a variant are set to keep."""
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
