"""The tables' runs: every method at the same widths and the same total optimiser steps.

Resumable: each finished run is appended to a results file, and runs that are there are skipped.
"""

import datetime
import hashlib
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.eval import tables
from compress.runs.diffusion import floor, run_events
from compress.runs.recipe import Recipe, load_pipeline_recipe

RECIPE = "ddpm_gradflow_full"
SEEDS = (0, 1, 2)
KEEPS = ("0.5", "0.3")
ONE_SHOT = ("random", "magnitude", "taylor", "diff_pruning")
CRITERIA = ("gradient_flow", "lookahead", "taylor", "magnitude", "random")
# keys of `train` and `evaluate` that change how a run is executed, not what comes out
UNDECIDING = ("save_every", "keep_states", "gradient_checkpointing", "workers", "prefetch", "batch")
PROCESSES = ("soft flow", "hard iterative", "one-shot")
# allocation, granularity, keep_macs; a uniform 0.3 lands on 0.273, so that global has both
VARIANTS = (
    ("uniform", "fine", "0.3"),
    ("global", "fine", "0.3"),
    ("uniform", "coarse", "0.3"),
    ("global", "fine", "0.273"),
)
# knobs that are younger than the first rows: where they are not set, the rows' keys stay
YOUNGER = {
    "allocation": "uniform",
    "granularity": "fine",
    "flip": False,
    "condition_dropout": 0.1,
    "guidance_scale": None,
}
# tables whose times are compared: their runs are made in one sitting, in a file of their own
TIMED = ("allocation",)
COST = ("macs_share", "params_share", "latency_share", "prune_cpu_seconds", "criterion_share")

NOTES = {
    "main": "Widths and total optimiser steps are the same within a `keep_macs`.",
    "ablation": "`keep_macs` 0.3; same widths and total optimiser steps throughout.",
    "attempts": "`keep_macs` 0.3, the first seed; same widths and total optimiser steps throughout."
    " Unless the line says otherwise:",
    "allocation": "The same level widths and total optimiser steps throughout."
    " Latency is that of one forward pass, in turns with the dense model's; time to prune is the"
    " process's CPU time from the first mask to the last optimiser step.",
}
# what was tried -> what is set
RIVAL = "one-shot diff_pruning"
ATTEMPTS: dict[str, tuple[str, ...]] = {
    "nothing: as in the first table": (),
    "no distillation": ("recover.distill=0",),
    "no distillation, learning rate 1e-3": ("recover.distill=0", "recover.lr=1e-3"),
    "distillation 1": ("recover.distill=1",),
    "distillation 1, learning rate 1e-3": ("recover.distill=1", "recover.lr=1e-3"),
    "learning rate 1e-3": ("recover.lr=1e-3",),
    "200 soft + 200 recovery steps": ("method.steps=200", "recover.steps=200"),
    "cubic budget": ("method.budget=cubic", "method.max_move=0.2"),
    "no drive to 0 or 1 (gamma 0)": ("method.gamma=0",),
    "flow rate 0.3": ("method.flow_rate=0.3",),
    "twice as many estimates, of 8 batches": (
        "method.criterion_every=3",
        "method.criterion_batches=8",
    ),
    "binary for the last 30% of the soft stage": ("method.settle=0.3", "method.max_move=0.2"),
    "lookahead": ("method.criterion=lookahead",),
    "gradient_flow, signed as in the paper": (
        "method.criterion=gradient_flow",
        "method.reduction=signed",
    ),
}


@dataclass(frozen=True)
class Experiment:
    """One run of a table: what to set in the base recipe, and how its row is labelled."""

    labels: tuple[tuple[str, str], ...]
    overrides: tuple[str, ...]
    seed: int

    def recipe(self) -> Recipe:
        """The base recipe with this experiment's settings."""
        return load_pipeline_recipe(RECIPE, [*self.overrides, f"seed={self.seed}"])

    def key(self) -> str:
        """Hash of everything in the recipe that decides the result."""
        content = self.recipe().model_dump(mode="json")
        # the built-in data have no columns
        for name in ("output", "columns"):
            content.pop(name)
        for part in ("train", "evaluate"):
            for name in UNDECIDING:
                content[part].pop(name, None)
        for part in ("method", "train", "evaluate"):
            for knob, old in YOUNGER.items():
                if content[part].get(knob, ...) == old:
                    del content[part][knob]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _one_shot(criterion: str) -> tuple[str, ...]:
    steps = load_pipeline_recipe(RECIPE).method.steps
    method = json.dumps({"name": "oneshot", "criterion": criterion, "steps": steps})
    return (f"method={method}",)


