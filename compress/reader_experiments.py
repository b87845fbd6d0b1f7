"""The tables of readers: one run of a shipped recipe each, kept as one row per variant."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compress.bench.suite import bench
from compress.bench.tables import TABLES as BENCHES
from compress.bench.tables import describe, render_bench
from compress.eval import tables
from compress.experiments import commit
from compress.files import write_text
from compress.models.vlm import builtin_readers
from compress.ocr_evaluation import OcrSettings, evaluate_events
from compress.pipeline import run_events
from compress.reader_figures import series_name, used_share
from compress.recipe import load_recipe

# table -> the recipe whose variants it has
RECIPES = {
    "fastocr": "reader_fastocr_full",
    "fastocr_periphery": "reader_fastocr_periphery_full",
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
    "rtprune": "`used` is the share of the visual tokens, newlines and separator included, that "
    "reach the decoder.",
}


COLUMNS = {
    "cer_corpus": "CER",
    "ned": "NED",
    "bleu_corpus": "BLEU",
    "token_f1": "F1",
    "worst_page_ned": "worst page (NED)",
    "loop_rate": "loops",
    "cer_corpus_unseen_font": "CER, unseen font",
}
NAMES = ("readers", *RECIPES, *BENCHES)
FILES = {"readers": "readers.jsonl", **{name: f"{name}.jsonl" for name in BENCHES}}


def results_file(results: Path, name: str) -> Path:
    """Where the rows of a table are kept, beside those of the other tables."""
    return results.with_name(FILES.get(name, f"reader_{name}.jsonl"))


def run_missing(name: str, results: Path, runs: Path) -> Iterator[str]:
    """Run a table's recipe unless its rows are there; yields lines to show.

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
    if tables.read_rows(path):
        return
    if name in BENCHES:
        for row in bench(name.removeprefix("bench_"), results=path):
            yield "  ".join(describe(row))
        return
    model = load_recipe(RECIPES[name]).model
    if model.removeprefix("builtin:") not in builtin_readers():
        yield f"{name}: {model} does not ship yet; nothing is run"
        return
    folder = runs / f"table_{name}"
    events = run_events(RECIPES[name], output=folder, resume=folder.exists())
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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _evaluate_missing(path: Path, runs: Path) -> Iterator[str]:
    """Evaluate the built-in readers that have no row yet."""
    done = {row["model"] for row in tables.read_rows(path)}
    for model in (f"builtin:{name}" for name in builtin_readers()):
        if model in done:
            continue
        yield f"readers: {model}"
        folder = runs / f"table_{model.removeprefix('builtin:')}"
        settings = OcrSettings(model, batch=32)
        events = evaluate_events(settings, folder, resume=folder.exists())
        while True:
            try:
                next(events)
            except StopIteration as stop:
                found = stop.value
                break
        facts = {"command": "compress tables readers", "commit": commit(), **found["run"]}
        tables.append_row(path, {**facts, "metrics": found["metrics"]})


def _render_readers(rows: Sequence[dict[str, Any]], file: str) -> str:
    lines = [
        f"| reader | {' | '.join(COLUMNS.values())} |",
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
            f"| {series_name(row)} | {_keep(row['methods'])} | {used_share(row):.2%} | "
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
    return "\n".join(lines) + "\n\n" + " ".join(facts)


def _keep(methods: Sequence[dict[str, Any]]) -> str:
    kept = []
    for method in methods:
        value = method["keep_visual"] if method["name"] == "fastocr" else method["keep_tokens"]
        kept.append(value if isinstance(value, str) else f"{value:.2%}".replace(".00%", "%"))
    return " + ".join(kept)


def _percent(value: dict[str, Any]) -> str:
    interval = value["ci95"]
    inside = f" [{interval[0]:.2%}, {interval[1]:.2%}]" if interval else ""
    return f"{value['value']:.2%}{inside}"
