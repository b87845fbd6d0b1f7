"""The tables of diffusion: variants of a recipe at the same total optimiser steps, over seeds.

``tables.yaml`` beside the rows declares them.
"""

import datetime
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compress.eval import fidelity
from compress.eval.diffusion import mean_interval
from compress.eval.metrics import metric
from compress.eval.tables import Row, markdown
from compress.runs.recipe import Recipe, load_pipeline_recipe
from compress.runs.run import run_events
from compress.tables.table import Job, Run, Table, finish, has, weights

LIKENESS = ("ssim_to_dense", "validation_loss")
SHARES = {"macs_share": "macs", "params_share": "params", "latency_share": "latency_ms"}
TIMES = ("prune_cpu_seconds", "criterion_share")
# how a run is executed, not what comes out
EXECUTION: Any = {
    "output": True,
    "train": {
        *("save_every", "keep_states", "gradient_checkpointing", "workers", "prefetch", "trackers")
    },
    "evaluate": {"batch"},
}


def quality(data: str) -> tuple[str, ...]:
    """What tells whether a pruned model is good, on a data source: two distances and `LIKENESS`."""
    return (*fidelity.metric_names(fidelity.extractor_of(data))[:2], *LIKENESS)


def table(name: str, declared: Mapping[str, Any], results: Path) -> Table:
    """A declared table, its rows in the folder ``results``."""
    blocks = [list(_combinations(block)) for block in declared["blocks"]]
    lines = [labels for block in blocks for labels, _ in block]
    common = declared.get("sets", [])
    jobs = [
        _job(labels, [*common, *sets], declared["recipe"], seed)
        for block in blocks
        for seed in range(declared.get("seeds", 3))
        for labels, sets in block
    ]

    base = load_pipeline_recipe(declared["recipe"], common)
    judged = quality(base.data)
    columns = declared.get("columns", judged)
    within, against = declared.get("best_within", ()), declared.get("against", {})

    def measured(rows: Sequence[Row]) -> list[Row]:
        result = _lines(lines, jobs, rows)
        if against:
            _compare(result, against, within, judged)
        result += [_reported(line) for line in declared.get("reported", ())]
        # those that are compared beneath each other
        groups = list(dict.fromkeys(tuple(line[key] for key in within) for line in result))
        return sorted(result, key=lambda line: groups.index(tuple(line[key] for key in within)))

    def body(rows: Sequence[Row]) -> str:
        labels, result = list(declared["blocks"][0]), measured(rows)
        parts = [_shown(result, [*labels, "seeds"], columns, within, bold=not against)]
        if compared := [line for line in result if "differences" in line]:
            parts.append(_differences(compared, labels, against, judged))
        return "\n\n".join([*parts, _note(declared["note"], base, columns, rows, len(jobs))])

    return Table(name, body, results / declared["rows"], jobs, measured)


