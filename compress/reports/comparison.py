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
from compress.eval.metrics import METRICS, arrow, number_text
from compress.reports.run_folder import metric_of, read_metrics


@dataclass(frozen=True)
class Comparison:
    """Several runs, metric by metric.

    ``rows`` is JSON: for each metric its ``metric``, ``better``, ``unit``, ``best`` (the name of
    the run with the best value) and ``runs``: name -> {value, ci95, n}, in the order given. The
    first column is ``dense`` where all runs measured the same dense value.
    """

    names: tuple[str, ...]
    rows: list[dict[str, Any]]

    def to_text(self, width: int | None = None) -> str:
        """Draw a table for a terminal: runs as columns, the best run of a row marked with ``*``."""
        width = width or max(80, shutil.get_terminal_size().columns)
        # Text everywhere: in a plain string rich would read [brackets] as markup
        note = Text("[low, high]: 95% interval; *: best run")
        table = Table(box=box.SIMPLE, caption=note, caption_justify="left")
        table.add_column("metric")
        for name in self.names:
            # folded, not cut: a column is known by its whole name
            table.add_column(Text(name), justify="right", overflow="fold")
        for row in self.rows:
            mark = arrow(row["better"])
            cells = [self._text_cell(row, name) for name in self.names]
            table.add_row(f"{metric_of(row['metric']).label} {mark}", *map(Text, cells))
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
        text = number_text(side["value"], row["unit"]) + star
        if side.get("ci95"):
            low, high = (number_text(bound, row["unit"]) for bound in side["ci95"])
            text += f"\n[{low}, {high}]"
        return text

    def plot(self, path: Path) -> Path:
        """Write one PNG: a small panel per metric, a point and its interval per run."""
        from compress.reports.figures import comparison_panels

        write_bytes(path, comparison_panels(self.names, self.rows))
        return path


def compare(folders: Sequence[Path]) -> Comparison:
    """Put finished runs side by side, and evaluations of readers.

    Parameters
    ----------
    folders : of finished runs or evaluations; at least one. Runs with the same folder name get
        their whole path.

    Raises
    ------
    ValueError : for no folder, the same folder twice, or a folder that is no finished run.
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
    runs = {name: read_metrics(path)["metrics"] for name, path in zip(names, paths, strict=True)}
    metrics = {metric: entry for run in runs.values() for metric, entry in run.items()}
    # the order of the suite, whichever run a metric comes from
    order = sorted(metrics, key=lambda m: list(METRICS).index(m) if m in METRICS else len(METRICS))
    rows = [_row(metric, metrics[metric], runs) for metric in order]
    columns = ["dense"] if any("dense" in row["runs"] for row in rows) else []
    return Comparison((*columns, *names), rows)


def _row(
    metric: str, entry: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    # an evaluation measures one model: its entry has no sides
    entries = {name: run[metric] for name, run in runs.items() if metric in run}
    sides = {name: one.get("compressed", one) for name, one in entries.items()}
    values = {name: side["value"] for name, side in sides.items()}
    choose = {"lower": min, "higher": max}.get(entry.get("better", ""))
    best = choose(values, key=lambda name: values[name]) if choose else None
    # no run is best where another one has the same value
    alone = best is not None and list(values.values()).count(values[best]) == 1 and len(runs) > 1
    dense = [one["dense"] for one in entries.values() if "dense" in one]
    same = bool(dense) and all(
        side and np.isclose(side["value"], dense[0]["value"], rtol=1e-7, atol=0) for side in dense
    )
    return {
        "metric": metric,
        "better": entry.get("better", ""),
        "unit": entry.get("unit", ""),
        "best": best if alone else None,
        "runs": ({"dense": dense[0]} if same else {}) | sides,
    }
