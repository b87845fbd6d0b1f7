"""The command line: exit codes, where output goes, and that help costs nothing."""

import errno
import io
import json
import logging
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from builders import programs
from compress import cli, doctor
from compress.common.files import write_json
from compress.eval.settings import Sampling
from compress.methods.base import Event
from compress.models.locate import ModelFolder

pytestmark = pytest.mark.usefixtures("quick_runs")

METRICS = {
    "run": {"method": "gradflow", "seed": 0},
    "widths": [{"level": "block_out_channels[0]", "dense": 24, "compressed": 16}],
    "metrics": {
        "macs": {
            "dense": {"value": 50_000_000, "ci95": None, "n": 1},
            "compressed": {"value": 25_000_000, "ci95": None, "n": 1},
            "ratio": 0.5,
            "better": "lower",
            "unit": "MACs",
            "how": "hooks",
        },
        "ssim_to_dense": {
            "dense": None,
            "compressed": {"value": 0.9, "ci95": [0.89, 0.91], "n": 512},
            "ratio": None,
            "better": "higher",
            "unit": "",
            "how": "Gaussian window 11",
        },
    },
    "floor": {"fid_digits": 0.5, "kid_digits": 0.001},
    "warnings": ["few samples"],
}


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "finished"
    folder.mkdir()
    write_json(folder / "metrics.json", METRICS)
    return folder


@pytest.fixture
def library(monkeypatch):
    """A library whose runs take no time, in place of the one that trains."""

    class Library(types.ModuleType):
        calls: list[dict]
        failure: BaseException | None = None

        def run_events(self, recipe, *, output, resume, overwrite, device):
            self.calls.append({"recipe": recipe, "output": output, "resume": resume})
            output.mkdir(parents=True, exist_ok=True)
            yield Event("prepare", 0, 0, message="dense model: 2 parameters")
            for step in range(1, 101):
                yield Event("flow", step, 100, {"loss": 1 / step})
            if self.failure:
                (output / "state").mkdir()
                (output / "state" / "state.safetensors").touch()
                raise self.failure
            write_json(output / "metrics.json", METRICS)
            yield Event("done", 0, 0)

        def dry_run(self, recipe, *, device):
            self.calls.append({"recipe": recipe, "device": device})
            problems = ["too narrow"] if recipe.method.keep_macs < 0.1 else []
            return {"params": 1234567, "widths": [16, 32], "problems": problems}

        BUILTIN_DATA = "builtin:digits"

        def evaluate_pipeline(self, at, sampling, **settings):
            self.calls.append({"model": at.name, "sampling": sampling, **settings})
            return {"fid_digits": {"value": 1.5, "ci95": [1.4, 1.6], "n": 512, "how": "digits"}}

    fake = Library("compress.runs.run")
    fake.calls = []
    for module in ("run", "forecast", "diffusion"):
        monkeypatch.setitem(sys.modules, f"compress.runs.{module}", fake)
    monkeypatch.setattr(
        "compress.models.locate.locate", lambda name, kind: ModelFolder(name, Path(), "diffusion")
    )
    return fake


def test_help_listings_and_mistakes_import_no_heavy_package():
    assert programs.run("light", fresh=True).stdout == "\n"


def test_version(invoke):
    from importlib.metadata import version

    result = invoke("--version")
    assert (result.exit_code, result.stdout.strip()) == (
        0,
        f"compress {version('compress-models')}",
    )


def test_no_verb_prints_help(invoke):
    assert "doctor" in invoke().output


