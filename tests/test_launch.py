"""The command on several processes: started by any launcher, killed, gone on with."""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builders.programs import LAUNCHERS, rank_of

COMMAND = LAUNCHERS["processes"]
RECIPE = """
model: builtin:ddpm-digits
data: builtin:digits
method: {name: gradflow, steps: 8, update_every: 2, criterion_every: 2, max_move: 0.7}
recover: {steps: 6, batch: 4}
train: {save_every: 2}
evaluate: {samples: 260, steps: 2, sampling_seeds: 2}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    (folder / "short.yaml").write_text(RECIPE)
    return folder


def environment(place, name):
    # of its own, so that the dense model's samples are drawn and not found
    cache = {"COMPRESS_CACHE": str(place / f"cache-{name}"), "PYTHONSAFEPATH": "1"}
    return os.environ | cache | {"OMP_NUM_THREADS": "1"}


def compress(place, name, *options, through=COMMAND):
    return subprocess.run(
        [*through, "run", "short.yaml", "--output", name, *options],
        cwd=place,
        env=environment(place, name),
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def alone(place):
    done = compress(place, "alone")
    assert done.returncode == 0, done.stderr
    return place / "alone"


def same(one: Path, other: Path) -> None:
    traces = [load_file(folder / "trace.safetensors")["masks"] for folder in (one, other)]
    assert torch.equal(traces[0][-1], traces[1][-1])
    assert (traces[0] - traces[1]).abs().max() <= 1e-5
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (one, other)]
    found = [[r["loss"] for r in map(json.loads, rows) if "loss" in r] for rows in logs]
    assert len(found[0]) == 14
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    samples = [load_file(folder / "samples.safetensors")["dense"] for folder in (one, other)]
    assert torch.equal(*samples)


@pytest.mark.slow
@pytest.mark.parametrize("way", LAUNCHERS)
def test_every_launcher_gives_the_run_of_one_process(place, alone, way):
    options = ("--processes", "2", "--json") if way == "processes" else ("--json",)
    done = compress(place, way, *options, through=LAUNCHERS[way])
    assert done.returncode == 0, done.stderr
    # one process prints
    assert json.loads(done.stdout)["run"]["processes"] == 2
    assert done.stderr.count("flow  8/8") == done.stderr.count("checkpoint in") == 1
    same(alone, place / way)


def free_port() -> int:
    """One of the ports that a step of SLURM may get."""
    for port in range(20_000 + os.getpid() % 10_000, 40_000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)):
                return port
    raise LookupError("no free port")


@pytest.mark.slow
def test_the_tasks_of_srun_give_the_run_of_one_process(place, alone):
    # what SLURM tells each task; nobody says how many threads it may use
    step = {name: x for name, x in environment(place, "srun").items() if name != "OMP_NUM_THREADS"}
    step |= {"SLURM_JOB_ID": str(free_port() - 20_000), "SLURM_STEP_ID": "0"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    tasks = [
        subprocess.Popen(
            [*COMMAND, "run", "short.yaml", "--output", "srun", "--json"],
            cwd=place,
            env=step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in (0, 1)
    ]
    said = [task.communicate(timeout=900) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    facts = json.loads(said[0][0])["run"]
    assert (facts["processes"], facts["threads"]) == (2, 1)
    # one process speaks
    assert said[1] == ("", "") and said[0][1].count("checkpoint in") == 1
    same(alone, place / "srun")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "at", "rank", "again"),
    [("flow", "5/8", 1, 1), ("recover", "3/6", 0, 4), ("evaluate", "3/12", 1, 2)],
)
def test_a_killed_process_ends_the_job_which_goes_on(place, alone, stage, at, rank, again):
    name = f"killed in {stage}".replace(" ", "-")
    command = [*COMMAND, "run", "short.yaml", "--output", name, "--processes", "2"]
    said, killed = [], False
    with subprocess.Popen(
        command,
        cwd=place,
        env=environment(place, name),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr:
            said.append(line)
            if not killed and line.startswith(f"{stage}  {at}"):
                os.kill(rank_of(process.pid, rank), signal.SIGKILL)
                killed = True
    assert process.returncode == 1 and killed, said
    assert f"error: process {rank} of 2 was killed by SIGKILL" in said[-1]
    again_with = f"compress run short.yaml --processes 2 --output {name} --resume"
    assert f"go on with: {again_with}" in said[-1]
    assert not any("Traceback" in line for line in said)
    done = compress(place, name, "--processes", str(again), "--resume")
    assert done.returncode == 0, done.stderr
    assert "flow  1/8" not in done.stderr
    same(alone, place / name)


@pytest.mark.slow
def test_what_is_wrong_everywhere_is_said_once(place):
    done = compress(place, "wrong", "--set", "data=folder:nowhere", "--processes", "2")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 2 and "nowhere, which does not exist" in errors[0], done.stderr
    assert errors[1] == "error: process 0 of 2 failed; all have ended"
    assert not (place / "wrong").exists()
