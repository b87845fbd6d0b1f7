"""Measured rows (JSON lines) and the Markdown tables that are generated from them."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.common.files import write_text
from compress.eval.metrics import METRICS

Row = dict[str, Any]
Cell = Callable[[Row], str]

QUALITY = ("fid_digits", "kid_digits", "ssim_to_dense", "validation_loss")


def read_rows(path: Path) -> list[Row]:
    """All rows of a results file; none where there is no file.

    Raises
    ------
    ValueError : naming the damaged line.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} should be a JSON object but does not parse: {error}; "
                "remove the line"
            ) from error
    return rows


def append_row(path: Path, row: Row) -> None:
    """Append one row as one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf8") as file:
        file.write(json.dumps(row) + "\n")


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; nan for the deviation of a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def render(
    rows: Sequence[Row],
    labels: Mapping[str, Sequence[str]],
    by: Sequence[str],
    columns: Sequence[str] = QUALITY,
) -> str:
    """A Markdown table: one line per label, mean ± standard deviation over seeds, best in bold.

    Parameters
    ----------
    rows : with ``labels`` (a mapping) and ``values``.
    labels : label name -> its values, in the order of the table.
    by : label names whose values open a new comparison: the best is bold within each.
    columns : names in :data:`compress.eval.metrics.METRICS`.
    """
    names = list(labels)
    headings = [f"{METRICS[c].column()} {METRICS[c].arrow}" for c in columns]
    lines = [
        "| " + " | ".join([*names, "seeds", *headings]) + " |",
        "|" + "---|" * (len(names) + 1 + len(columns)),
    ]
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = tuple(str(row["labels"].get(name)) for name in names)
        found.setdefault(key, []).append(row)

    def position(key: tuple[str, ...]) -> list[int]:
        return [list(map(str, labels[n])).index(v) for n, v in zip(names, key, strict=True)]

    keys = sorted((k for k in found if _known(k, labels)), key=position)
    means = {
        key: {c: mean_and_std([r["values"][c] for r in found[key]]) for c in columns}
        for key in keys
    }
    for key in keys:
        rivals = [
            other for other in keys if all(other[names.index(b)] == key[names.index(b)] for b in by)
        ]
        cells = []
        for column in columns:
            metric = METRICS[column]
            choose = min if metric.better == "lower" else max
            best = choose(means[other][column][0] for other in rivals)
            mean, std = means[key][column]
            text = metric.cell(mean) + ("" if math.isnan(std) else f" ± {metric.cell(std)}")
            cells.append(f"**{text}**" if mean == best and len(rivals) > 1 else text)
        lines.append("| " + " | ".join([*key, str(len(found[key])), *cells]) + " |")
    return "\n".join(lines)


def cell_table(rows: Sequence[Row], columns: Mapping[str, Cell]) -> str:
    """A Markdown table, a line for each row; a column has a heading and what it says of a row."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]
    return "\n".join(lines)


def _known(key: Sequence[str], labels: Mapping[str, Sequence[str]]) -> bool:
    return all(v in map(str, labels[n]) for n, v in zip(labels, key, strict=True))


def fill(document: str, name: str, table: str) -> str:
    """Put a table between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``.

    Raises
    ------
    ValueError : when the document lacks the marks.
    """
    pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)", re.S)
    if not pattern.search(document):
        raise ValueError(
            f"a place between <!-- table:{name} --> and <!-- /table:{name} --> is expected in the "
            "document; found none; add the two marks"
        )
    return pattern.sub(lambda m: f"{m[1]}{table}\n{m[2]}", document)


def fill_file(path: Path, tables: Mapping[str, str]) -> None:
    """Write tables into their places in a document."""
    text = path.read_text(encoding="utf8")
    for name, table in tables.items():
        text = fill(text, name, table)
    write_text(path, text)
