"""The tables of readers: one run of a shipped recipe each, kept as one row per variant."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from compress.bench.cells import describe
from compress.bench.suite import bench
from compress.common.files import folder_hash, read_json, write_text
from compress.eval import tables
from compress.eval.metrics import metric
from compress.methods.registry import benchmarks
from compress.models.vlm import builtin_readers, model_folder
from compress.reports.reader_rows import keep_text, series_name, used_share
from compress.runs.diffusion import run_events
from compress.runs.reader import MODEL
from compress.runs.reading import SETTINGS, OcrSettings, evaluate_events
from compress.runs.recipe import load_recipe
from compress.tables.bench import TABLES as BENCHES
from compress.tables.bench import render_bench
from compress.tables.diffusion import commit

# table -> the recipe whose variants it has
RECIPES = {
    "fastocr": "reader_fastocr_full",
    "fastocr_periphery": "reader_fastocr_periphery_full",
    "fastocr_deepseek": "reader_deepseek_fastocr_full",
    "rtprune": "reader_rtprune_full",
}
ATTENDED = (
    "`used` is the mean share of the visual tokens that a layer attends to in a decode step, "
    "counted in the attention function: focal layers and the first step are dense, and static "
    "baselines get the same mean share."
)
NOTES = {
    "fastocr": ATTENDED,
    "fastocr_periphery": f"{ATTENDED} A summary counts as a token.",
    "fastocr_deepseek": f"{ATTENDED} A summary counts as a token.",
    "rtprune": "`used` is the share of the visual tokens, newlines and separator included, that "
    "reach the decoder.",
}


COLUMNS = (
    "cer_corpus",
    "ned",
    "bleu_corpus",
    "token_f1",
    "worst_page_ned",
    "loop_rate",
    "cer_corpus_unseen_font",
)
NAMES = ("readers", *RECIPES, *BENCHES)
FILES = {"readers": "readers.jsonl", **{name: f"{name}.jsonl" for name in BENCHES}}
UNKNOWN = "unknown"  # of rows from before they named the weights


def results_file(results: Path, name: str) -> Path:
    """Where the rows of a table are kept, beside those of the other tables."""
    return results.with_name(FILES.get(name, f"reader_{name}.jsonl"))


def run_missing(name: str, results: Path, runs: Path) -> Iterator[str]:
    """Run a table's recipe unless its rows are there, of the weights that ship now.

    Rows that name no ``model_hash`` are of unknown weights and are taken as they are.

    Yields
    ------
    Lines to show.

    Parameters
    ----------
    name : of the table.
    results : rows of another table; these go beside it.
    runs : where the run is, from which an interrupted one goes on.
    """
    path = results_file(results, name)
    if name == "readers":
        yield from _evaluate_missing(path, runs)
        return
    rows = tables.read_rows(path)
    if name in BENCHES:
        if not rows:
            for row in bench(benchmarks()[name.removeprefix("bench_")], results=path):
                yield "  ".join(describe(row))
        return
    model = load_recipe(RECIPES[name]).model
    if model.removeprefix("builtin:") not in builtin_readers():
        yield f"{name}: {model} does not ship yet; nothing is run"
        return
    if rows and not (old := [row for row in rows if is_stale(row)]):
        unknown = sum(_hash_of(row) == UNKNOWN for row in rows)
        if unknown:
            yield f"{name}: {unknown} rows are of weights {UNKNOWN}; they are taken as they are"
        return
    folder = runs / f"table_{name}"
    if rows:
        yield f"{name}: {len(old)} rows are of other weights than {model} has now; run again"
    fresh = _begun_with_others(folder, model)
    resume = folder.exists() and not fresh
    events = run_events(RECIPES[name], output=folder, resume=resume, overwrite=fresh)
    stage = ""
    while True:
        try:
            event = next(events)
        except StopIteration as stop:
            write_rows(path, name, stop.value.metrics)
            return
        if event.stage != stage:
            stage = event.stage
            yield f"{name}: {stage}"


def write_rows(path: Path, name: str, metrics: dict[str, Any]) -> None:
    """Write the variants of a finished run, one JSON line each."""
    facts = {"command": f"compress tables {name}", "recipe": RECIPES[name], "commit": commit()}
    facts |= metrics["run"]
    rows = [{**row, "calibration": None, **facts} for row in metrics["comparison"]]
    if metrics["calibration"]:
        rows[0]["calibration"] = metrics["calibration"]
    _write(path, rows)


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def is_stale(row: dict[str, Any]) -> bool:
    """Whether a row was measured on other weights than its built-in model has now."""
    name = row["model"].removeprefix("builtin:")
    if _hash_of(row) == UNKNOWN or name not in builtin_readers():
        return False
    return bool(_hash_of(row) != folder_hash(model_folder(row["model"])))


def _hash_of(row: dict[str, Any]) -> str:
    return str(row.get("model_hash", UNKNOWN))


def _begun_with_others(folder: Path, model: str) -> bool:
    """Whether a run or an evaluation in a folder began with other weights, and is no beginning."""
    begun = None
    if (folder / MODEL).is_file():
        begun = read_json(folder / MODEL)["model_hash"]
    elif (folder / SETTINGS).is_file():
        begun = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf8"))["model_hash"]
    return begun is not None and begun != folder_hash(model_folder(model))


def _stale_note(rows: Sequence[dict[str, Any]]) -> str:
    """What a table says of rows that a retraining made old."""
    models = sorted({row["model"] for row in rows if is_stale(row)})
    return f" **Measured on earlier weights of {', '.join(models)}.**" if models else ""


def _evaluate_missing(path: Path, runs: Path) -> Iterator[str]:
    """Evaluate the built-in readers that have no row yet."""
    rows = tables.read_rows(path)
    for model in (f"builtin:{name}" for name in builtin_readers()):
        if any(row["model"] == model and not is_stale(row) for row in rows):
            continue
        yield f"readers: {model}"
        folder = runs / f"table_{model.removeprefix('builtin:')}"
        settings = OcrSettings(model, batch=32)
        fresh = _begun_with_others(folder, model)
        resume = folder.exists() and not fresh
        events = evaluate_events(settings, folder, resume=resume, overwrite=fresh)
        while True:
            try:
                next(events)
            except StopIteration as stop:
                found = stop.value
                break
        facts = {"command": "compress tables readers", "commit": commit(), **found["run"]}
        rows = [row for row in rows if row["model"] != model]
        rows.append({**facts, "metrics": found["metrics"]})
        _write(path, rows)


def _render_readers(rows: Sequence[dict[str, Any]], file: str) -> str:
    lines = [
        f"| reader | {' | '.join(metric(name).column() for name in COLUMNS)} |",
        f"|{'---|' * (1 + len(COLUMNS))}",
    ]
    for row in rows:
        values = " | ".join(_percent(row["metrics"][name]) for name in COLUMNS)
        lines.append(f"| `{row['model']}` | {values} |")
    pages = " and ".join(
        f"{row['metrics']['cer']['n']} held-out pages of `{row['data']}`" for row in rows
    )
    note = (
        f"{pages}, and as many in a font that no training page has; 95% intervals over pages. Made "
        f"by `compress tables readers --update README.md`; rows in `eval/results/{file}`."
        f"{_stale_note(rows)}"
    )
    return "\n".join(lines) + f"\n\n{note}"


def render_table(name: str, results: Path) -> str:
    """A table in Markdown from its rows."""
    path = results_file(results, name)
    rows = tables.read_rows(path)
    if not rows:
        return f"*No rows yet: run `compress tables {name}`.*"
    if name == "readers":
        return _render_readers(rows, path.name)
    if name in BENCHES:
        return render_bench(name, rows, path.name)
    dense, others = rows[0], rows[1:]
    lines = ["| method | keep | used | accuracy retention | CER |", "|---|---|---|---|---|"]
    for row in sorted(others, key=lambda r: (series_name(r), -(used_share(r) or 0))):
        lines.append(
            f"| {series_name(row)} | {keep_text(row)} | {used_share(row):.2%} | "
            f"{_percent(row['accuracy_retention'])} | {_percent(row['metrics']['cer_corpus'])} |"
        )
    facts = [
        f"{dense['model']}, {dense['pages']} held-out pages, dense CER "
        f"{_percent(dense['metrics']['cer_corpus'])}. Accuracy is 1 - CER; 95% intervals from a",
        "bootstrap over pages, paired with the dense model's.",
        NOTES[name],
        f"Made by `compress tables {name} --update README.md`; rows in "
        f"`eval/results/{results_file(results, name).name}`.",
    ]
    return "\n".join(lines) + "\n\n" + " ".join(facts) + _stale_note(rows)


def _percent(value: dict[str, Any]) -> str:
    interval = value["ci95"]
    inside = f" [{interval[0]:.2%}, {interval[1]:.2%}]" if interval else ""
    return f"{value['value']:.2%}{inside}"
