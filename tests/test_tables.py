"""Generated tables: statistics, bold figures, places in documents; nothing is run twice."""

import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from scipy import stats

from compress.common.files import append_rows
from compress.eval.tables import read_rows
from compress.runs.recipe import load_pipeline_recipe
from compress.tables import bench, diffusion, processes
from compress.tables import table as tables
from compress.tables.documents import PLACE, _aims, _headline, all_tables, fill, read_documents
from compress.tables.table import Job, Table, has

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval" / "results"
QUALITY = diffusion.quality("builtin:digits")
DECLARED = yaml.safe_load((RESULTS / "tables.yaml").read_text())["diffusion"]
TOY = {
    "recipe": "ddpm_gradflow_full",
    "rows": "toy.jsonl",
    "note": "A toy.",
    "best_within": ["budget"],
    "blocks": [
        {
            "budget": {"half": "method.keep_macs=0.5", "less": "method.keep_macs=0.3"},
            "method": {"ours": [], "theirs": "method={name: oneshot, steps: 100}"},
        },
        {
            "budget": {"less": "method.keep_macs=0.3"},
            "method": {"longer": ["recover.steps=7", "recover.lr=1e-3"]},
        },
    ],
}


@pytest.fixture(scope="module")
def shipped() -> dict[str, Table]:
    return all_tables(RESULTS, ROOT / "runs")


def cells(text: str) -> list[list[str]]:
    lines = text.split("\n\n")[0].splitlines()[2:]
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines]


def measured(recipe, **values: float) -> dict:
    """A row as if the recipe had been run; a model of a quarter of the dense one's cost."""
    quality = {"fid_digits": 1.0, "kid_digits": 1e-3, "ssim_to_dense": 0.5, "validation_loss": 0.1}
    dense = {"macs": 8.0, "params": 8.0, "latency_ms": 8.0}
    return {
        "settings": diffusion.settings(recipe),
        "seed": recipe.seed,
        "values": quality | dict.fromkeys(dense, 2.0) | values,
        "dense": quality | dense,
        "floor": {"fid_digits": 2.5},
        "prune_cpu_seconds": float(recipe.seed),
        "criterion_share": 0.5,
        "seconds": 1.0,
    }


@pytest.fixture
def runs(monkeypatch):
    """Runs that take no time: each leaves a row with figures that are made from its recipe."""
    recipes = []

    def measure(recipe, base, sets):
        recipes.append(recipe)
        yield "    flow"
        number = recipe.method.keep_macs + recipe.recover.steps / 1e3 + recipe.seed
        return [measured(recipe, fid_digits=number, ssim_to_dense=number)]

    monkeypatch.setattr(diffusion, "measure", measure)
    return recipes


# ---- a table and its jobs ------------------------------------------------------------------


def test_runs_that_are_there_are_not_repeated(tmp_path, runs):
    toy = diffusion.table("toy", TOY, tmp_path)
    lines = toy.run_missing()
    for _ in range(5):  # two finished runs and the announcement of the third
        next(lines)
    lines.close()
    assert len(read_rows(toy.path)) == 2
    list(toy.run_missing())
    rows = read_rows(toy.path)
    assert len(rows) == len(runs) == len(toy.jobs) == 5 * 3
    assert all(row["command"] == "compress tables toy" and row["commit"] for row in rows)
    assert list(toy.run_missing()) == []
    # another table with some of the same lines only runs what it lacks
    longer = TOY | {"seeds": 4}
    list(diffusion.table("longer", longer, tmp_path).run_missing())
    assert len(runs) == 5 * 4 and [recipe.seed for recipe in runs[-5:]] == [3] * 5


def test_shards_share_the_work_without_overlap(tmp_path, runs):
    for k in range(2):
        other = TOY | {"rows": f"{k}.jsonl"}
        list(diffusion.table("toy", other, tmp_path).run_missing((k, 2)))
    assert len(runs) == 15 and len({recipe.model_dump_json() for recipe in runs}) == 15


