"""The table of one recipe on 1, 2 and 4 processes: the same masks, the same metrics.

What a process rounds depends on how many images it sees at once, so each number of processes is
compared twice: with one process, and with one process that sees as few images at once.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compress.common.files import read_json
from compress.eval.metrics import metric
from compress.eval.tables import Cell, Row, cell_table
from compress.runs.recipe import load_pipeline_recipe
from compress.tables.diffusion import quality
from compress.tables.table import Job, Run, Table, has, run_folder, weights

RECIPE = "ddpm_gradflow"
QUALITY = quality("builtin:digits")
# processes, and the micro-batches of each
CELLS = ((1, 1), (1, 2), (2, 1), (1, 4), (4, 1))
WEIGHTS = Path("checkpoint", "unet", "diffusion_pytorch_model.safetensors")
# how far a run is from that of one process, and from that of one process in equal micro-batches
APART = {
    "soft masks apart, at most": ("from_one", "soft_mask_difference"),
    "slim weights apart": ("from_one", "weight_difference"),
    "masks apart, alike": ("from_alike", "soft_mask_difference"),
    "weights apart, alike": ("from_alike", "weight_difference"),
}


def table(results: Path, runs: Path) -> Table:
    """The table: its rows in the folder ``results``, its runs in ``runs``."""
    jobs = [
        Job(
            f"{processes} process(es), {parts} micro-batch(es) each",
            has(processes=processes, gradient_accumulation=parts),
            partial(measure, runs, processes, parts),
        )
        for processes, parts in CELLS
    ]
    return Table("processes", body, results / "ddpm_digits_processes.jsonl", jobs)


def measure(runs: Path, processes: int, parts: int) -> Run[list[Row]]:
    """Run the recipe so, and as it is compared with; its metrics, and how far they are apart."""
    folders = []
    for number, cut in ((processes, parts), (1, 1), (1, processes * parts)):
        name = f"processes_{number}x{cut}"
        folders.append(run_folder(runs, name, load_pipeline_recipe(RECIPE).model))
        if not (folders[-1] / "metrics.json").exists():  # it is not finished
            yield f"    {name}"
            _run(folders[-1], number, cut)
    folder, one, alike = folders
    metrics = read_json(folder / "metrics.json")
    facts = metrics["run"]
    names = ("model", "processes", "seed", "device", "threads", "versions")
    measured = {name: metrics["metrics"][name]["compressed"] for name in QUALITY}
    row = {
        "recipe": RECIPE,
        "model_hash": weights(facts["model"]),
        "date": facts["created"],
        **{name: facts[name] for name in names},
        "gradient_accumulation": parts,
        "train_seconds": round(facts["train_seconds"], 1),
        "widths": [width["compressed"] for width in metrics["widths"]],
        "values": {name: value["value"] for name, value in measured.items()},
        "ci95": {name: value["ci95"] for name, value in measured.items()},
        "from_one": compare(folder, one),
        "from_alike": compare(folder, alike),
    }
    return [row]


def _run(folder: Path, processes: int, parts: int) -> None:
    # -P: a checkout's kernels/ must not be found as a top-level module
    command = [sys.executable, "-P", "-m", "compress.cli", "run", RECIPE, "--output", str(folder)]
    command += ["--processes", str(processes), "--set", f"train.gradient_accumulation={parts}"]
    command += ["--resume"] if folder.exists() else []
    # as many threads for each: another number of threads sums in another order
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if subprocess.run(command, stdout=sys.stderr, check=False, env=environment).returncode:
        raise ValueError(f"expected {' '.join(command)} to finish; it failed; mend what it says")


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
    apart = [(ours[name].float() - tensor.float()).abs().max() for name, tensor in theirs.items()]
    return {
        "soft_mask_difference": (mine[:-1] - other[:-1]).abs().max().item(),
        "same_kept": torch.equal(mine[-1], other[-1]),
        "weight_difference": max(apart).item(),
    }


def body(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    columns: dict[str, Cell] = {
        "processes": lambda row: str(row["processes"]),
        "micro-batches of each": lambda row: str(row["gradient_accumulation"]),
        **{f"{metric(n).column()} {metric(n).arrow}": partial(_cell, n) for n in QUALITY},
        "same kept units": lambda row: "yes" if row["from_one"]["same_kept"] else "NO",
        **{heading: partial(_apart, *keys) for heading, keys in APART.items()},
    }
    return (
        f"{cell_table(rows, columns)}\n\n`{RECIPE}` on the CPU over gloo, the same "
        "batch in all shared between the processes, and cut into micro-batches by "
        "`train.gradient_accumulation`. Masks and weights are compared with those of one process, "
        "and of one process in micro-batches of the same size (alike). 95% intervals over sampling "
        "seeds."
    )


def _apart(other: str, what: str, row: Row) -> str:
    return f"{row[other][what]:.1e}"


def _cell(name: str, row: Row) -> str:
    cell, interval = metric(name).cell, row["ci95"][name]
    return cell(row["values"][name]) + (f" [{', '.join(map(cell, interval))}]" if interval else "")
