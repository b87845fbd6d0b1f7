"""Tables of readers: rows in, Markdown out, and nothing run twice."""

import pytest

from compress.common.files import append_rows
from compress.eval.tables import read_rows
from compress.methods.base import Event
from compress.runs.recipe import ReaderRecipe, load_recipe
from compress.runs.run import RunResult
from compress.tables import reader
from compress.tables.table import weights

MODEL = "builtin:reader-qwen"


def value(mean, low=None, high=None, n=64):
    return {"value": mean, "ci95": None if low is None else [low, high], "n": n, "how": ""}


@pytest.fixture
def metrics():
    def row(variant, methods, retention, **counted):
        return {
            "variant": variant,
            "methods": methods,
            "metrics": {"cer_corpus": value(0.02, 0.01, 0.03)},
            "accuracy_retention": value(retention, retention - 0.01, retention + 0.01),
            **counted,
        }

    return {
        "comparison": [
            row("dense", [], 1.0),
            row("compressed", [{"name": "fastocr", "min_fixation": 0}], 0.98, attended=0.17),
            row(
                "other",
                [{"name": "fastocr", "min_fixation": 0, "fixation": "static"}],
                0.71234,
                attended=0.18,
            ),
        ],
        "calibration": {"focal_layers": [2]},
        "run": {"model": MODEL, "model_hash": weights(MODEL), "pages": 64, "device": "cpu"},
    }


def test_a_recipe_is_run_once_and_its_variants_become_rows(metrics, tmp_path, monkeypatch):
    requests = []

    def run(recipe, *, output, resume):
        requests.append((recipe, output.name, resume))
        yield Event("dense", 1, 2)
        yield Event("dense", 2, 2)
        return RunResult(output, metrics, output)

    monkeypatch.setattr(reader, "run_events", run)
    table = {table.name: table for table in reader.recipe_tables(tmp_path, tmp_path)}["fastocr"]
    append_rows(table.path, {"recipe": table.jobs[0].name, "model": MODEL, "model_hash": "earlier"})
    assert list(table.run_missing())[1:] == ["    dense"]
    assert list(table.run_missing()) == []
    # the folder is that of these weights, where an interrupted run goes on
    folder = f"table_reader_fastocr_full_{weights(MODEL)[:8]}"
    assert requests == [("reader_fastocr_full", folder, False)]
    rows = read_rows(tmp_path / "reader_fastocr.jsonl")
    assert [row["variant"] for row in rows] == ["dense", "compressed", "other"]
    assert rows[0]["calibration"] == {"focal_layers": [2]} and not rows[1]["calibration"]
    assert all(row["model"] == MODEL and row["commit"] for row in rows)
    text = table.render()
    assert "| fastocr | 5% | 17.00% | 98.00% [97.00%, 99.00%] | 2.00% [1.00%, 3.00%] |" in text
    assert "| static | 5% | 18.00% | 71.23% [70.23%, 72.23%] |" in text
    assert "64 held-out pages" in text and "attends to in a decode step" in text


def test_every_table_of_a_recipe_measures_64_pages_and_each_variant_once(tmp_path):
    recipes = [table.jobs[0].name for table in reader.recipe_tables(tmp_path, tmp_path)]
    assert len(recipes) == 7
    for recipe in map(load_recipe, recipes):
        assert isinstance(recipe, ReaderRecipe) and recipe.evaluate.samples >= 64
        variants = {repr(method) for method in [*recipe.method, *recipe.compare]}
        assert len(variants) == 1 + len(recipe.compare)


def test_readers_are_evaluated_once(tmp_path, monkeypatch):
    requests = []

    def evaluate(model, folder, settings, resume):
        requests.append((model, settings.unseen_font))
        yield Event("read", 1, 1)
        metrics = {name: value(0.5, 0.4, 0.6) for name in reader.METRICS} | {"cer": value(0.5)}
        return {"metrics": metrics, "run": {"model": model, "data": "builtin:pages"}}

    monkeypatch.setattr(reader, "evaluate_events", evaluate)
    monkeypatch.setattr(reader, "builtin_models", lambda kind: ["reader-qwen"])
    table = reader.readers(tmp_path, tmp_path)
    assert list(table.run_missing()) == [f"readers [1/1] {MODEL}", "    read"]
    assert list(table.run_missing()) == [] and requests == [(MODEL, True)]
    text = table.render()
    assert f"| `{MODEL}` | 50.00% [40.00%, 60.00%] |" in text
    assert "64 held-out pages of `builtin:pages`" in text


def test_curves_are_lines_of_several_files_by_share(tmp_path):
    def row(methods, share, retention, tokens):
        return {
            "model": MODEL,
            "methods": methods,
            "attended": share,
            "accuracy_retention": value(retention, retention - 0.01, retention + 0.01),
            "metrics": {"new_tokens": value(tokens), "loop_rate": value(0.25)},
        }

    def method(keep, fixation):
        return [{"name": "fastocr", "keep_visual": keep, "min_fixation": 0, "fixation": fixation}]

    for file, fixation in (("a", "window"), ("b", "random")):
        append_rows(tmp_path / file, row([], 1, 1.0, 200))
        for share, retention in ((0.5, 0.99), (0.3, 0.985), (0.2, 0.5)):
            append_rows(tmp_path / file, row(method(share, fixation), share, retention, 100))
    chosen = {
        "last": {"file": "a", "method": "window"},
        "drawn, 30%": {"file": "b", "method": "random", "keep": "30%"},
        "best": {"file": "b", "method": "oracle"},
    }
    content = {"least": 0.987, "curves": chosen, "note": "Pages."}
    lines = reader.curves("c", content, tmp_path).render().splitlines()
    assert lines[2] == "| last | 20% | 20.0% | 50.00% [49.00%, 51.00%] | 50% | 25% |"
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| last"] * 3 + ["| drawn, 30%"]
    assert lines[7] == "Smallest share here that keeps 99%: last: 50.0%; drawn, 30%: none. Pages."
