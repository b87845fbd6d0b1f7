"""Runs that are killed late, or whose disk is full or read-only: ``interrupted.py RECIPE``.

One process imports torch and forks a child for every run; disks are mounted in this process's own
namespace. What was found lies in the current folder.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

import compress.checkpoints.slim as checkpoint
import compress.reports.html as html
from builders.forks import exit_code, fork
from builders.quick import quick_runs
from compress.runs.diffusion import DiffusionRun
from compress.runs.recipe import Recipe
from compress.runs.run import run_events

NOTHING = {"metrics": {}}


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def go(recipe, output, until=None, **options):
    stages = []
    for event in run_events(recipe, output=output, device="cpu", **options):
        stages.append([event.stage, event.step, event.total])
        if event.stage == until:
            kill()
    return stages


def unmeasured(*_):
    yield from ()
    return NOTHING


def in_child(name, work, *arguments) -> int:
    """The exit code of a child whose outcome lies in NAME.json."""

    def outcome():
        try:
            result = {"stages": work(*arguments)}
        except BaseException as error:
            result = {"error": [c.__name__ for c in type(error).__mro__], "message": str(error)}
        Path(f"{name}.json").write_text(json.dumps(result))

    return exit_code(fork(outcome))


def left(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def kill_in_checkpoint(recipe):
    DiffusionRun.measure = unmeasured
    checkpoint.model_card = kill
    go(recipe, "evaluated", resume=True)


def kill_in_report(recipe, writer):
    DiffusionRun.measure = unmeasured
    setattr(html, writer, kill)
    go(recipe, "evaluated", resume=True)


def kill_in_recipe(recipe):
    os.fsync = kill
    go(recipe, "fresh")


def enter(recipe, option):
    # only far enough to see that it goes on
    for event in run_events(recipe, output=option, device="cpu", **{option: True}):
        if event.stage == "flow":
            return [event.stage]


def killed(recipe) -> dict[str, list[int]]:
    resume = partial(go, resume=True)
    codes = {"evaluated": [in_child("x", go, recipe, "evaluated", "evaluate")]}
    codes["evaluated"] += [in_child("x", kill_in_checkpoint, recipe)]
    for writer in ("write_bytes", "write_text"):  # of the first figure, of the page
        codes["evaluated"] += [in_child("x", kill_in_report, recipe, writer)]
        done = Path("evaluated/figures").is_dir(), Path("evaluated/report.html").exists()
        codes[writer] = [*map(int, done)]
    codes["evaluated"] += [in_child("evaluated", resume, recipe, "evaluated")]
    codes["fresh"] = [in_child("x", kill_in_recipe, recipe)]
    for option in ("resume", "overwrite"):
        shutil.copytree("fresh", option)
        codes[option] = [in_child(f"enter {option}", enter, recipe, option)]
    return codes


def mount(name, options):
    folder = Path(name)
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    return folder, done.stderr if done.returncode else ""


def fill(folder, leave):
    free = shutil.disk_usage(folder).free
    Path(folder, "ballast").write_bytes(bytes(max(0, free - leave)))


def small_disk(recipe, full_at):
    DiffusionRun._check_space = lambda self: None
    if full_at == "state":
        fill(full_at, 200_000)
    else:

        def full(*args):
            fill(full_at, 8_192)
            yield from unmeasured()
            return NOTHING

        DiffusionRun.measure = full
    return go(recipe, f"{full_at}/run")


def mounted(recipe) -> dict[str, object]:
    """Why a disk could not be mounted, or what was left on it."""
    mounts = {}
    for name in ("state", "checkpoint"):
        folder, mounts[name] = mount(name, "size=6m")
        if not mounts[name]:
            in_child(name, small_disk, recipe, name)
            mounts[f"left in {name}"] = left(folder)
    folder, mounts["read-only"] = mount("read-only", "size=9m")
    if not mounts["read-only"]:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        in_child("read-only", go, recipe, folder / "run")
        mounts["left in read-only"] = left(folder)
    return mounts


def main(recipe: Recipe) -> None:
    torch.set_num_threads(1)
    with quick_runs():
        done = {"codes": killed(recipe), "mounts": mounted(recipe)}
    Path("done.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main(Recipe.model_validate_json(Path(sys.argv[1]).read_text()))