@pytest.mark.parametrize("text", ["2/2", "x", "1", "-1/2", "1/"])
def test_a_shard_that_is_none_is_refused(text):
    assert tables.parse_shard("1/2") == (1, 2)
    with pytest.raises(ValueError, match="K/N"):
        tables.parse_shard(text)


def test_rows_of_earlier_weights_are_marked_and_measured_again(tmp_path, monkeypatch):
    def measure():
        yield "    stage"
        return [{"model": "builtin:x", "model_hash": "new", "name": "a"}]

    monkeypatch.setattr(tables, "weights", {"builtin:x": "new", "elsewhere": None}.get)
    path = tmp_path / "rows.jsonl"
    mine = Table("mine", lambda rows: "body", path, [Job("a", has(name="a"), measure)])
    assert mine.render() == "*No rows yet: run `compress tables mine`.*"
    for row in (
        {"model": "builtin:x", "model_hash": "old", "name": "a"},
        {"model": "builtin:x", "model_hash": "old", "name": "b"},
    ):
        append_rows(path, row)
    assert mine.render().endswith("**Measured on earlier weights of builtin:x.**")
    assert list(mine.run_missing()) == ["mine [1/1] a", "    stage"]
    assert [(row["name"], row["model_hash"]) for row in read_rows(path)] == [
        ("b", "old"),
        ("a", "new"),
    ]
    assert "earlier" not in mine.render() and "`eval/results/rows.jsonl`" in mine.render()
    assert list(mine.run_missing()) == []
    # weights that do not ship cannot be compared
    assert not tables.is_stale({"model": "elsewhere", "model_hash": "any"})
    assert tables.run_folder(tmp_path, "n", "builtin:x").name == "table_n_new"


def test_a_damaged_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        read_rows(path)


# ---- diffusion -----------------------------------------------------------------------------


def test_a_row_belongs_to_the_recipe_that_it_was_measured_with():
    recipe = load_pipeline_recipe("ddpm_gradflow_full")
    owns, row = diffusion.same_result(recipe), measured(recipe)
    assert owns(row)
    for other in ("method.steps=7", "seed=1", "recover.lr=5e-4", "evaluate.samples=7"):
        assert not owns(measured(load_pipeline_recipe("ddpm_gradflow_full", [other])))
    for execution in ("output=elsewhere", "train.save_every=7", "evaluate.batch=7"):
        assert owns(measured(load_pipeline_recipe("ddpm_gradflow_full", [execution])))
    # a knob that is younger than the row was at its default, one that is gone decided nothing
    row["settings"] = {k: v for k, v in row["settings"].items() if k != "method.granularity"}
    assert owns(row | {"settings": row["settings"] | {"method.gone": 3}})
    # nor does one that is of no effect beside the others
    assert owns(row | {"settings": row["settings"] | {"method.criterion_every": 30}})
    taylor = load_pipeline_recipe("ddpm_gradflow_full", ["method.criterion=taylor"])
    other = measured(taylor)["settings"] | {"method.criterion_every": 30}
    assert not diffusion.same_result(taylor)(row | {"settings": other})
    coarse = load_pipeline_recipe("ddpm_gradflow_full", ["method.granularity=coarse"])
    assert not diffusion.same_result(coarse)(row)


def test_lines_have_mean_and_deviation_over_seeds_and_the_best_is_bold(tmp_path, runs):
    toy = diffusion.table("toy", TOY, tmp_path)
    list(toy.run_missing())
    text = toy.render()
    body = cells(text)
    assert [line[:3] for line in body] == [
        ["half", "ours", "3"],
        ["half", "theirs", "3"],
        ["less", "ours", "3"],
        ["less", "theirs", "3"],
        ["less", "longer", "3"],
    ]
    # seeds 0, 1, 2: the sample deviation is 1; equal ones are both best
    assert body[0][3] == body[1][3] == "**1.80 ± 1.00**"
    assert body[2][3] == "1.60 ± 1.00" and body[4][3] == "**1.31 ± 1.00**"
    # a higher similarity is better
    assert body[2][5] == "**1.6000 ± 1.0000**" and body[4][5] == "1.3070 ± 1.0000"
    assert "kid_digits ×10³ ↓" in text and body[0][4] == "**1.00 ± 0.00**"
    assert text.count("\n\n") == 1 and "A toy. 400 optimiser steps of batch 32" in text
    assert "of one part of the real data against the other: fid_digits 2.50. Mean" in text
    assert "15 of 15 runs are in. Made by `compress tables toy`" in text