def test_recipes_as_text_and_as_json(invoke):
    from compress.runs.recipe import list_recipes

    text, data = invoke("recipes"), invoke("recipes", "--json")
    rows = json.loads(data.stdout)
    assert [(row["name"], row["about"]) for row in rows] == list_recipes()
    assert all(row["name"] in text.stdout and row["about"] in text.stdout for row in rows)
    assert text.exit_code == data.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere.yaml"], ["no recipe nowhere.yaml", "ddpm_gradflow"]),
        (["ddpm_gradflow", "--set", "method.keep_mac=1"], ["nearest known key: method.keep_macs"]),
        (["ddpm_gradflow", "--set", "method.keep_macs=-1", "--set", "sed=1"], ["2 problems"]),
        (["ddpm_gradflow", "--resume", "--overwrite"], ["choose one"]),
    ],
)
def test_a_mistake_is_one_message_exit_code_2_and_nothing_written(
    arguments, parts, invoke, tmp_path
):
    result = invoke("run", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("error:") == 1
    assert all(part in result.stderr for part in parts)
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_unknown_verbs_and_options_are_usage_errors(invoke):
    assert invoke("prune").exit_code == invoke("run", "x", "--fast").exit_code == 2


def test_run_reports_lines_on_stderr_and_the_table_on_stdout(invoke, library):
    result = invoke("run", "ddpm_gradflow", "--set", "seed=5")
    assert result.exit_code == 0
    assert library.calls[0]["recipe"].seed == 5
    assert library.calls[0]["output"] == Path("runs/ddpm_gradflow")
    assert "prepare  dense model" in result.stderr and "flow  100/100  loss 0.01" in result.stderr
    assert 10 <= result.stderr.count("flow ") <= 12
    assert "50,000,000" in result.stdout and "0.9 [0.89, 0.91]" in result.stdout
    assert "flow" not in result.stdout.replace("ddpm_gradflow", "")


def test_json_is_all_that_stdout_gets(invoke, library):
    found = json.loads(invoke("run", "ddpm_gradflow", "--json", "--output", "here").stdout)
    assert found == {"folder": "here", "checkpoint": "here/checkpoint", **METRICS}
    assert json.loads(invoke("show", "here", "--json").stdout) == found


def test_ctrl_c_says_how_to_go_on(invoke, library):
    library.failure = KeyboardInterrupt()
    result = invoke("run", "ddpm_gradflow")
    assert result.exit_code == 130
    assert "interrupted; continue with: compress run ddpm_gradflow --resume" in result.stderr


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "No space left on device: x"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "Permission denied: x"),
        (FileExistsError("runs/a is finished; use --overwrite"), 2, "runs/a is finished"),
        (ValueError("expected a UNet2DModel; got X"), 2, "expected a UNet2DModel; got X"),
        (MemoryError(), 1, "out of memory; lower the batch"),
        (
            RuntimeError("at a.cpp\nnot enough memory: 9 bytes"),
            1,
            "not enough memory: 9 bytes; lower",
        ),
    ],
)
def test_failures_of_the_library_become_exit_codes(failure, code, message, invoke, library):
    library.failure = failure
    result = invoke("run", "ddpm_gradflow")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}")


def test_what_does_not_print_is_escaped_on_stderr(invoke, library, capsys):
    library.failure = ValueError("a\x1b[2J\u202e" + "b" * 10_000)
    result = invoke("run", "ddpm_gradflow")
    assert result.exit_code == 2 and r"error: a\x1b[2J\u202ebb" in result.stderr
    assert len(result.stderr.splitlines()[-1]) < 2_100
    logging.getLogger("compress.data").warning("no\n%s", "\x1b]0;page\x07.png")
    assert capsys.readouterr().err == r"no\n\x1b]0;page\x07.png" + "\n"


def test_null_takes_the_place_of_a_default(invoke, library):
    result = invoke("read", "nowhere.png", "--loop-tokens", "null")
    assert result.exit_code == 2 and "nowhere.png" in result.stderr, result.stderr
    result = invoke("read", "nowhere.png", "--loop-tokens", "many")
    assert result.exit_code == 2 and "--loop-tokens: " in result.stderr


def test_options_that_are_no_yaml_are_one_line(invoke, library):
    result = invoke("eval", "m", "--metrics", "[")
    assert result.exit_code == 2 and "--metrics should hold a value as in a recipe" in result.stderr