def main_table(seeds: Sequence[int] = SEEDS) -> list[Experiment]:
    """Gradflow (the shipped defaults) against the one-shot methods at two budgets."""
    methods = {"gradflow": ()} | {f"one-shot {c}": _one_shot(c) for c in ONE_SHOT}
    return [
        Experiment(
            (("keep_macs", keep), ("method", name)),
            (*overrides, f"method.keep_macs={keep}"),
            seed,
        )
        for keep, seed, (name, overrides) in itertools.product(
            reversed(KEEPS), seeds, methods.items()
        )
    ]


def ablation_table(seeds: Sequence[int] = SEEDS) -> list[Experiment]:
    """Criterion x process at ``keep_macs`` 0.3."""
    experiments = []
    for seed, process, criterion in itertools.product(seeds, PROCESSES, CRITERIA):
        if process == "one-shot":
            overrides = _one_shot(criterion)
        else:
            overrides = (
                f"method.criterion={criterion}",
                f"method.process={process.split()[0]}",
            )
        labels = (("process", process), ("criterion", criterion))
        experiments.append(Experiment(labels, (*overrides, "method.keep_macs=0.3"), seed))
    return experiments


def attempts_table(seeds: Sequence[int] = SEEDS) -> list[Experiment]:
    """What was tried to make gradflow better at ``keep_macs`` 0.3; the first seed only.

    What concerns the training is tried on the strongest rival as well.
    """
    return [
        Experiment(
            (("tried", tried), ("method", method)),
            (*(rival if method == RIVAL else ()), *overrides, "method.keep_macs=0.3"),
            seed,
        )
        for seed in seeds[:1]
        for tried, overrides in ATTEMPTS.items()
        for method in (("gradflow", RIVAL) if _training_only(overrides) else ("gradflow",))
        for rival in (_one_shot("diff_pruning"),)
    ]


def allocation_table(seeds: Sequence[int] = SEEDS) -> list[Experiment]:
    """Uniform against free inner widths, fine against coarse masks, at equal MACs too."""
    return [
        Experiment(
            (("allocation", allocation), ("granularity", granularity), ("keep_macs", keep)),
            (
                f"method.allocation={allocation}",
                f"method.granularity={granularity}",
                f"method.keep_macs={keep}",
            ),
            seed,
        )
        for seed in seeds
        for allocation, granularity, keep in VARIANTS
    ]


def _training_only(overrides: Sequence[str]) -> bool:
    return all(o.startswith("recover.") and not o.startswith("recover.steps") for o in overrides)


TABLES = {
    "main": main_table,
    "ablation": ablation_table,
    "attempts": attempts_table,
    "allocation": allocation_table,
}
LABELS: dict[str, dict[str, Sequence[str]]] = {
    "main": {
        "keep_macs": KEEPS,
        "method": ("gradflow", *(f"one-shot {c}" for c in ONE_SHOT)),
    },
    "ablation": {"process": PROCESSES, "criterion": CRITERIA},
    "attempts": {"tried": tuple(ATTEMPTS), "method": ("gradflow", RIVAL)},
    "allocation": {
        "allocation": ("uniform", "global"),
        "granularity": ("fine", "coarse"),
        "keep_macs": ("0.3", "0.273"),
    },
}
COMPARE_WITHIN: dict[str, tuple[str, ...]] = {
    "main": ("keep_macs",),
    "ablation": (),
    "attempts": ("tried",),
    "allocation": (),
}


def results_of(name: str, results: Path) -> Path:
    """The file of a table's rows: the given one, or one beside it for a table that is timed."""
    return beside(results, name) if name in TIMED else results