def test_data_without_a_known_floor_have_a_note(tmp_path):
    recipe = load_pipeline_recipe("ddpm_gradflow_full", ["data=folder:images"])
    row = measured(recipe) | {"dense": {"macs": 8.0, "fid": None}, "floor": {}}
    note = diffusion._note("A toy.", recipe, ["macs", "fid"], [row], 3)
    assert "real data" not in note and "1 of 3 runs are in" in note


def by_seed(values, name="validation_loss") -> dict:
    return {seed: dict.fromkeys(QUALITY, 0.0) | {name: v} for seed, v in values.items()}


def test_only_an_interval_without_zero_is_ahead_or_behind():
    theirs = {0: 2.0, 1: 4.0, 2: 9.0, 5: 0.0}
    verdicts = []
    for ours in ({0: 1.0, 1: 2.0, 2: 6.0, 7: 0.0}, {0: 1.0, 1: 2.1, 2: 6.9}):
        common = [(ours[seed], theirs[seed]) for seed in range(3)]
        test = stats.ttest_rel(*zip(*common, strict=True)).confidence_interval(0.95)
        found = diffusion.difference("validation_loss", by_seed(ours), by_seed(theirs))
        mean = statistics.mean(a - b for a, b in common)
        assert found["text"].endswith(f"{mean:.5f} [{test.low:.5f}, {test.high:.5f}]")
        assert found["text"].startswith("**ahead** ") == (test.high < 0)
        verdicts.append(found["verdict"])
    assert verdicts == ["open", "ahead"]
    one, other = (by_seed(values, "ssim_to_dense") for values in (ours, theirs))
    assert diffusion.difference("ssim_to_dense", one, other)["verdict"] == "behind"
    # one seed in common says nothing
    alone = diffusion.difference("fid_digits", by_seed({0: 1.0}), by_seed(theirs))
    assert alone == {"verdict": "open", "text": "–"}


def test_lines_are_compared_with_ours_in_the_same_budget(tmp_path, runs):
    reported = {
        "labels": {"budget": "half", "method": "elsewhere"},
        "seeds": "1",
        "values": dict.fromkeys(QUALITY, 0.25),
    }
    compared = {"against": {"method": "ours"}, "reported": [reported]}
    toy = diffusion.table("toy", TOY | compared, tmp_path)
    list(toy.run_missing())
    lines = toy.lines(toy.rows())
    half, less = ["ours", "theirs", "elsewhere"], ["ours", "theirs", "longer"]
    assert [line["method"] for line in lines] == half + less
    # by seed fid_digits is keep_macs + steps / 1000 + seed: the differences have no spread
    longer = lines[5]["differences"]
    assert longer["fid_digits"] == {"verdict": "behind", "text": "**behind** 0.29 [0.29, 0.29]"}
    assert longer["ssim_to_dense"]["verdict"] == "ahead"
    assert lines[1]["differences"]["fid_digits"]["verdict"] == "open"
    assert lines[3]["standing"] == "of 8 differences 1 ahead, 1 behind"
    first, second, note = toy.render().split("\n\n")
    assert "**" not in first and "| half | elsewhere | 1 | 0.25 |" in first
    assert second.splitlines()[0].startswith("| budget | ours minus | fid_digits | ")
    assert len(second.splitlines()) == 2 + 3 and note.startswith("A toy.")


@pytest.mark.parametrize("count", [1, 2, 10])
def test_spread_equals_that_of_the_standard_library(count):
    values = np.random.default_rng(count).normal(5, 2, count).tolist()
    spread = diffusion._spread("fid_digits", values)
    assert spread["mean"] == pytest.approx(statistics.mean(values))
    deviation = f" ± {statistics.stdev(values):.2f}" if count > 1 else ""
    assert spread["text"] == f"{spread['mean']:.2f}{deviation}"