def test_what_is_no_mistake_of_the_user_keeps_its_traceback(invoke, library):
    library.failure = ZeroDivisionError("ours")
    assert isinstance(invoke("run", "ddpm_gradflow").exception, ZeroDivisionError)


def test_debugging_keeps_every_traceback(invoke, library, monkeypatch):
    monkeypatch.setenv("COMPRESS_DEBUG", "1")
    library.failure = ValueError("x")
    assert isinstance(invoke("run", "ddpm_gradflow").exception, ValueError)


def test_dry_run_predicts_and_fails_on_problems(invoke, library, tmp_path):
    good = invoke("run", "ddpm_gradflow", "--dry-run")
    bad = invoke("run", "ddpm_gradflow", "--dry-run", "--json", "--set", "method.keep_macs=0.01")
    assert (good.exit_code, bad.exit_code) == (0, 2)
    assert "1,234,567" in good.stdout
    assert json.loads(bad.stdout)["problems"] == ["too narrow"]
    assert list(tmp_path.iterdir()) == []


def test_show(invoke, finished):
    result = invoke("show", finished)
    assert result.exit_code == 0
    for part in (
        "macs [MACs]",
        "0.500",
        "24 -> 16",
        "fid_digits 0.5",
        "few samples",
        "report.html",
    ):
        assert part in result.stdout


def test_show_explains_what_is_missing(invoke, tmp_path):
    result = invoke("show", tmp_path)
    assert result.exit_code == 2 and "finished run" in result.stderr
    (tmp_path / "metrics.json").write_text("{")
    broken = invoke("show", tmp_path)
    assert broken.exit_code == 2 and "metrics.json should hold JSON" in broken.stderr


def test_compare_prints_a_table_or_json_and_draws(invoke, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "other")
    result = invoke("compare", finished, "other", "--plot", "plot.png")
    assert result.exit_code == 0, result.output
    assert "finished" in result.stdout and "other" in result.stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads(invoke("compare", finished, "other", "--json").stdout)
    assert {row["metric"] for row in rows} == set(METRICS["metrics"])
    assert invoke("compare", finished, "nowhere").exit_code == 2


def test_eval_hands_its_settings_on(invoke, library):
    result = invoke("eval", "some/model", "--samples", "64", "--sampler", "ddpm", "--json")
    assert json.loads(result.stdout)["fid_digits"]["value"] == 1.5
    [call] = library.calls
    assert (call["model"], call["sampling"]) == ("some/model", Sampling(samples=64, sampler="ddpm"))
    assert "1.5 [1.4, 1.6]" in invoke("eval", "some/model").stdout
    assert library.calls[-1]["sampling"] == Sampling()
    options = ("--guidance-scale", "3", "--batch", "4", "--caption-column", "words")
    assert invoke("eval", "some/model", *options).exit_code == 0
    call = library.calls[-1]
    assert call["sampling"] == Sampling(guidance_scale=3, batch=4)
    assert (call["columns"].caption, call["columns"].label) == ("words", "label")
    other = invoke("eval", "some/model", "--suite", "audio")
    assert other.exit_code == 2 and "got audio" in other.stderr
    for options, parts in (
        (("--samples", "1"), ["--samples: Input should be greater than or equal to 4; got 1"]),
        (("--mode", "large"), ["--mode is not for diffusion pipelines"]),
        (("--output", "here", "--resume"), ["only readers take --output, --resume", "some/model"]),
        (("--overwrite",), ["only readers take --overwrite"]),
    ):
        refused = invoke("eval", "some/model", *options)
        assert refused.exit_code == 2 and all(part in refused.stderr for part in parts)


