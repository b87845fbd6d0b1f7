"""The suite for an offline machine with a GPU, rehearsed on the CPU at tiny sizes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def rows_of(folder):
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return [json.loads(line)["bench"] for line in lines]


def add_rows(out, results):
    program = [sys.executable, ROOT / ".ci" / "gpu" / "rows", out, results]
    return subprocess.run(program, capture_output=True, text=True)


def test_rows_are_added_once_each(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (tmp_path / "rows.jsonl").write_text('{"bench": "kernels", "n": 1}\n{"bench": "kernels"}\n')
    lost = add_rows(tmp_path, results)
    assert lost.returncode == 1 and "bench_kernels.jsonl expected" in lost.stderr

    file = results / "bench_kernels.jsonl"
    file.write_text('{"bench": "kernels"}\n')
    assert add_rows(tmp_path, results).stdout == "1 rows to bench_kernels.jsonl\n"
    assert add_rows(tmp_path, results).stdout == "nothing new\n"
    assert file.read_text() == '{"bench": "kernels"}\n{"bench": "kernels", "n": 1}\n'


@pytest.mark.slow
def test_every_stage_of_the_suite_on_the_cpu(tmp_path):
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    for name in ("compress", "eval", "kernels", "recipes", "tests"):
        shutil.copytree(ROOT / name, checkout / name)
    shutil.copytree(ROOT / ".ci" / "gpu", checkout / ".gpu")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    sizes = {"DEVICE": "cpu", "TINY": "1", "SLOW": "20", "BUDGET": "6000"}
    places = {"WORK": str(tmp_path / "work"), "OUT": str(out), "PYTHON": sys.executable}
    suite = ["bash", ".gpu/run.sh"]
    subprocess.run(suite, cwd=checkout, env=os.environ | sizes | places, check=True)

    stages = [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]
    failed = {stage["stage"]: stage["rc"] for stage in stages if stage.get("rc")}
    assert not failed, (out / "log.txt").read_text()[-5000:]
    names = {stage.get("stage") for stage in stages}
    assert {"install", "tests", "profile", "tune", "bf16", "fp32", "reader"} <= names
    assert {"kernels", "fastocr", "rtprune", "gradflow"} == set(rows_of(out))
    # the plan holds one shape that fails, so that failures are rehearsed as well
    [failure] = (tmp_path / "work" / "state" / "failures.jsonl").read_text().splitlines()
    assert "no_such_kernel" in failure
    results = shutil.copytree(ROOT / "eval" / "results", tmp_path / "results")
    assert add_rows(out, results).stdout.count("rows to bench_") == 4