def test_a_comparison_with_nothing_is_not_won_and_rows_of_other_recipes_are_left_out(tmp_path):
    toy = diffusion.table("toy", TOY, tmp_path)
    for sets in (["method.keep_macs=0.5"], ["method.keep_macs=0.9"]):
        append_rows(toy.path, measured(load_pipeline_recipe("ddpm_gradflow_full", sets)))
    [line] = cells(toy.render())
    assert line[:4] == ["half", "ours", "1", "1.00"]


def test_costs_are_shares_of_the_dense_model_and_the_runs_own_time(tmp_path, runs):
    toy = diffusion.table("toy", TOY | {"columns": [*diffusion.SHARES, *diffusion.TIMES]}, tmp_path)
    list(toy.run_missing())
    for line in cells(toy.render()):
        costs = [cell.strip("*") for cell in line[-5:]]
        assert costs[0] == costs[1] == "0.2500 ± 0.0000" and costs[2].startswith("0.250")
        assert costs[3:] == ["1.0 ± 1.0", "0.500 ± 0.000"]


@pytest.mark.parametrize(
    ("name", "count", "steps"),
    [
        ("main", 60, 400),
        ("ablation", 6, 400),
        ("attempts", 6, 400),
        ("emoji", 60, 100),
        ("dit", 66, 150),
    ],
)
def test_every_run_of_a_comparison_has_the_same_steps_and_training(name, count, steps, shipped):
    recipes = [job.run.args[0] for job in shipped[name].jobs]
    assert len(recipes) == count == len({r.model_dump_json() for r in recipes})
    assert {r.method.steps + r.recover.steps for r in recipes} == {steps}
    training = {}
    for job, recipe in zip(shipped[name].jobs, recipes, strict=True):
        # what was tried concerns the rival as well
        tried = job.name.partition(", ")[2] if name == "attempts" else ""
        own = recipe.recover.model_dump_json(exclude={"steps"})
        training.setdefault(tried, set()).add(own)
        assert (recipe.method.name == "oneshot") == ("one-shot" in job.name)
        keep = 0.5 if name == "attempts" else 0.3
        assert str(recipe.method.keep_macs) in job.name or recipe.method.keep_macs == keep
    assert all(len(settings) == 1 for settings in training.values())


def test_tables_share_the_runs_whose_recipe_is_the_same(shipped):
    recipes = [
        {job.run.args[0].model_dump_json() for job in shipped[name].jobs}
        for name in ("main", "ablation")
    ]
    # the shipped gradflow is in both tables
    assert len(recipes[0] & recipes[1]) == 1
    assert shipped["main"].path == shipped["ablation"].path != shipped["emoji"].path
    assert shipped["emoji"].path == shipped["coarse"].path


@pytest.mark.slow
def test_a_run_becomes_a_row(tmp_path):
    sets = ["method={name: oneshot, steps: 0, criterion: magnitude}", "recover.steps=2"]
    sets += ["recover.batch=2", "recover.distill=0", "evaluate.samples=8", "evaluate.steps=2"]
    tiny = TOY | {"blocks": [{"method": {"tiny": sets}}], "best_within": [], "seeds": 1}
    table = diffusion.table("tiny", tiny, tmp_path)
    assert "    recover" in list(table.run_missing()) and list(table.run_missing()) == []
    [row] = read_rows(table.path)
    assert row["optimiser_steps"] == 2 and row["prune_cpu_seconds"] > 0
    assert set(QUALITY) <= set(row["values"]) and not tables.is_stale(row)
    assert cells(table.render())[0][:2] == ["tiny", "1"]


# ---- one recipe on several processes -------------------------------------------------------