@pytest.mark.slow  # test_tables.py renders the same tables
def test_tables_prints_what_the_rows_say_and_fills_documents(invoke, tmp_path):
    marks = "<!-- table:{0} -->\nold\n<!-- /table:{0} -->\n"
    (tmp_path / "a.md").write_text(marks.format("main"))
    (tmp_path / "b.md").write_text(marks.format("methods"))
    documents = ("--update", "a.md", "--update", "b.md")
    arguments = ("--results", str(Path(__file__).parents[1] / "eval" / "results"), "--render")
    result = invoke("tables", "main", "methods", *arguments, *documents)
    assert result.exit_code == 0, result.output
    for name, told in (("a", "| gradflow |"), ("b", "| `gradflow` |")):
        text = (tmp_path / f"{name}.md").read_text()
        assert told in text and "old" not in text
    # what is refused needs no rows
    (tmp_path / "results").mkdir()
    shutil.copy(Path(arguments[1]) / "tables.yaml", tmp_path / "results")
    arguments = ("--results", str(tmp_path / "results"), "--render")
    for wrong, told in (
        (["mine"], "tables are headline, aims, methods, main.* got mine"),
        (["--shard", "2/2"], "got "),
        (["readers", *documents], "add the marks"),
    ):
        refused = invoke("tables", *wrong, *arguments)
        assert refused.exit_code == 2 and re.search(told, refused.stderr)


def test_a_reader_where_a_pipeline_is_wanted_is_told_the_right_call():
    from compress.models.loading import load_pipeline

    for name in ("reader-qwen", "reader-x"):
        with pytest.raises(ValueError, match="ddpm-digits") as said:
            load_pipeline(f"builtin:{name}")
        assert "reader-qwen" in str(said.value)
        assert ("load it with compress.load_reader" in str(said.value)) == (name == "reader-qwen")


def test_doctor_counts_what_is_stored_and_a_dry_run_what_runs():
    from compress.runs.forecast import dry_run
    from compress.runs.recipe import load_recipe

    facts = dry_run(load_recipe("reader_rtprune"), device="cpu")
    [check] = [c for c in doctor.examine() if c.name == "builtin:reader-deepseek"]
    assert f"{facts['stored_values']:,} values stored" in check.found
    # CLIP's own patch embedding and its position ids are in the layout, and nothing reads them
    assert facts["stored_values"] - facts["parameters"] == 160 * 3 * 16 * 16 + 197


def test_doctor_finds_this_machine_fit(invoke):
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert "builtin:ddpm-digits" in result.stdout and "FAIL" not in result.stdout
    rows = json.loads(invoke("doctor", "--json").stdout)
    assert {"python", "torch", "cpu threads", "cache"} <= {row["name"] for row in rows}


def test_a_version_out_of_range_breaks_doctor_and_stops_a_run(invoke, library, monkeypatch):
    wanted = ["torch<1", "numpy", "no-such-package>=2", "pytest<1; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "pip install 'torch<1'" in result.stdout
    assert "broken: torch, no-such-package" in result.stderr
    stopped = invoke("run", "ddpm_gradflow")
    assert stopped.exit_code == 1 and "torch" in stopped.stderr and library.calls == []


def test_doctor_finds_damaged_weights(monkeypatch, tmp_path):
    (tmp_path / "ddpm-digits").mkdir()
    (tmp_path / "ddpm-digits" / "model.safetensors").write_bytes(b"not tensors")
    monkeypatch.setattr(doctor.resources, "files", lambda package: tmp_path)
    [check] = [check for check in doctor.examine() if check.name.startswith("builtin")]
    assert not check.ok and check.required and "model.safetensors" in check.found


def test_bars_on_a_terminal():
    screen = io.StringIO()
    events = [Event("prepare", 0, 0, message="hello [x]"), Event("flow", 3, 3, {"loss": 0.25})]
    cli._draw_bars(events, Console(file=screen, force_terminal=True, width=100))
    assert "hello [x]" in screen.getvalue() and "3/3" in screen.getvalue()
    assert "loss 0.25" in screen.getvalue()
