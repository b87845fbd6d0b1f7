"""The table of one recipe on 1, 2 and 4 processes: the same masks, the same metrics.

What a process rounds depends on how many images it sees at once, so each number of processes is
compared twice: with one process, and with one process that sees as few images at once.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compress.common.files import read_json
from compress.eval import tables
from compress.eval.metrics import METRICS
from compress.tables.diffusion import beside, commit

NAME = "processes"
RECIPE = "ddpm_gradflow"
# processes and the micro-batches of each, after those that they are compared with
CELLS = ((1, 1), (1, 2), (2, 1), (1, 4), (4, 1))
WEIGHTS = Path("checkpoint", "unet", "diffusion_pytorch_model.safetensors")


def results_file(results: Path) -> Path:
    """Where the rows are kept, beside those of the other tables."""
    return beside(results, NAME)


def run_missing(results: Path, runs: Path) -> Iterator[str]:
    """Run the recipe on each number of processes that has no row yet.

    Parameters
    ----------
    results : rows of another table; these go beside it.
    runs : where the runs are; all of them are needed, since they are compared with the first.

    Yields
    ------
    Lines to show.

    Raises
    ------
    ValueError : when a run fails.
    """
    path = results_file(results)
    if len(tables.read_rows(path)) == len(CELLS):
        return
    path.unlink(missing_ok=True)
    for processes, parts in CELLS:
        yield f"{RECIPE} on {processes} process(es), in {parts} micro-batch(es) each"
        folder = _folder(runs, processes, parts)
        # without metrics it is not finished; with them only its row may be missing
        if not (folder / "metrics.json").exists():
            _run(folder, processes, parts)
        one, alike = _folder(runs, 1, 1), _folder(runs, 1, processes * parts)
        tables.append_row(path, make_row(folder, parts, one, alike))


def _folder(runs: Path, processes: int, parts: int) -> Path:
    return runs / f"table_processes_{processes}x{parts}"


def _run(folder: Path, processes: int, parts: int) -> None:
    command = ["run", RECIPE, "--processes", str(processes), "--output", str(folder)]
    command += ["--set", f"train.gradient_accumulation={parts}"]
    command += ["--resume"] if folder.exists() else []
    # -P: a checkout's kernels/ must not be found as a top-level module
    done = subprocess.run(
        [sys.executable, "-P", "-m", "compress.cli", *command],
        capture_output=True,
        text=True,
        check=False,
        # as many for each: another number of threads sums in another order
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise ValueError(
            f"expected {RECIPE} to run on {processes} processes; it ended with "
            f"{done.returncode}: {done.stderr.strip()[-500:]}; mend that and run again"
        )


def make_row(folder: Path, parts: int, one: Path, alike: Path) -> dict[str, Any]:
    """A finished run's metrics, and how far its masks and weights are from those of other runs.

    Parameters
    ----------
    folder : of the run.
    parts : micro-batches of each of its processes.
    one : the run of one process that sees the whole batch at once.
    alike : that of one process that sees as many images at once as this run's.
    """
    metrics = read_json(folder / "metrics.json")
    facts = metrics["run"]
    measured = {name: metrics["metrics"][name]["compressed"] for name in tables.QUALITY}
    return {
        "key": f"{RECIPE} on {facts['processes']}x{parts}",
        "command": f"compress tables {NAME}",
        "recipe": RECIPE,
        "commit": commit(),
        "date": facts["created"],
        **{name: facts[name] for name in ("processes", "seed", "device", "threads", "versions")},
        "gradient_accumulation": parts,
        "train_seconds": round(facts["train_seconds"], 1),
        "widths": [w["compressed"] for w in metrics["widths"]],
        "values": {name: found["value"] for name, found in measured.items()},
        "ci95": {name: found["ci95"] for name, found in measured.items()},
        "from_one": compare(folder, one),
        "from_alike": compare(folder, alike),
    }


def compare(folder: Path, first: Path) -> dict[str, Any]:
    """How far two runs are apart.

    Returns
    -------
    ``soft_mask_difference``, the largest of the traced units at any update before the last, where
    masks are binary; ``same_kept``, whether the last are equal; ``weight_difference``, the largest
    of the slim weights, which have the same shapes and stay close for equal kept sets only.
    """
    (mine, ours), (other, theirs) = (
        (load_file(run / "trace.safetensors")["masks"], load_file(run / WEIGHTS))
        for run in (folder, first)
    )
    weights = [(ours[name].float() - tensor.float()).abs().max() for name, tensor in theirs.items()]
    return {
        "soft_mask_difference": (mine[:-1] - other[:-1]).abs().max().item(),
        "same_kept": torch.equal(mine[-1], other[-1]),
        "weight_difference": max(weights).item(),
    }


def render_table(results: Path) -> str:
    """The table in Markdown from the rows that are there."""
    path = results_file(results)
    rows = tables.read_rows(path)
    if not rows:
        return f"*No rows yet: run `compress tables {NAME}`.*"
    columns: dict[str, Callable[[tables.Row], str]] = {
        "processes": lambda row: str(row["processes"]),
        "micro-batches of each": lambda row: str(row["gradient_accumulation"]),
        **{
            f"{METRICS[name].column()} {METRICS[name].arrow}": partial(_cell, name)
            for name in tables.QUALITY
        },
        "same kept units": lambda row: "yes" if row["from_one"]["same_kept"] else "NO",
        "soft masks apart, at most": partial(_apart, "from_one", "soft_mask_difference"),
        "slim weights apart": partial(_apart, "from_one", "weight_difference"),
        "masks apart, alike": partial(_apart, "from_alike", "soft_mask_difference"),
        "weights apart, alike": partial(_apart, "from_alike", "weight_difference"),
    }
    note = (
        f"`{RECIPE}` as it ships, on the CPU over gloo, the same batch in all shared between the "
        "processes, and cut into micro-batches by `train.gradient_accumulation`. Masks and weights "
        "are compared with those of one process, and of one process in micro-batches of the same "
        "size (alike). 95% intervals over sampling seeds. Made by "
        f"`compress tables {NAME} --update README.md`; rows in `eval/results/{path.name}`."
    )
    return f"{tables.cell_table(rows, columns)}\n\n{note}"


def _apart(other: str, what: str, row: tables.Row) -> str:
    return f"{row[other][what]:.1e}"


def _cell(name: str, row: tables.Row) -> str:
    metric = METRICS[name]
    shown = metric.cell(row["values"][name])
    if row["ci95"][name] is None:
        return shown
    low, high = map(metric.cell, row["ci95"][name])
    return f"{shown} [{low}, {high}]"