def finished(folder: Path, *, soft: float = 0.0, last: float = 1.0, weight: float = 0.0) -> Path:
    """What `compress run` leaves of masks and weights; one soft mask and one weight are moved."""
    masks = torch.tensor([[0.9, 0.8, 0.7], [0.5 + soft, 0.9, 0.3], [last, 1.0, 0.0]])
    (folder / processes.WEIGHTS.parent).mkdir(parents=True)
    save_file({"masks": masks}, folder / "trace.safetensors")
    weights = {"a": torch.ones(2, 3), "b": torch.full((2,), weight)}
    save_file(weights, folder / processes.WEIGHTS)
    facts = {"processes": 2, "seed": 0, "device": "cpu", "threads": 1, "versions": {}}
    facts |= {"created": "2026-01-01", "model": "builtin:ddpm-digits", "train_seconds": 1.0}
    value = {"compressed": {"value": 0.25, "ci95": [0.125, 0.5], "n": 3}}
    content = {"run": facts, "metrics": dict.fromkeys(QUALITY, value), "widths": []}
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def test_runs_on_several_processes_are_compared_by_masks_and_weights(tmp_path):
    first = finished(tmp_path / "first")
    same = processes.compare(first, first)
    assert same == {"soft_mask_difference": 0, "same_kept": True, "weight_difference": 0}
    near = finished(tmp_path / "near", soft=0.25, weight=-0.5)
    assert processes.compare(near, first) == {
        "soft_mask_difference": 0.25,
        "same_kept": True,
        "weight_difference": 0.5,
    }
    apart = processes.compare(finished(tmp_path / "other", last=0.0), first)
    # the last masks are binary: how far they are apart is no rounding
    assert not apart["same_kept"] and apart["soft_mask_difference"] == 0


def test_each_row_of_processes_is_measured_beside_those_that_it_is_compared_with(
    tmp_path, monkeypatch
):
    made = []

    def run(folder, number, parts):
        made.append((number, parts))
        finished(folder, soft=0.25 * (number > 1), weight=2.0 * (number > 1))

    monkeypatch.setattr(processes, "_run", run)
    table = processes.table(tmp_path, tmp_path)
    list(Table(table.name, table.body, table.path, table.jobs[2:3]).run_missing())
    assert made == [(2, 1), (1, 1), (1, 2)]
    [line] = cells(table.render())
    assert line[:4] == ["2", "1", "0.25 [0.12, 0.50]", "250.00 [125.00, 500.00]"]
    assert line[-5:] == ["yes", "2.5e-01", "2.0e+00", "2.5e-01", "2.0e+00"]
    # a run that is finished is compared as it is
    list(table.run_missing())
    assert made[3:] == [(1, 4), (4, 1)] and len(read_rows(table.path)) == len(processes.CELLS)


# ---- documents -----------------------------------------------------------------------------

DOCUMENT = "before\n<!-- table:main -->\nold\nrows\n<!-- /table:main -->\nafter\n"


def test_fill_replaces_what_is_between_the_marks_and_can_be_repeated():
    once = fill(DOCUMENT, {"main": r"| new \1 |", "other": "x"})
    assert once == "before\n<!-- table:main -->\n| new \\1 |\n<!-- /table:main -->\nafter\n"
    assert fill(once, {"main": r"| new \1 |"}) == once
    assert fill(DOCUMENT, {"other": "x"}) == DOCUMENT


@pytest.mark.parametrize(
    "document", ["", "<!-- table:main -->\n", "<!-- table:other -->\n<!-- /table:other -->"]
)
def test_a_table_needs_a_place_in_one_of_the_documents(document, tmp_path):
    paths = [tmp_path / "a.md", tmp_path / "b.md"]
    paths[0].write_text(document)
    paths[1].write_text(DOCUMENT.replace("main", "more"))
    with pytest.raises(ValueError, match="<!-- table:main --> and <!-- /table:main -->"):
        read_documents(paths, ["more", "main"])
    assert read_documents(paths, ["more"]) == {path: path.read_text() for path in paths}


@pytest.mark.parametrize("document", ["eval/RESULTS.md", "README.md"])
def test_the_documents_say_what_the_rows_say(document, shipped):
    text = (ROOT / document).read_text(encoding="utf8")
    places = {place[2] for place in PLACE.finditer(text)}
    if document == "README.md":
        places &= {"headline", "methods"}
    else:
        assert places == set(shipped) - {"methods"}
    tables = {name: shipped[name].render() for name in places}
    assert fill(text, tables) == text
    assert not any("earlier weights" in table for table in tables.values())


