"""Several finished runs as one table and one plot."""

import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.common.files import write_bytes
from compress.common.output_folder import check_new_file
from compress.eval.metrics import GROUPS, arrow, number_text, side_text
from compress.reports.run_folder import grouped, metric_of, read_metrics

# what runs must have in common to be compared -> the facts of a run that say it
COMMON = {"base model": ("base_model", "model"), "data": ("data",), "device": ("device",)}


@dataclass(frozen=True)
class Comparison:
    """Several runs, metric by metric.

    ``rows`` is JSON: for each metric its ``metric``, ``group``, ``better``, ``unit``, ``best`` (the
    name of the run with the best value, None where no other run has one to compare) and ``runs``:
    name -> {value, ci95, n}, in the order given. The first column is ``dense`` where all runs
    measured the same dense value. ``differences`` says in words what keeps the runs from being
    compared; then no run is best.
    """

    names: tuple[str, ...]
    rows: list[dict[str, Any]]
    differences: tuple[str, ...] = ()

    def to_text(self, width: int | None = None) -> str:
        """Draw a table for a terminal: runs as columns, the best run of a row marked with ``*``."""
        width = width or max(80, shutil.get_terminal_size().columns)
        # Text everywhere: in a plain string rich would read [brackets] as markup
        notes = ["[low, high]: 95% interval; *: best run"]
        if self.differences:
            notes = [notes[0].partition(";")[0], *self.differences, "no run is marked as the best"]
        note = Text("\n".join(notes))
        table = Table(box=box.SIMPLE, caption=note, caption_justify="left")
        table.add_column("metric")
        for name in self.names:
            # folded, not cut: a column is known by its whole name
            table.add_column(Text(name), justify="right", overflow="fold")
        group = None
        for row in self.rows:
            if row["group"] != group:
                group = row["group"]
                table.add_section()
                table.add_row(Text(GROUPS[group].upper()))
            mark = arrow(row["better"])
            cells = [self._text_cell(row, name) for name in self.names]
            table.add_row(
                Text(f"{metric_of(row['metric']).label} {mark}".rstrip()), *map(Text, cells)
            )
        console = Console(file=io.StringIO(), width=width, color_system=None)
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip("\n")

    @staticmethod
    def _text_cell(row: Mapping[str, Any], name: str) -> str:
        side = row["runs"].get(name)
        if side is None:
            return "-"
        star = " *" if row["best"] == name else ""
        text = side_text(side, row["unit"]) + star
        if side.get("ci95"):
            low, high = (number_text(bound, row["unit"]) for bound in side["ci95"])
            text += f"\n[{low}, {high}]"
        return text

    def plot(self, path: Path) -> Path:
        """Write one PNG: a small panel per metric, a point and its interval per run.

        Metrics of which there is one value have no panel, nor have those of the group "more"
        unless there are no others.

        Raises
        ------
        FileExistsError : when the file is there.
        ValueError : where no metric has two values.
        """
        from compress.reports.figures import comparison_panels

        rows = [
            {**row, "runs": {n: side for n, side in row["runs"].items() if "why" not in side}}
            for row in self.rows
        ]
        rows = [row for row in rows if len(row["runs"]) > 1]
        rows = [row for row in rows if row["group"] != "more"] or rows
        if not rows:
            raise ValueError(
                "a plot compares values, two or more of one metric; no metric of "
                f"{', '.join(self.names)} has two; name runs of one kind"
            )
        check_new_file(path)
        write_bytes(path, comparison_panels(self.names, rows))
        return path


def compare(folders: Sequence[Path]) -> Comparison:
    """Put finished runs side by side, and evaluations of readers.

    Parameters
    ----------
    folders : of finished runs or evaluations; at least one. Runs with the same folder name get
        their whole path.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("a comparison needs the folder of at least one finished run; got none")
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ValueError(
            f"runs must differ; got the same folder twice in {', '.join(map(str, paths))}; name "
            "each once"
        )
    short = [path.name for path in resolved]
    clash = len(set(short)) < len(short) or "dense" in short
    names = [str(path) if clash else name for path, name in zip(paths, short, strict=True)]
    read = {name: read_metrics(path) for name, path in zip(names, paths, strict=True)}
    runs = {name: content["metrics"] for name, content in read.items()}
    differences = _differences({name: content.get("run", {}) for name, content in read.items()})
    metrics = {metric: entry for run in runs.values() for metric, entry in run.items()}
    rows = [
        {"group": group} | _row(metric, metrics[metric], runs, starred=not differences)
        for group, members in grouped(metrics).items()
        for metric in members
    ]
    columns = ["dense"] if any("dense" in row["runs"] for row in rows) else []
    return Comparison((*columns, *names), rows, differences)


def _differences(facts: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """What the runs should have in common and have not; what no run says is no difference."""
    differences = []
    for name, keys in COMMON.items():
        values = {
            run: next((str(known[key]) for key in keys if key in known), "not known")
            for run, known in facts.items()
        }
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{run}: {value}" for run, value in values.items())
            differences.append(f"the {name} differs ({listed})")
    return tuple(differences)


def _row(
    metric: str,
    entry: Mapping[str, Any],
    runs: Mapping[str, Mapping[str, Any]],
    *,
    starred: bool,
) -> dict[str, Any]:
    # an evaluation measures one model: its entry has no sides
    entries = {name: run[metric] for name, run in runs.items() if metric in run}
    sides = {name: one.get("compressed", one) for name, one in entries.items()}
    values = {name: side["value"] for name, side in sides.items() if "why" not in side}
    # none is best alone, or of values that were measured on unlike numbers of things
    comparable = starred and len(values) > 1 and len({sides[name].get("n") for name in values}) == 1
    choose = {"lower": min, "higher": max}.get(entry.get("better", "")) if comparable else None
    best = choose(values, key=lambda name: values[name]) if choose else None
    # nor where another one has the same value
    if best is not None and list(values.values()).count(values[best]) > 1:
        best = None
    dense = [one["dense"] for one in entries.values() if "dense" in one]
    dense = [side for side in dense if not side or "why" not in side]
    same = bool(dense) and all(
        side and np.isclose(side["value"], dense[0]["value"], rtol=1e-7, atol=0) for side in dense
    )
    return {
        "metric": metric,
        "better": entry.get("better", ""),
        "unit": entry.get("unit") or metric_of(metric).unit,
        "best": best,
        "runs": ({"dense": dense[0]} if same else {}) | sides,
    }
