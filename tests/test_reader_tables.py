"""Tables of readers: rows in, Markdown out, and nothing run twice."""

import json

import pytest

from compress.common.files import folder_hash
from compress.methods.base import Event
from compress.models.vlm import model_folder
from compress.runs.recipe import ReaderRecipe, load_recipe
from compress.runs.run import RunResult
from compress.tables import reader as reader_experiments
from compress.tables.reader import render_table, results_file, run_missing, write_rows


def value(mean, low=None, high=None, n=64):
    return {"value": mean, "ci95": None if low is None else [low, high], "n": n, "how": ""}


def fast(**changes):
    settings = {
        "name": "fastocr",
        "keep_visual": 0.05,
        "fixation": "dynamic",
        "reuse": True,
        "min_mass": 0.0,
        "dilate": 0,
    }
    return settings | changes


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
            row("compressed", [fast()], 0.98, attended=0.17),
            row("other", [fast(fixation="static")], 0.71234, attended=0.18),
        ],
        "calibration": {"focal_layers": [2]},
        "run": {"model": "builtin:reader-qwen", "pages": 64, "device": "cpu"},
    }


def test_rows_become_a_table(metrics, tmp_path):
    results = tmp_path / "ddpm.jsonl"
    assert "No rows yet" in render_table("fastocr", results)
    write_rows(results_file(results, "fastocr"), "fastocr", metrics)
    lines = (tmp_path / "reader_fastocr.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["variant"] for row in rows] == ["dense", "compressed", "other"]
    assert rows[0]["calibration"] == {"focal_layers": [2]} and rows[1]["model"]
    table = render_table("fastocr", results)
    assert "| fastocr | 5% | 17.00% | 98.00% [97.00%, 99.00%] | 2.00% [1.00%, 3.00%] |" in table
    assert "| static | 5% | 18.00% | 71.23% [70.23%, 72.23%] |" in table
    assert "64 held-out pages" in table
    # what is there is not run again, and of which weights these rows are they do not say
    [line] = run_missing("fastocr", results, tmp_path)
    assert line == "fastocr: 3 rows are of weights unknown; they are taken as they are"


def test_rows_of_other_weights_are_measured_again(metrics, tmp_path, monkeypatch):
    now = folder_hash(model_folder("builtin:reader-qwen"))
    asked = []

    def run(recipe, *, output, resume, overwrite):
        asked.append((recipe, resume, overwrite))
        yield Event("dense", 1, 1)
        metrics["run"]["model_hash"] = now
        return RunResult(output, metrics, output)

    monkeypatch.setattr(reader_experiments, "run_events", run)
    results = tmp_path / "ddpm.jsonl"
    metrics["run"]["model_hash"] = "of earlier weights"
    write_rows(results_file(results, "fastocr"), "fastocr", metrics)
    earlier = "**Measured on earlier weights of builtin:reader-qwen.**"
    assert render_table("fastocr", results).endswith(earlier)
    folder = tmp_path / "table_fastocr"
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps({"model_hash": "of earlier weights"}))
    lines = list(run_missing("fastocr", results, tmp_path))
    assert "3 rows are of other weights" in lines[0]
    # the folder's pages were read with other weights, too: they are no beginning
    assert asked == [("reader_fastocr_full", False, True)]
    assert earlier not in render_table("fastocr", results)
    assert list(run_missing("fastocr", results, tmp_path)) == [] and len(asked) == 1
    # what was begun with these weights goes on
    results_file(results, "fastocr").unlink()
    (folder / "model.json").write_text(json.dumps({"model_hash": now}))
    assert list(run_missing("fastocr", results, tmp_path)) == ["fastocr: dense"]
    assert asked[1:] == [("reader_fastocr_full", True, False)]


def test_every_table_of_a_method_has_a_recipe_that_measures_64_pages():
    for name, recipe in reader_experiments.RECIPES.items():
        found = load_recipe(recipe)
        assert isinstance(found, ReaderRecipe) and found.evaluate.samples >= 64
        assert [m.name for m in found.method] == [name.partition("_")[0]]
        settings = {repr(m)
                    for m in [*found.method, *found.compare]}  # fmt: skip
        assert len(settings) == 1 + len(found.compare)


def test_readers_are_evaluated_once(tmp_path, monkeypatch):
    asked = []

    def evaluate(settings, folder, resume, overwrite):
        asked.append(settings.model)
        names = reader_experiments.COLUMNS
        found = {name: value(0.5, 0.4, 0.6) for name in names} | {"cer": value(0.5)}
        yield None
        return {"metrics": found, "run": {"model": settings.model, "data": settings.data}}

    monkeypatch.setattr(reader_experiments, "evaluate_events", evaluate)
    monkeypatch.setattr(reader_experiments, "builtin_readers", lambda: ["reader-qwen"])
    results = tmp_path / "ddpm.jsonl"
    assert list(run_missing("readers", results, tmp_path)) == ["readers: builtin:reader-qwen"]
    assert list(run_missing("readers", results, tmp_path)) == []
    assert asked == ["builtin:reader-qwen"]
    rows = [json.loads(line) for line in (tmp_path / "readers.jsonl").read_text().splitlines()]
    old = [{**row, "model_hash": "of earlier weights"} for row in rows]
    (tmp_path / "readers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    assert "earlier weights" in render_table("readers", results)
    assert list(run_missing("readers", results, tmp_path)) == ["readers: builtin:reader-qwen"]
    assert len((tmp_path / "readers.jsonl").read_text().splitlines()) == 1 and len(asked) == 2
    table = render_table("readers", results)
    assert "earlier weights" not in table
    assert "| `builtin:reader-qwen` | 50.00% [40.00%, 60.00%] |" in table
    assert "64 held-out pages of `builtin:pages`" in table


def test_a_table_of_a_reader_that_does_not_ship_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_experiments, "builtin_readers", lambda: ["reader-qwen"])
    [line] = run_missing("rtprune", tmp_path / "ddpm.jsonl", tmp_path)
    assert "builtin:reader-deepseek does not ship yet" in line
    assert "No rows yet" in render_table("rtprune", tmp_path / "ddpm.jsonl")