def test_documents_have_no_table_of_figures_that_is_typed_by_hand():
    text = PLACE.sub("", (ROOT / "eval" / "RESULTS.md").read_text(encoding="utf8"))
    assert not re.findall(r"^\|.*\d%.*$|^\|.*\d\.\d.*$", text, re.MULTILINE)


def test_aims_count_the_rows_that_reach_them():
    lines = [
        {"device": device, "size": size, "of": {"torch": share}, "ours": "torch"}
        for device, size, share in (
            ("cpu", 1, 0.9),
            ("cpu", 2, 0.5),
            ("cpu", 4, 0.7),
            ("H100", 4, 0.6),
        )
    ]
    measured = SimpleNamespace(rows=lambda: lines, lines=lambda rows: rows)
    aim = {
        "aim": "most of it",
        "table": "speed",
        "rows": {"ours": "torch"},
        "from": {"size": 2},
        "fact": "of",
        "format": "{:.0%}",
    }
    [above] = cells(_aims([aim | {"least": 0.6}], {"speed": measured}))
    assert above == [
        "most of it",
        "reached in 1 of 1 rows: 60%",
        "reached in 1 of 2 rows: 50% to 70%",
    ]
    [below] = cells(_aims([aim | {"most": 0.4}], {"speed": measured}))
    assert below[2] == "reached in 0 of 2 rows: 50% to 70%"


def test_a_claim_without_rows_or_rivals_keeps_its_words():
    lines = [{"keep": keep, "method": "ours", "seeds": 3} for keep in ("half", "less")]
    measured = SimpleNamespace(rows=lambda: lines, lines=lambda rows: rows)
    claim = {
        "claim": "ours keeps half",
        "table": "toy",
        "line": {"keep": "half"},
        "measured": "{seeds} seeds",
        "rival": "{seeds}",
        "n": "{seeds}",
    }
    missing = ["not measured yet: `compress tables toy`"] * 3
    for changes, expected in (
        ({}, ["3 seeds", "3", "3"]),
        ({"line": {"keep": "more"}}, missing),
        ({"rivals": [{"keep": "half"}], "best": "seeds"}, missing),
    ):
        [cell] = cells(_headline({"claims": [claim | changes], "note": ""}, {"toy": measured}))
        assert cell == ["ours keeps half", *expected]


def test_every_claim_of_the_headline_is_a_line_of_another_table(shipped):
    lines = cells(shipped["headline"].render())
    assert len(lines) == 8 and all(all(line) for line in lines)
    for name, first in (("main", 0), ("emoji", 2)):
        [line, *_] = shipped[name].lines(shipped[name].rows())
        assert line["keep_macs"] == "0.5" and line["method"] == "gradflow"
        shown = lines[first][1]
        assert line["validation_loss"]["text"] in shown and line["standing"] in shown


def test_rows_in_the_repository_say_how_they_were_made():
    for path in RESULTS.glob("*.jsonl"):
        rows = read_rows(path)
        facts = {"device", "threads", "versions", "seed"}
        if path.name.startswith("bench_"):
            facts |= {"bench", "part", "shape", "date"}
        else:
            facts |= {"command", "commit", "model"}
            diffusion_rows = path.name.startswith(("ddpm_", "dit_"))
            facts |= {"date", "widths"} if diffusion_rows else {"created", "pages"}
        settings = [row["settings"] for row in rows if "settings" in row]
        assert len({json.dumps(knobs) for knobs in settings}) == len(settings), "a run twice"
        for row in rows:
            assert facts <= set(row), path.name
            json.dumps(row, allow_nan=False)


def test_rows_of_a_benchmark_stand_beneath_each_other_with_their_ceilings(shipped):
    for table in (table for name, table in shipped.items() if name.startswith("bench_")):
        lines = table.lines(table.rows())
        assert not {line["part"] for line in lines} & set(bench.CEILINGS)
        begun = re.findall(r"^\| (?:cpu|NVIDIA)", table.render(), re.MULTILINE)
        assert len(begun) == len(lines)
        assert "GB/s copying" in table.render()
