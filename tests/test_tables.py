"""Tables: statistics, bold figures, places in documents, and runs that are not made twice."""

import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compress.eval import tables
from compress.tables import diffusion as experiments
from compress.tables import processes as process_experiments
from compress.tables import reader as reader_experiments
from compress.tables.diffusion import main_table, render_table, run_missing

ROOT = Path(__file__).parents[1]


def row(method: str, keep: str = "0.5", seed: int = 0, **values: float) -> dict:
    values = {
        "fid_digits": 1.0,
        "kid_digits": 1e-3,
        "ssim_to_dense": 0.5,
        "validation_loss": 0.1,
    } | values
    return {"labels": {"keep_macs": keep, "method": method}, "seed": seed, "values": values}


LABELS = {"keep_macs": ("0.5", "0.3"), "method": ("soft", "hard", "third")}


def cells(table: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[2:]]


# ---- statistics and Markdown ---------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 10])
def test_mean_and_std_equal_those_of_the_standard_library(count):
    values = np.random.default_rng(count).normal(5, 2, count).tolist()
    mean, std = tables.mean_and_std(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert std == pytest.approx(statistics.stdev(values))


def test_one_value_has_no_deviation():
    mean, std = tables.mean_and_std([4.0])
    assert mean == 4 and math.isnan(std)


def test_rows_come_in_the_order_of_the_labels_with_all_their_seeds():
    rows = [
        row("hard", "0.3", fid_digits=3),
        row("soft", "0.5", 1, fid_digits=4),
        row("soft", "0.5", 0, fid_digits=2),
    ]
    table = tables.render(rows, LABELS, ["keep_macs"])
    assert [c[:3] for c in cells(table)] == [["0.5", "soft", "2"], ["0.3", "hard", "1"]]
    # 3 +- sqrt(2), by hand
    assert cells(table)[0][3] == "3.00 ± 1.41"
    assert cells(table)[1][3] == "3.00"


def test_the_best_of_each_comparison_is_bold():
    rows = [
        row("soft", "0.5", fid_digits=1, ssim_to_dense=0.2),
        row("hard", "0.5", fid_digits=2, ssim_to_dense=0.4),
        row("soft", "0.3", fid_digits=9, ssim_to_dense=0.1),
        row("hard", "0.3", fid_digits=8, ssim_to_dense=0.1),
        row("third", "0.3", fid_digits=10, ssim_to_dense=0.05),
    ]
    columns = ["fid_digits", "ssim_to_dense"]

    def bold(by):
        found = cells(tables.render(rows, LABELS, by, columns))
        return [[c.startswith("**") and c.endswith("**") for c in line[3:]] for line in found]

    # a lower distance and a higher similarity are better; equal ones are both best
    assert bold(["keep_macs"]) == [
        [True, False],
        [False, True],
        [False, True],
        [True, True],
        [False, False],
    ]
    assert bold([]) == [[True, False], [False, True], [False] * 2, [False] * 2, [False] * 2]


def test_a_comparison_with_nothing_is_not_won():
    assert "**" not in tables.render([row("soft")], LABELS, ["keep_macs"])


def test_scale_heading_and_shape():
    table = tables.render([row("soft", kid_digits=0.00234)], LABELS, [])
    lines = table.splitlines()
    assert "kid_digits ×10³" in lines[0] and "2.34" in lines[2]
    assert len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) == {"|", "-"}


def test_rows_that_the_table_does_not_know_are_left_out():
    rows = [row("soft"), row("magic"), row("hard", keep="0.9")]
    assert len(cells(tables.render(rows, LABELS, []))) == 1


# ---- documents and rows --------------------------------------------------------------------

DOCUMENT = "before\n<!-- table:main -->\nold\nrows\n<!-- /table:main -->\nafter\n"


def test_fill_replaces_what_is_between_the_marks_and_can_be_repeated():
    once = tables.fill(DOCUMENT, "main", r"| new \1 |")
    assert once == "before\n<!-- table:main -->\n| new \\1 |\n<!-- /table:main -->\nafter\n"
    assert tables.fill(once, "main", r"| new \1 |") == once


@pytest.mark.parametrize(
    "document", ["", "<!-- table:main -->\n", "<!-- table:other -->\n<!-- /table:other -->"]
)
def test_fill_needs_its_marks(document):
    with pytest.raises(ValueError, match="<!-- table:main --> and <!-- /table:main -->"):
        tables.fill(document, "main", "x")


