"""A run that is killed at any moment and resumed gives the weights of an uninterrupted one.

One driver process imports torch once and forks a child for every run, so that a killed run and its
resumption never share memory; all of them run on one thread.
"""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from compress.common.journal import Journal
from compress.data.sources import ImageData, TensorImages
from compress.methods.gradflow import GradFlow, OneShot
from compress.methods.gradflow.train import PruningRun
from compress.methods.training import Training

FLOW, RECOVER, SAVE_EVERY = 8, 5, 2
EVENTS = FLOW + RECOVER

DRIVER = """
import json
import os
import signal
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import save_file

from compress.data.sources import ImageData
from compress.data.sources import TensorImages
from compress.methods.gradflow import GradFlow, OneShot
from compress.methods.training import Training
from compress.common.journal import Journal
from compress.methods.gradflow.train import PruningRun

torch.set_num_threads(1)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def start(scenario, folder, resume):
    torch.manual_seed(0)
    unet = UNet2DModel(**scenario["unet"])
    torch.seed()  # a fresh process has anything in its generator
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    data = ImageData("noise", TensorImages(images[:12]), TensorImages(images[12:]))
    kind = {"gradflow": GradFlow, "oneshot": OneShot}[scenario["method"]["name"]]
    return PruningRun(
        unet,
        DDPMScheduler(num_train_timesteps=50),
        data,
        kind(**scenario["method"]),
        Training(**scenario["training"]),
        Journal(folder),
        device="cpu",
        resume=resume,
    )


def finish(scenario, folder, resume):
    generator = start(scenario, folder, resume).events()
    taken = 0
    while True:
        try:
            next(generator)
            taken += 1
        except StopIteration as stop:
            pruned = stop.value
            break
    save_file(dict(pruned.unet.state_dict()), folder / "weights.safetensors")
    if pruned.trace:
        save_file(pruned.trace, folder / "trace.safetensors")
    facts = {"events": taken, "report": pruned.report, "widths": pruned.widths}
    (folder / "facts.json").write_text(json.dumps(facts))


def die(scenario, folder):
    where = scenario["kill"]
    if "in_save" in where:
        # a state is written in steps: some bytes, all bytes, the new name
        saves = iter(range(1, 1000))
        real = {"write": os.fdopen, "replace": os.replace}

        class Half:
            def __init__(self, handle, mode):
                self.file = real["write"](handle, mode)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def write(self, content):
                self.file.write(content[: len(content) // 2])
                self.file.flush()
                kill()

        def replace(*args):
            kill()

        def replaced(*args):
            real["replace"](*args)
            kill()

        import compress.common.journal as state

        write_bytes = state.write_bytes

        def last_save(path, content):
            if next(saves) == where["save"]:
                how = where["in_save"]
                if how == "half":
                    os.fdopen = Half
                elif how == "before rename":
                    os.replace = replace
                else:
                    os.replace = replaced
            write_bytes(path, content)

        state.write_bytes = last_save
    if "at_surgery" in where:
        name = where["at_surgery"]
        real_method = getattr(PruningRun, name)

        def dying(self, *args):
            if where["after"]:
                real_method(self, *args)
            kill()

        setattr(PruningRun, name, dying)
    if "after_log" in where:
        # between the row in the log and the state that knows of it
        save = PruningRun._save
        PruningRun._save = lambda self: kill() if self.step == where["after_log"] else save(self)
    for number, _ in enumerate(start(scenario, folder, False).events(), start=1):
        if number == where.get("event"):
            kill()


def in_child(work, *args):
    child = os.fork()
    if not child:
        code = 1
        try:
            work(*args)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


job = json.loads(Path(sys.argv[1]).read_text())
codes = {}
for name, scenario in job["scenarios"].items():
    folder = Path(job["folder"]) / name
    folder.mkdir()
    codes[name] = []
    for _ in range(scenario.get("kills", 1) if scenario["kill"] else 0):
        codes[name].append(in_child(die, scenario, folder))
        left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
        (folder / "left.json").write_text(json.dumps(left))
    codes[name].append(in_child(finish, scenario, folder, bool(scenario["kill"])))
(Path(job["folder"]) / "codes.json").write_text(json.dumps(codes))
"""

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    # dropout draws from the global generator, which a resumed run must find as it was
    "dropout": 0.1,
}
SOFT = {
    "name": "gradflow",
    "keep_macs": 0.28,
    "steps": FLOW,
    "update_every": 1,
    "criterion_every": 3,
    "criterion_batches": 1,
    "max_move": 0.4,
    "settle": 0.25,
}
SHOT = {"name": "oneshot", "keep_macs": 0.28, "steps": FLOW, "criterion_batches": 1}
TRAINING = {"steps": RECOVER, "batch": 4, "lr": 1e-3, "save_every": SAVE_EVERY}