def _combinations(
    block: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The labels of each line, and what it sets in the recipe."""
    for values in itertools.product(*block.values()):
        labels = dict(zip(block, values, strict=True))
        chosen = [block[label][value] for label, value in labels.items()]
        sets = [s for part in chosen for s in ([part] if isinstance(part, str) else part)]
        yield labels, sets


def _name(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{label} {value}" for label, value in labels.items())


def _job(labels: Mapping[str, str], sets: Sequence[str], base: str, seed: int) -> Job:
    sets = sorted(sets, key=lambda s: s.partition("=")[0].count("."))  # whole sections first
    recipe = load_pipeline_recipe(base, [*sets, f"seed={seed}"])
    return Job(_name(labels), same_result(recipe), partial(measure, recipe, base, sets))


def settings(recipe: Recipe, *, exclude_defaults: bool = False) -> dict[str, Any]:
    """The knobs that decide a run's result, such as ``method.steps``."""
    content = recipe.model_dump(mode="json", exclude=EXECUTION, exclude_defaults=exclude_defaults)
    sections = {
        key: part if isinstance(part, dict) else {"": part} for key, part in content.items()
    }
    return {
        f"{key}.{knob}".rstrip("."): value
        for key, part in sections.items()
        for knob, value in part.items()
        if key != "method" or knob not in recipe.method.unused
    }


def same_result(recipe: Recipe) -> Callable[[Row], bool]:
    """Whether a row was measured by such a recipe.

    A knob that is younger than the row had what is its default now.
    """
    knobs, changed = settings(recipe), settings(recipe, exclude_defaults=True)

    def owns(row: Row) -> bool:
        before = row["settings"]
        return all(before[k] == v if k in before else k not in changed for k, v in knobs.items())

    return owns


def measure(recipe: Recipe, base: str, sets: Sequence[str]) -> Run[list[Row]]:
    """Run a recipe, a variant of the shipped one ``base`` that sets ``sets``."""
    started = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory(prefix="compress-table-") as folder:
        result, spent = yield from finish(run_events(recipe, output=Path(folder) / "run"))
    seconds = (datetime.datetime.now(datetime.UTC) - started).total_seconds()
    metrics, facts = result.metrics["metrics"], result.metrics["run"]
    row: Row = {
        "recipe": base,
        "overrides": list(sets),
        "settings": settings(recipe),
        "model": recipe.model,
        "model_hash": weights(recipe.model),
        "date": started.isoformat(timespec="seconds"),
        **{name: facts[name] for name in ("seed", "device", "threads", "versions", "surgery")},
        "seconds": round(seconds, 1),
        "train_seconds": round(facts["train_seconds"], 1),
        "prune_cpu_seconds": round(spent.get("flow", 0) + spent.get("recover", 0), 1),
        "criterion_share": round(facts["criterion_share"], 4),
        "optimiser_steps": facts["optimiser_steps"],
        "widths": [width["compressed"] for width in result.metrics["widths"]],
        "floor": result.metrics["floor"],
        **{
            side: {name: entry[of]["value"] for name, entry in metrics.items()}
            for side, of in (("values", "compressed"), ("dense", "dense"))
        },
    }
    known = {name: row["values"].get(name) for name in quality(recipe.data)}
    shown = (f"{name} {value:.5g}" for name, value in known.items() if value is not None)
    yield f"    {seconds:.0f} s: {', '.join(shown)}"
    return [row]


def _lines(
    lines: Sequence[Mapping[str, str]], jobs: Sequence[Job], rows: Sequence[Row]
) -> list[Row]:
    """Each line that has a row: its labels, how many seeds, and its metrics over these."""
    measured = []
    for labels in lines:
        owners = [job for job in jobs if job.name == _name(labels)]
        values = {row["seed"]: _values(row) for job in owners for row in rows if job.owns(row)}
        if values:
            names = set.intersection(*(set(measures) for measures in values.values()))
            spreads = {name: _spread(name, [v[name] for v in values.values()]) for name in names}
            facts = {"seeds": str(len(values)), "dense": rows[0]["dense"], "by_seed": values}
            measured.append({**labels, **facts, **spreads})
    return measured


def _compare(
    lines: Sequence[Row], against: Mapping[str, str], within: Sequence[str], names: Sequence[str]
) -> None:
    """Give each line how far the line ``against`` is from it in the metrics ``names``.

    Both agree in ``within``.

    The line itself gets its ``standing``: in how many of these it is ahead and behind.
    """
    for ours in filter(has(**against), lines):
        same = has(**{key: ours[key] for key in within})
        rivals = [line for line in lines if same(line) and line is not ours]
        for line in rivals:
            line["differences"] = {
                name: difference(name, ours["by_seed"], line["by_seed"]) for name in names
            }
        verdicts = [line["differences"][name]["verdict"] for line in rivals for name in names]
        won, lost = verdicts.count("ahead"), verdicts.count("behind")
        ours["standing"] = f"of {len(verdicts)} differences {won} ahead, {lost} behind"


def difference(
    name: str, ours: Mapping[int, Mapping[str, float]], theirs: Mapping[int, Mapping[str, float]]
) -> dict[str, Any]:
    """Ours minus theirs over the training seeds that both have, paired, with its 95% t interval.

    Parameters
    ----------
    name : of the metric.
    ours, theirs : by seed the metrics of a run.

    Returns
    -------
    ``verdict``, which is "ahead" or "behind" only where the interval excludes 0, else "open"; and
    ``text``, as a table writes it.
    """
    pairs = [ours[seed][name] - theirs[seed][name] for seed in ours if seed in theirs]
    known, interval = metric(name), mean_interval(pairs)
    if interval is None:
        return {"verdict": "open", "text": "–"}
    low, high = interval
    lower = known.better == "lower"
    won, lost = (high < 0, low > 0) if lower else (low > 0, high < 0)
    verdict = "ahead" if won else "behind" if lost else "open"
    mean, *ends = map(known.cell, (statistics.fmean(pairs), low, high))
    text = f"{mean} [{', '.join(ends)}]"
    return {"verdict": verdict, "text": text if verdict == "open" else f"**{verdict}** {text}"}


def _differences(
    lines: Sequence[Row], labels: Sequence[str], against: Mapping[str, str], names: Sequence[str]
) -> str:
    """How far the line ``against`` is from the others, in Markdown."""
    ours = ", ".join(against.values())
    last = labels[-1]
    return markdown(
        [
            {label: line[label] for label in labels[:-1]}
            | {f"{ours} minus": line[last]}
            | {metric(n).column(): line["differences"][n]["text"] for n in names}
            for line in lines
        ]
    )


def _reported(line: Mapping[str, Any]) -> Row:
    """A line whose figures were measured elsewhere, without rows."""
    values = line["values"]
    return {**line["labels"], "seeds": line["seeds"]} | {
        name: {"mean": value, "text": metric(name).cell(value)} for name, value in values.items()
    }


def _values(row: Row) -> dict[str, float]:
    """What was measured of a run's result, and what it costs beside the dense model."""
    shares = {name: row["values"][of] / row["dense"][of] for name, of in SHARES.items()}
    times = {name: row[name] for name in TIMES if name in row}
    known = {name: value for name, value in row["values"].items() if value is not None}
    return known | shares | times


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation, as a number and as a table writes them."""
    mean, known = statistics.fmean(values), metric(name)
    deviation = f" ± {known.cell(statistics.stdev(values))}" if len(values) > 1 else ""
    return {"mean": mean, "text": known.cell(mean) + deviation}


def _shown(
    lines: Sequence[Row],
    labels: Sequence[str],
    columns: Sequence[str],
    within: Sequence[str],
    *,
    bold: bool,
) -> str:
    """The lines in Markdown; ``bold`` the best of each column among those alike in ``within``."""

    def cell(name: str, line: Row) -> str:
        rivals = [rival for rival in lines if all(rival[key] == line[key] for key in within)]
        choose = min if metric(name).better == "lower" else max
        best = choose(rival[name]["mean"] for rival in rivals)
        won = bold and len(rivals) > 1 and line[name]["mean"] == best
        return f"**{line[name]['text']}**" if won else str(line[name]["text"])

    headings = {name: f"{metric(name).column()} {metric(name).arrow}" for name in columns}
    return markdown(
        [
            {label: line[label] for label in labels}
            | {heading: cell(name, line) for name, heading in headings.items()}
            for line in lines
        ]
    )


def _note(note: str, base: Recipe, columns: Sequence[str], rows: Sequence[Row], jobs: int) -> str:
    """How all runs of a table were made, and what they are measured against."""
    evaluate, recover, dense = base.evaluate, base.recover, rows[0]["dense"]
    shown = [n for n in columns if dense.get(n) is not None and not n.startswith(("kid", "ssim"))]
    facts = ", ".join(f"{metric(n).column()} {metric(n).cell(dense[n])}" for n in shown)
    fid, *_ = quality(base.data)
    real = ""
    if floors := rows[0]["floor"]:
        real = (
            f"; {evaluate.samples} images of one part of the real data against the other: "
            f"{metric(fid).column()} {metric(fid).cell(floors[fid])}"
        )
    return (
        f"{note} {base.method.steps + recover.steps} optimiser steps of batch "
        f"{recover.batch}, distillation {recover.distill:g}; {evaluate.sampling_seeds} x "
        f"{evaluate.samples} samples, {evaluate.sampler.upper()} {evaluate.steps} steps. Dense "
        f"model: {facts}{real}. Mean ± standard deviation over training seeds; "
        f"{len(rows)} of {jobs} runs are in."
    )