def beside(results: Path, name: str) -> Path:
    """A file of rows of its own, next to the others' results."""
    return results.with_name(f"{results.stem}_{name}{results.suffix}")


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``K/N``, with 0 <= K < N.

    Raises
    ------
    ValueError : when it is something else.
    """
    first, _, second = text.partition("/")
    if first.isdigit() and second.isdigit() and int(first) < int(second):
        return int(first), int(second)
    raise ValueError(f"shard must be K/N with 0 <= K < N, such as 0/2; got {text!r}")


def run_missing(
    names: Sequence[str],
    results: Path,
    *,
    seeds: Sequence[int] = SEEDS,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[str]:
    """Run what the tables lack, one run at a time; yields a line per run, before and after.

    Parameters
    ----------
    names : tables to fill.
    results : the results file.
    seeds : training seeds.
    shard : (k, n): only every n-th missing run, from the k-th, so that n shells can share work.
    """
    wanted = {
        (results_of(name, results), e.key()): e for name in names for e in TABLES[name](seeds)
    }
    mine = list(wanted.items())[shard[0] :: shard[1]]
    for number, ((file, key), experiment) in enumerate(mine, start=1):
        if any(row["key"] == key for row in tables.read_rows(file)):
            continue
        title = ", ".join(f"{k} {v}" for k, v in experiment.labels)
        yield f"[{number}/{len(mine)}] {title}, seed {experiment.seed}"
        row = _run_one(experiment, key)
        tables.append_row(file, row)
        values = ", ".join(f"{c} {row['values'][c]:.5g}" for c in tables.QUALITY)
        yield f"    {row['seconds']:.0f} s: {values}"


def _run_one(experiment: Experiment, key: str) -> dict[str, Any]:
    started = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory(prefix="compress-table-") as folder:
        events = run_events(experiment.recipe(), output=Path(folder) / "run")
        pruning, before = 0.0, time.process_time()
        while True:
            try:
                event = next(events)
                now = time.process_time()
                if event.stage in ("flow", "recover"):
                    pruning += now - before
                before = now
            except StopIteration as stop:
                metrics = stop.value.metrics
                break
    seconds = (datetime.datetime.now(datetime.UTC) - started).total_seconds()
    facts = metrics["run"]
    return {
        "key": key,
        "command": "compress tables",
        "recipe": RECIPE,
        "overrides": list(experiment.overrides),
        "seed": experiment.seed,
        "commit": commit(),
        "date": started.isoformat(timespec="seconds"),
        "device": facts["device"],
        "threads": facts["threads"],
        "versions": facts["versions"],
        "seconds": round(seconds, 1),
        "train_seconds": round(facts["train_seconds"], 1),
        "prune_cpu_seconds": round(pruning, 1),
        "criterion_share": round(facts["criterion_share"], 4),
        "optimiser_steps": facts["optimiser_steps"],
        "widths": [w["compressed"] for w in metrics["widths"]],
        "values": {n: e["compressed"]["value"] for n, e in metrics["metrics"].items()},
        "dense": {n: e["dense"]["value"] for n, e in metrics["metrics"].items()},
        "surgery": facts["surgery"],
    }


def commit() -> str:
    """The checkout's commit, or "unknown" outside one."""
    here = Path(__file__).parent
    asked = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "unknown"


def render_table(name: str, results: Path, seeds: Sequence[int] = SEEDS) -> str:
    """One table in Markdown from the rows that are there, with what it is measured against."""
    results = results_of(name, results)
    rows_by_key = {row["key"]: row for row in tables.read_rows(results)}
    rows = []
    for experiment in TABLES[name](seeds):
        row = rows_by_key.get(experiment.key())
        if row is not None:
            rows.append(row | {"labels": dict(experiment.labels)})
    if not rows:
        return f"*No rows yet: run `compress tables {name}`.*"
    columns: tuple[str, ...] = tables.QUALITY
    if name in TIMED:
        columns += COST
        rows = [row | {"values": row["values"] | _costs(row)} for row in rows]
    body = tables.render(rows, LABELS[name], COMPARE_WITHIN[name], columns)
    dense = rows[0]["dense"]
    recipe = load_pipeline_recipe(RECIPE)
    asked, recover = recipe.evaluate, recipe.recover
    real = floor(recipe.data, asked.samples)
    facts = [
        NOTES[name],
        f"{recipe.method.steps + recover.steps} optimiser steps of batch {recover.batch}, "
        f"distillation {recover.distill:g};",
        f"{asked.sampling_seeds} x {asked.samples} samples, {asked.sampler.upper()} {asked.steps} "
        "steps.",
        f"Dense model: fid_digits {dense['fid_digits']:.2f}, validation loss "
        f"{dense['validation_loss']:.5f};",
        f"{asked.samples} images of one half of the real data against the other: fid_digits "
        f"{real['fid_digits']:.2f}.",
        "Mean ± standard deviation over training seeds;",
        f"{len(rows)} of {len(TABLES[name](seeds))} runs are in.",
        f"Made by `compress tables {name} --update README.md` from `eval/results/{results.name}`.",
    ]
    return f"{body}\n\n{' '.join(facts)}"


def _costs(row: dict[str, Any]) -> dict[str, float]:
    """What a run's result costs beside the dense model, and what the run itself cost."""
    shares = (("macs_share", "macs"), ("params_share", "params"), ("latency_share", "latency_ms"))
    found = {name: row["values"][of] / row["dense"][of] for name, of in shares}
    return found | {name: row[name] for name in ("prune_cpu_seconds", "criterion_share")}