# states are written at steps 2, 4, 6, 8, after surgery, at 10, 12 and 13
FIXED = {"flow": 3, "settling": 7, "recovery": 11}
RANDOM = random.Random(20250109).sample(sorted(set(range(1, EVENTS)) - set(FIXED.values())), 3)
KILLS = {
    **{f"event {step} ({name})": {"event": step} for name, step in FIXED.items()},
    **{f"event {step} (random)": {"event": step} for step in sorted(RANDOM)},
    "before any state": {"event": 1},
    "before surgery": {"at_surgery": "_operate", "after": False},
    "after surgery, before its state": {"at_surgery": "_operate", "after": True},
    "between log and state": {"after_log": 6},
    "in a save, half written": {"in_save": "half", "save": 3},
    "in a save, before the rename": {"in_save": "before rename", "save": 6},
    "in a save, after the rename": {"in_save": "after rename", "save": 7},
}
SCENARIOS = {
    "uninterrupted": {"method": SOFT, "kill": None},
    **{name: {"method": SOFT, "kill": kill} for name, kill in KILLS.items()},
    "one-shot uninterrupted": {"method": SHOT, "kill": None},
    "one-shot, event 5": {"method": SHOT, "kill": {"event": 5}},
}
RESUMED = [name for name, scenario in SCENARIOS.items() if scenario["kill"]]


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """Every scenario's folder after its last process, and the exit codes of its processes."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "driver.py").write_text(DRIVER)
    scenarios = {name: s | {"unet": UNET, "training": TRAINING} for name, s in SCENARIOS.items()}
    (folder / "job.json").write_text(json.dumps({"folder": str(folder), "scenarios": scenarios}))
    done = subprocess.run(
        [sys.executable, "-P", str(folder / "driver.py"), str(folder / "job.json")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads((folder / "codes.json").read_text())
    assert codes["uninterrupted"] == codes["one-shot uninterrupted"] == [0], done.stderr
    return folder, codes, done.stderr


def reference_of(name: str) -> str:
    return "one-shot uninterrupted" if name.startswith("one-shot") else "uninterrupted"


def log(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_weights_are_those_of_an_uninterrupted_run(driven, name):
    folder, codes, stderr = driven
    assert codes[name] == [-signal.SIGKILL, 0], stderr
    expected = load_file(folder / reference_of(name) / "weights.safetensors")
    found = load_file(folder / name / "weights.safetensors")
    assert list(found) == list(expected)
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("name", RESUMED)
def test_the_log_has_every_step_once(driven, name):
    folder = driven[0]
    steps = [row["step"] for row in log(folder / name) if row["stage"] in ("flow", "recover")]
    assert steps == list(range(1, EVENTS + 1))
    # to the last figure: losses, masks, surgery
    assert log(folder / name) == log(folder / reference_of(name))


@pytest.mark.parametrize("name", [n for n in RESUMED if not n.startswith("one-shot")])
def test_masks_and_counters_continue(driven, name):
    folder = driven[0]
    traces = [load_file(folder / n / "trace.safetensors") for n in (name, "uninterrupted")]
    assert torch.equal(traces[0]["masks"], traces[1]["masks"])
    assert torch.equal(traces[0]["steps"], traces[1]["steps"])
    facts = [json.loads((folder / n / "facts.json").read_text()) for n in (name, "uninterrupted")]
    for key in ("returned_channels", "optimiser_steps", "surgery"):
        assert facts[0]["report"][key] == facts[1]["report"][key]
    assert facts[0]["widths"] == facts[1]["widths"]


@pytest.mark.parametrize(
    ("name", "steps_left"),
    [
        ("event 3 (flow)", EVENTS - 2),
        ("event 7 (settling)", EVENTS - 6),
        ("before any state", EVENTS),
        ("before surgery", EVENTS - FLOW),
        ("after surgery, before its state", EVENTS - FLOW),
        ("between log and state", EVENTS - 4),
        ("in a save, half written", EVENTS - 4),
        ("in a save, after the rename", EVENTS - 12),
    ],
)
def test_only_what_is_not_saved_is_done_again(driven, name, steps_left):
    folder = driven[0]
    assert json.loads((folder / name / "facts.json").read_text())["events"] == steps_left


def test_a_kill_in_the_save_leaves_the_old_state_readable(driven):
    folder = driven[0]
    for name in RESUMED:
        left = json.loads((folder / name / "left.json").read_text())
        states = [f for f in left if f.startswith("state/state") and f.endswith(".safetensors")]
        assert bool(states) == (name != "before any state")


def test_the_criterion_kept_its_own_time(driven):
    folder = driven[0]
    for name in ("uninterrupted", "event 11 (recovery)"):
        report = json.loads((folder / name / "facts.json").read_text())["report"]
        assert 0 < report["criterion_seconds"] <= report["train_seconds"]


# ---- in this process: what a state may not be ----------------------------------------------


def start(folder, resume: bool, **changes) -> PruningRun:
    torch.manual_seed(0)
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    method = SHOT | changes.pop("method", {})
    return PruningRun(
        UNet2DModel(**(UNET | changes.pop("unet", {}))),
        DDPMScheduler(num_train_timesteps=50),
        ImageData("noise", TensorImages(images[:12]), TensorImages(images[12:])),
        OneShot(**method) if method["name"] == "oneshot" else GradFlow(**method),
        Training(**(TRAINING | changes)),
        Journal(folder),
        device="cpu",
        resume=resume,
    )


@pytest.fixture
def stopped(tmp_path):
    """A run that was left after its third step."""
    events = start(tmp_path, False).events()
    for _ in range(3):
        next(events)
    events.close()
    return tmp_path


@pytest.mark.parametrize("name", ["steps", "updates"])
def test_a_state_before_the_second_estimate_is_saved(tmp_path, name):
    # at first the scores and the estimate that they come from are one tensor
    method = SOFT | {"criterion_every": 100} if name == "updates" else SOFT
    events = start(tmp_path, False, method=method, save_every=1).events()
    next(events)
    events.close()
    assert start(tmp_path, True, method=method).step == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:1000],
        lambda content: content[:-1],
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content.replace(b"facts", b"fabts", 1),
    ],
    ids=["empty", "header cut", "data cut", "header size", "no facts"],
)
def test_a_damaged_state_is_named(stopped, damage):
    path = stopped / "state" / "state.safetensors"
    path.with_name("state-1.safetensors").unlink()
    path.write_bytes(damage(path.read_bytes()))
    before = (stopped / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="should hold a saved state but cannot be read") as caught:
        start(stopped, True)
    assert str(path) in str(caught.value) and "--overwrite" in str(caught.value)
    assert (stopped / "log.jsonl").read_bytes() == before


@pytest.fixture
def two_states(tmp_path):
    """A run that was left after its fifth step, with states of steps 2 and 4."""
    events = start(tmp_path, False).events()
    for _ in range(5):
        next(events)
    events.close()
    states = tmp_path / "state"
    assert sorted(p.name for p in states.iterdir()) == ["state-1.safetensors", "state.safetensors"]
    return tmp_path


def weights_after(run: PruningRun) -> dict[str, torch.Tensor]:
    events = run.events()
    while True:
        try:
            next(events)
        except StopIteration as stop:
            return stop.value.unet.state_dict()


@pytest.mark.parametrize("damage", ["cut", "one bit", "log"])
def test_a_damaged_newest_state_gives_way_to_the_one_before(two_states, tmp_path_factory, damage):
    newest, before = (two_states / "state" / f"state{x}.safetensors" for x in ("", "-1"))
    content = bytearray(newest.read_bytes())
    if damage == "log":
        # a power cut can keep a state and lose the end of the log
        log_file = two_states / "log.jsonl"
        rows = log_file.read_text().splitlines(keepends=True)
        log_file.write_text("".join(rows[: len(rows) // 2 + 1]))
    else:
        content[len(content) // 2] ^= 1
        newest.write_bytes(content if damage == "one bit" else content[:-10])
    with pytest.warns(UserWarning, match="going on from state-1.safetensors") as caught:
        run = start(two_states, True)
    assert run.step == 2
    named = "log.jsonl" if damage == "log" else str(newest)
    assert named in str(caught[0].message)
    # the bad one is gone before it can push out the good one, and nothing is lost but time
    good = before.read_bytes()
    events = run.events()
    next(events)
    assert not newest.exists() and before.read_bytes() == good
    events.close()
    expected = weights_after(start(tmp_path_factory.mktemp("whole"), False))
    found = weights_after(start(two_states, True))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    steps = [row["step"] for row in log(two_states) if row["stage"] == "recover"]
    assert steps == list(range(1, EVENTS + 1))


def test_states_that_are_all_damaged_are_all_named(two_states):
    for path in (two_states / "state").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"state\.safetensors.*state-1\.safetensors.*--overwrite"):
        start(two_states, True)


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_states_are_kept_as_asked_for(tmp_path, keep):
    events = start(tmp_path, False, keep_states=keep, save_every=1).events()
    for _ in range(5):
        next(events)
    events.close()
    files = sorted((tmp_path / "state").iterdir())
    assert len(files) == keep
    facts = [Journal(tmp_path)._states()[age] for age in range(keep)]
    assert sorted(facts) == files


def test_a_run_from_the_start_forgets_the_states_of_another(two_states):
    events = start(two_states, False).events()
    next(events)
    events.close()
    # one-shot pruning saves once before its first step
    assert [p.name for p in (two_states / "state").iterdir()] == ["state.safetensors"]


def test_what_a_kill_in_a_write_left_is_removed(two_states):
    (two_states / "state" / ".state.safetensors-abc").write_bytes(b"half")
    events = start(two_states, True).events()
    next(events)
    events.close()
    assert not (two_states / "state" / ".state.safetensors-abc").exists()


@pytest.mark.parametrize("fact", ["threads", "torch"])
def test_another_machine_is_a_warning(stopped, monkeypatch, fact):
    if fact == "threads":
        here = torch.get_num_threads()
        monkeypatch.setattr(torch, "get_num_threads", lambda: here + 1)
        message = f"threads={here}, here it is {here + 1}"
    else:
        monkeypatch.setattr(torch, "__version__", "0.0.1")
        message = "here it is 0.0.1"
    with pytest.warns(UserWarning, match=message):
        assert start(stopped, True).step == 2


def test_a_log_that_lost_rows_is_noticed(stopped):
    # a power cut can keep a state and lose the end of the log
    path = stopped / "log.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match=r"log\.jsonl"):
        start(stopped, True)


def test_a_journal_without_a_folder_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events = start(None, False, save_every=1).events()
    for _ in range(3):
        next(events)
    events.close()
    assert list(tmp_path.iterdir()) == []
    assert Journal().load() is None and Journal().state_file is None