def test_fill_file_changes_nothing_when_one_table_has_no_place(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(DOCUMENT)
    with pytest.raises(ValueError, match="table:ablation"):
        tables.fill_file(path, {"main": "x", "ablation": "y"})
    assert path.read_text() == DOCUMENT
    tables.fill_file(path, {"main": "x"})
    assert path.read_text() == tables.fill(DOCUMENT, "main", "x")


def test_rows_are_appended_and_read_back(tmp_path):
    path = tmp_path / "results" / "rows.jsonl"
    assert tables.read_rows(path) == []
    rows = [{"key": "a", "text": "two\nlines ±"}, {"key": "b"}]
    for content in rows:
        tables.append_row(path, content)
    assert tables.read_rows(path) == rows


def test_a_damaged_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        tables.read_rows(path)


# ---- experiments ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned() -> dict[str, dict[str, experiments.Experiment]]:
    return {name: {e.key(): e for e in make()} for name, make in experiments.TABLES.items()}


def test_tables_hold_every_combination_once(planned):
    assert (len(planned["main"]), len(planned["ablation"])) == (30, 45)
    # what concerns the training alone is tried on the strongest rival too
    trainings = [a for a in experiments.ATTEMPTS.values() if all("recover" in o for o in a)]
    assert len(planned["attempts"]) == len(experiments.ATTEMPTS) + len(trainings)
    for name, found in planned.items():
        labels = [(tuple(e.labels), e.seed) for e in found.values()]
        assert len(set(labels)) == len(labels)
        for e in found.values():
            for label, value in e.labels:
                assert value in experiments.LABELS[name][label]


def test_keys_do_not_change_between_calls_and_seeds_have_their_own(planned):
    assert [e.key() for e in main_table()] == list(planned["main"])
    one, other = (e for e in main_table((0, 1)) if dict(e.labels) == dict(main_table()[0].labels))
    assert one.key() != other.key()


def test_keys_ignore_where_and_how_often_things_are_saved():
    e = main_table()[0]
    moved = experiments.Experiment(e.labels, (*e.overrides, "output=elsewhere"), e.seed)
    saved = experiments.Experiment(e.labels, (*e.overrides, "train.save_every=7"), e.seed)
    longer = experiments.Experiment(e.labels, (*e.overrides, "recover.steps=7"), e.seed)
    assert e.key() == moved.key() == saved.key() != longer.key()


def test_main_and_ablation_share_the_runs_whose_recipe_is_the_same(planned):
    both = set(planned["main"]) & set(planned["ablation"])
    recipes = {
        name: {key: e.recipe().model_copy(update={"output": None}) for key, e in found.items()}
        for name, found in planned.items()
    }
    expected = {
        key for key, recipe in recipes["main"].items() if recipe in recipes["ablation"].values()
    }
    assert both == expected
    shared = {tuple(dict(planned["main"][key].labels).values()) for key in both}
    # one-shot random, magnitude and taylor at 0.3 are in both tables; so is the shipped gradflow
    assert {("0.3", f"one-shot {c}") for c in ("random", "magnitude", "taylor")} <= shared
    assert ("0.3", "gradflow") in shared
    assert len(both) == 4 * len(experiments.SEEDS)


def test_every_run_of_a_comparison_has_the_same_steps_budget_and_distillation(planned):
    for name in ("main", "ablation"):
        settings = set()
        for e in planned[name].values():
            recipe = e.recipe()
            settings.add(
                (
                    recipe.method.steps + recipe.recover.steps,
                    recipe.recover.model_dump_json(),
                    recipe.evaluate.model_dump_json(),
                    recipe.model,
                    recipe.data,
                )
            )
            labels = dict(e.labels)
            assert recipe.method.keep_macs == float(labels.get("keep_macs", 0.3))
            assert recipe.seed == e.seed
        assert len(settings) == 1


def test_attempts_take_as_many_steps_and_rivals_train_alike(planned):
    steps, training = set(), {}
    for e in planned["attempts"].values():
        recipe, labels = e.recipe(), dict(e.labels)
        steps.add(recipe.method.steps + recipe.recover.steps)
        assert recipe.method.keep_macs == 0.3 and e.seed == 0
        assert (recipe.method.name == "oneshot") == (labels["method"] != "gradflow")
        training.setdefault(labels["tried"], set()).add(recipe.recover.model_dump_json())
    assert steps == {400}
    assert all(len(settings) == 1 for settings in training.values())


def test_labels_say_what_the_recipe_does(planned):
    for e in planned["ablation"].values():
        labels, method = dict(e.labels), e.recipe().method
        assert method.criterion == labels["criterion"]
        process = "one-shot" if method.name == "oneshot" else method.process
        assert labels["process"].startswith(process)
    for e in planned["main"].values():
        labels, method = dict(e.labels), e.recipe().method
        one_shot = f"one-shot {method.criterion}"
        assert labels["method"] == (one_shot if method.name == "oneshot" else "gradflow")


# ---- filling the results file --------------------------------------------------------------


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs that take no time: each leaves a row with figures made from its key."""
    made = []

    def one(experiment, key):
        made.append(key)
        number = int(key, 16) / 16**16
        values = {"fid_digits": number, "kid_digits": number, "ssim_to_dense": number}
        return {
            "key": key,
            "seconds": 1.0,
            "values": values | {"validation_loss": number},
            "dense": {"fid_digits": 0.5, "validation_loss": 0.05},
            "floor": {"fid_digits": 0.1},
        }

    monkeypatch.setattr(experiments, "_run_one", one)
    return made


def test_runs_that_are_there_are_not_made_again(tmp_path, fake_runs, planned):
    results = tmp_path / "rows.jsonl"
    wanted = list(planned["main"])
    list(run_missing(["main"], results))
    assert fake_runs == wanted
    assert [r["key"] for r in tables.read_rows(results)] == wanted
    assert list(run_missing(["main"], results)) == []
    assert fake_runs == wanted
    # the other table only lacks what it does not share
    list(run_missing(["main", "ablation"], results))
    assert len(fake_runs) == len(set(planned["main"]) | set(planned["ablation"]))
    assert len(set(fake_runs)) == len(fake_runs)


def test_a_stopped_sitting_loses_one_run_at_most(tmp_path, fake_runs, planned):
    results = tmp_path / "rows.jsonl"
    lines = run_missing(["main"], results, seeds=(0,))
    for _ in range(5):  # two finished runs and the announcement of the third
        next(lines)
    lines.close()
    assert len(tables.read_rows(results)) == 2
    list(run_missing(["main"], results, seeds=(0,)))
    assert len(tables.read_rows(results)) == 10 == len(set(fake_runs))


def test_shards_share_the_work_without_overlap(tmp_path, fake_runs, planned):
    for k in range(3):
        list(run_missing(["ablation"], tmp_path / f"{k}.jsonl", shard=(k, 3)))
    assert sorted(fake_runs) == sorted(planned["ablation"])


def test_render_table_shows_the_rows_that_are_there(tmp_path, fake_runs):
    results = tmp_path / "rows.jsonl"
    assert "No rows yet" in render_table("main", results)
    list(run_missing(["main"], results, seeds=(0,)))
    tables.append_row(results, {"key": "of an older recipe"})
    text = render_table("main", results)
    body = text.split("\n\n")[0]
    assert len(cells(body)) == 10
    assert "10 of 30 runs are in" in text and "rows.jsonl" in text
    # the table's figures are those of the rows, each at its place
    by_key = {r["key"]: r for r in tables.read_rows(results)}
    figures = {tuple(line[:2]): line[3].strip("*") for line in cells(body)}
    for e in main_table((0,)):
        expected = f"{by_key[e.key()]['values']['fid_digits']:.2f}"
        assert figures[tuple(dict(e.labels).values())] == expected
    full = render_table("main", results, seeds=(0,))
    assert "10 of 10 runs are in" in full


def place(name: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf8")
    found = re.search(rf"<!-- table:{name} -->\n(.*?)\n<!-- /table:{name} -->", text, re.S)
    assert found, f"README.md has no place for the table {name}"
    return found[1]


@pytest.mark.parametrize("name", experiments.TABLES)
def test_the_tables_of_the_readme_are_generated_from_the_rows(name):
    shown = place(name)
    results = ROOT / "eval" / "results" / "ddpm_digits.jsonl"
    if not {e.key() for e in experiments.TABLES[name]()} & {
        row["key"] for row in tables.read_rows(experiments.results_of(name, results))
    }:
        # nothing has been measured: then nothing may be claimed
        assert "|" not in shown
        return
    assert shown == render_table(name, results)


def test_costs_are_shares_of_the_dense_model_and_the_runs_own_time(tmp_path, planned):
    results = tmp_path / "rows.jsonl"
    for key, e in planned["allocation"].items():
        # a model of a quarter of the cost, pruned in as many seconds as its seed says
        dense = dict.fromkeys(("macs", "params", "latency_ms"), 8.0)
        values = {"fid_digits": 1, "kid_digits": 1, "ssim_to_dense": 1, "validation_loss": 1}
        content = {
            "key": key,
            "values": values | dict.fromkeys(dense, 2.0),
            "dense": dense | {"fid_digits": 1.0, "validation_loss": 1.0},
            "prune_cpu_seconds": float(e.seed),
            "criterion_share": 0.5,
        }
        tables.append_row(experiments.results_of("allocation", results), content)
    assert not results.exists()
    shown = render_table("allocation", results).split("\n\n")[0]
    assert len(cells(shown)) == len(experiments.VARIANTS)
    for line in cells(shown):
        costs = [cell.strip("*") for cell in line[-5:]]
        assert costs[0] == costs[1] == "0.2500 ± 0.0000" and costs[2].startswith("0.250")
        assert costs[3:] == ["1.0 ± 1.0", "0.500 ± 0.000"]


def test_knobs_younger_than_the_rows_change_no_key_where_they_are_not_set():
    base = main_table()[0]
    same = [*base.overrides, "method.allocation=uniform", "method.granularity=fine"]
    other = [*base.overrides, "method.granularity=coarse"]
    keys = [experiments.Experiment(base.labels, tuple(o), base.seed).key() for o in (same, other)]
    assert keys[0] == base.key() != keys[1]


@pytest.mark.parametrize("name", reader_experiments.NAMES)
def test_the_readers_tables_are_generated_from_the_rows(name):
    shown = place(name)
    results = ROOT / "eval" / "results" / "ddpm_digits.jsonl"
    assert shown == reader_experiments.render_table(name, results)
    if not reader_experiments.results_file(results, name).is_file():
        assert "|" not in shown


def test_rows_in_the_repository_say_how_they_were_made():
    for path in (ROOT / "eval" / "results").glob("*.jsonl"):
        rows = tables.read_rows(path)
        facts = {"command", "commit", "device", "threads", "versions", "seed"}
        if path.name.startswith("ddpm_digits"):
            facts |= {"date", "widths"}
            assert len({r["key"] for r in rows}) == len(rows), f"{path.name} has a run twice"
        elif path.name.startswith("bench_"):
            facts = facts - {"command", "commit"} | {"date", "shape"}
        else:
            facts |= {"created", "model", "data", "pages"}
        for content in rows:
            assert facts <= set(content), path.name
            if path.name.startswith("ddpm_digits"):
                assert set(tables.QUALITY) <= set(content["values"])
            json.dumps(content, allow_nan=False)


# ---- one recipe on several processes -------------------------------------------------------


def finished(folder: Path, *, soft: float = 0.0, last: float = 1.0, weight: float = 0.0) -> Path:
    """What `compress run` leaves of masks and weights; one soft mask and one weight are moved."""
    masks = torch.tensor([[0.9, 0.8, 0.7], [0.5 + soft, 0.9, 0.3], [last, 1.0, 0.0]])
    (folder / process_experiments.WEIGHTS.parent).mkdir(parents=True)
    save_file({"masks": masks}, folder / "trace.safetensors")
    weights = {"a": torch.ones(2, 3), "b": torch.full((2,), weight)}
    save_file(weights, folder / process_experiments.WEIGHTS)
    facts = {"processes": 2, "seed": 0, "device": "cpu", "threads": 1, "versions": {}}
    facts["created"] = "2026-01-01"
    measured = dict.fromkeys(
        tables.QUALITY, {"compressed": {"value": 0.25, "ci95": [0.125, 0.5], "n": 3}}
    )
    content = {"run": {**facts, "train_seconds": 1.0}, "metrics": measured, "widths": []}
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def test_runs_on_several_processes_are_compared_by_masks_and_weights(tmp_path):
    first = finished(tmp_path / "first")
    same = process_experiments.compare(first, first)
    assert same == {"soft_mask_difference": 0, "same_kept": True, "weight_difference": 0}
    near = finished(tmp_path / "near", soft=0.25, weight=-0.5)
    assert process_experiments.compare(near, first) == {
        "soft_mask_difference": 0.25,
        "same_kept": True,
        "weight_difference": 0.5,
    }
    other = finished(tmp_path / "other", last=0.0)
    found = process_experiments.compare(other, first)
    # the last masks are binary: how far they are apart is no rounding
    assert not found["same_kept"] and found["soft_mask_difference"] == 0


def test_the_table_of_processes_shows_its_rows(tmp_path):
    results = tmp_path / "rows.jsonl"
    assert "No rows yet" in process_experiments.render_table(results)
    one, alike = finished(tmp_path / "one"), finished(tmp_path / "alike", soft=0.25, weight=0.5)
    far = finished(tmp_path / "far", last=0.0, weight=2.0)
    row = process_experiments.make_row(far, 3, one, alike)
    tables.append_row(process_experiments.results_file(results), row)
    [line] = cells(process_experiments.render_table(results).split("\n\n")[0])
    assert line[:2] == ["2", "3"]
    assert line[2] == "0.25 [0.12, 0.50]" and line[3] == "250.00 [125.00, 500.00]"
    assert line[-5:] == ["NO", "0.0e+00", "2.0e+00", "2.5e-01", "1.5e+00"]


def test_every_run_of_the_table_of_processes_comes_after_those_that_it_is_compared_with():
    done = set()
    for processes, parts in process_experiments.CELLS:
        done.add((processes, parts))
        assert {(1, 1), (1, processes * parts)} <= done


def test_the_table_of_processes_in_the_readme_is_generated_from_the_rows():
    results = ROOT / "eval" / "results" / "ddpm_digits.jsonl"
    assert place("processes") == process_experiments.render_table(results)
