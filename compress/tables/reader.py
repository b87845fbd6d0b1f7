"""The tables of readers: the built-in ones, and each shipped recipe that compares variants."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compress.eval.metrics import metric
from compress.eval.settings import OcrEvaluation
from compress.eval.tables import Cell, Row, cell_table, markdown, read_rows
from compress.models.locate import builtin_models
from compress.reports.run_folder import keep_text, methods_of, series_name, used_share
from compress.runs.evaluation import evaluate_events
from compress.runs.recipe import list_recipes, load_recipe
from compress.runs.run import run_events
from compress.tables.table import Job, Run, Table, finish, has, run_folder

METRICS = (
    "cer_corpus",
    "ned",
    "bleu_corpus",
    "token_f1",
    "worst_page_ned",
    "loop_rate",
    "cer_corpus_unseen_font",
)


def readers(results: Path, runs: Path) -> Table:
    """How well the built-in readers read."""
    models = [f"builtin:{name}" for name in builtin_models("reader")]
    jobs = [Job(model, has(model=model), partial(_evaluate, model, runs)) for model in models]
    return Table("readers", _readers, results / "readers.jsonl", jobs)


def recipe_tables(results: Path, runs: Path) -> Iterator[Table]:
    """A table for each shipped recipe ``reader_*_full``, of the variants that it compares."""
    for recipe, _ in list_recipes():
        if recipe.startswith("reader_") and recipe.endswith("_full"):
            stem = recipe.removesuffix("_full")
            run = partial(_run, recipe, runs)
            yield Table(
                stem.removeprefix("reader_"),
                _variants,
                results / f"{stem}.jsonl",
                [Job(recipe, has(recipe=recipe), run)],
                variants,
            )


def collection(name: str, content: Mapping[str, Any], results: Path) -> Table:
    """What comes of one run on several readers or pages, each with a file of rows of its own."""

    def body(_: Sequence[Row]) -> str:
        lines = []
        for label, file in content["files"].items():
            measured = variants(read_rows(results / file))
            cells = {content["of"]: label, "its rows": f"`{file}`"}
            for column, facts in content["columns"].items():
                [line] = filter(has(**facts), measured)
                cells[column] = content["cell"].format_map(line)
            lines.append(cells)
        return f"{markdown(lines)}\n\n{content['note']}"

    return Table(name, body)


def curves(name: str, content: Mapping[str, Any], results: Path) -> Table:
    """What is retained at which share of the visual tokens, of variants in several files of rows.

    A curve is the lines of a file that say what is declared of it.
    """
    columns: dict[str, Cell] = {
        "policy": lambda line: line["policy"],
        "keep": lambda line: line["keep"],
        "read": lambda line: f"{line['used']:.1%}",
        "accuracy retention": lambda line: _percent(line["accuracy_retention"]),
        "tokens written": lambda line: f"{line['written']:.0%}",
        "loops": lambda line: f"{line['metrics']['loop_rate']['value']:.0%}",
    }

    def body(_: Sequence[Row]) -> str:
        lines, reached = [], []
        for policy, chosen in content["curves"].items():
            rows = read_rows(results / chosen["file"])
            facts = {key: value for key, value in chosen.items() if key != "file"}
            points = [line for line in variants(rows) if has(**facts)(line)]
            if not points:
                continue
            [dense] = [_written(row) for row in rows if not row["methods"]]
            points = [p | {"policy": policy, "written": _written(p) / dense} for p in points]
            lines += sorted(points, key=lambda p: p["used"])
            enough = [
                p["used"] for p in points if p["accuracy_retention"]["value"] >= content["least"]
            ]
            reached.append(f"{policy}: {f'{min(enough):.1%}' if enough else 'none'}")
        return (
            f"{cell_table(lines, columns)}\n\nSmallest share here that keeps "
            f"{content['least']:.0%}: {'; '.join(reached)}. {content['note']}"
        )

    return Table(name, body)


def _evaluate(model: str, runs: Path) -> Run[list[Row]]:
    folder = run_folder(runs, "readers", model)
    settings = OcrEvaluation(batch=32, unseen_font=True)
    events = evaluate_events(model, folder, settings, resume=folder.exists())
    result, _ = yield from finish(events)
    return [{**result["run"], "metrics": result["metrics"]}]


def _run(recipe: str, runs: Path) -> Run[list[Row]]:
    folder = run_folder(runs, recipe, load_recipe(recipe).model)
    result, _ = yield from finish(run_events(recipe, output=folder, resume=folder.exists()))
    return rows_of(recipe, result.metrics)


def rows_of(recipe: str, metrics: Mapping[str, Any]) -> list[Row]:
    """The variants of a finished run, the dense model first; it has what calibration found."""
    facts = {"recipe": recipe, "calibration": None, **metrics["run"]}
    rows = [{**facts, **row} for row in metrics["comparison"]]
    rows[0]["calibration"] = metrics["calibration"] or None
    return rows


def variants(rows: Sequence[Row]) -> list[Row]:
    """The compressed variants, with what their methods are called, were told to keep and used."""
    lines = [
        row | {"method": series_name(row), "keep": keep_text(row), "used": used_share(row)}
        for row in rows
        if row["methods"]
    ]
    return sorted(lines, key=lambda line: (line["method"], -line["used"]))


def _variants(rows: Sequence[Row]) -> str:
    [dense] = [row for row in rows if not row["methods"]]
    hows = dict.fromkeys(m.metrics[m.used].how for row in rows for m in methods_of(row))
    columns: dict[str, Cell] = {
        "method": lambda row: row["method"],
        "keep": lambda row: row["keep"],
        "used": lambda row: f"{row['used']:.2%}",
        "accuracy retention": lambda row: _percent(row["accuracy_retention"]),
        "CER": lambda row: _percent(row["metrics"]["cer_corpus"]),
    }
    return (
        f"{cell_table(variants(rows), columns)}\n\n{dense['model']}, {dense['pages']} held-out "
        f"pages, dense CER {_percent(dense['metrics']['cer_corpus'])}. Accuracy is 1 - CER; 95% "
        f"intervals from a bootstrap over pages, paired with the dense model's. `used`: "
        f"{', times '.join(hows)}."
    )


def _readers(rows: Sequence[Row]) -> str:
    columns: dict[str, Cell] = {"reader": lambda row: f"`{row['model']}`"}
    columns |= {metric(name).column(): partial(_metric, name) for name in METRICS}
    pages = " and ".join(
        f"{row['metrics']['cer']['n']} held-out pages of `{row['data']}`" for row in rows
    )
    return (
        f"{cell_table(rows, columns)}\n\n{pages}, and as many in a font that no training page has; "
        "95% intervals over pages."
    )


def _written(row: Row) -> float:
    """Tokens of an answer, mean over the pages."""
    return float(row["metrics"]["new_tokens"]["value"])


def _metric(name: str, row: Row) -> str:
    return _percent(row["metrics"][name])


def _percent(value: Mapping[str, Any]) -> str:
    inside = ", ".join(f"{end:.2%}" for end in value["ci95"] or ())
    return f"{value['value']:.2%}" + (f" [{inside}]" if inside else "")
