"""A run that is killed at any moment and resumed gives the weights of an uninterrupted one.

The runs are those of tests/programs/resume.py.
"""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from builders import programs
from builders.events import leave
from builders.tiers import few
from compress.common.events import drain
from compress.common.journal import Journal
from compress.methods.gradflow import GradFlow
from programs.resume import EVENTS, FLOW, SCENARIOS, SOFT, start

# beside each a moment of the same kind is tried by default
SLOW = {
    "event 3 (flow)",
    "event 7 (settling)",
    "in a save, after the rename",
    "before any state",
    "before surgery",
    "in a save, before the rename",
    *(name for name in SCENARIOS if name.endswith("(random)")),
}
REFERENCES = ("uninterrupted", "one-shot uninterrupted")
RESUMED = [name for name, (_, kill) in SCENARIOS.items() if kill]


def each(names):
    """Parameters; they are the scenarios that the program runs."""
    return [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in names]


@pytest.fixture(scope="module")
def driven(tmp_path_factory, request):
    """Every scenario's folder after its last process, and the exit codes of its processes."""
    folder = tmp_path_factory.mktemp("resume")
    items = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params.get("name") for item in items if hasattr(item, "callspec")}
    names = [name for name in SCENARIOS if name in asked or name in REFERENCES]
    stderr = programs.run("resume", folder, *names).stderr
    codes = json.loads((folder / "codes.json").read_text())
    assert codes["uninterrupted"] == codes["one-shot uninterrupted"] == [0], stderr
    return folder, codes, stderr


def reference_of(name: str) -> str:
    return "one-shot uninterrupted" if name.startswith("one-shot") else "uninterrupted"


def log(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("name", each(RESUMED))
def test_resumed_weights_are_those_of_an_uninterrupted_run(driven, name):
    folder, codes, stderr = driven
    assert codes[name] == [-signal.SIGKILL, 0], stderr
    expected = load_file(folder / reference_of(name) / "weights.safetensors")
    found = load_file(folder / name / "weights.safetensors")
    assert list(found) == list(expected)
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("name", each(RESUMED))
def test_the_log_has_every_step_once(driven, name):
    folder = driven[0]
    steps = [row["step"] for row in log(folder / name) if row["stage"] in ("flow", "recover")]
    assert steps == list(range(1, EVENTS + 1))
    # to the last figure: losses, masks, surgery
    assert log(folder / name) == log(folder / reference_of(name))


@pytest.mark.parametrize("name", each(n for n in RESUMED if not n.startswith("one-shot")))
def test_masks_and_counters_continue(driven, name):
    folder = driven[0]
    traces = [load_file(folder / n / "trace.safetensors") for n in (name, "uninterrupted")]
    assert torch.equal(traces[0]["masks"], traces[1]["masks"])
    assert torch.equal(traces[0]["steps"], traces[1]["steps"])
    facts = [json.loads((folder / n / "facts.json").read_text()) for n in (name, "uninterrupted")]
    for key in ("returned_channels", "optimiser_steps", "surgery"):
        assert facts[0]["report"][key] == facts[1]["report"][key]
    assert facts[0]["widths"] == facts[1]["widths"]


SAVED = {
    "event 3 (flow)": 2,
    "event 7 (settling)": 6,
    "before any state": 0,
    "before surgery": FLOW,
    "after surgery, before its state": FLOW,
    "between log and state": 4,
    "in a save, half written": 4,
    "in a save, after the rename": 12,
}


@pytest.mark.parametrize("name", each(SAVED))
def test_only_what_is_not_saved_is_done_again(driven, name):
    folder = driven[0]
    facts = json.loads((folder / name / "facts.json").read_text())
    assert facts["events"] == EVENTS - SAVED[name]


@pytest.mark.parametrize("name", each(RESUMED))
def test_a_kill_in_the_save_leaves_the_old_state_readable(driven, name):
    left = json.loads((driven[0] / name / "left.json").read_text())
    states = [f for f in left if f.startswith("state/state") and f.endswith(".safetensors")]
    assert bool(states) == (name != "before any state")


def test_the_criterion_kept_its_own_time(driven):
    folder, codes, _ = driven
    for name in codes:
        report = json.loads((folder / name / "facts.json").read_text())["report"]
        assert 0 < report["criterion_seconds"] <= report["train_seconds"]


# ---- in this process: what a state may not be ----------------------------------------------


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A one-shot run that was left after its third step, and again after its fifth."""
    folder = tmp_path_factory.mktemp("left")
    (folder / "run").mkdir()
    events = start(folder / "run", False).events()
    for steps in (3, 5):
        while (step := next(events).step) < steps:
            pass
        shutil.copytree(folder / "run", folder / str(step))
    events.close()
    return folder


@pytest.fixture
def stopped(left, tmp_path):
    """A run that was left after its third step."""
    return shutil.copytree(left / "3", tmp_path / "run")


@pytest.mark.parametrize("name", ["steps", "updates"])
def test_a_state_before_the_second_estimate_is_saved(tmp_path, name):
    # at first the scores and the estimate that they come from are one tensor
    method = SOFT if name == "steps" else GradFlow(**SOFT.model_dump() | {"criterion": "taylor"})
    leave(start(tmp_path, False, method=method, save_every=1).events(), 1)
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
    with pytest.raises(ValueError, match="should hold a saved state but does not load") as caught:
        start(stopped, True)
    assert str(path) in str(caught.value) and "--overwrite" in str(caught.value)
    assert (stopped / "log.jsonl").read_bytes() == before


@pytest.fixture
def two_states(left, tmp_path):
    """A run that was left after its fifth step, with states of steps 2 and 4."""
    folder = shutil.copytree(left / "5", tmp_path / "run")
    states = sorted(p.name for p in (folder / "state").iterdir())
    assert states == ["state-1.safetensors", "state.safetensors"]
    return folder


@pytest.mark.parametrize("damage", few(["cut", "one bit", "log"], "one bit", "log"))
def test_a_damaged_newest_state_gives_way_to_the_one_before(two_states, driven, damage):
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
    expected = load_file(driven[0] / "one-shot uninterrupted" / "weights.safetensors")
    resumed = drain(start(two_states, True).events()).model.state_dict()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    steps = [row["step"] for row in log(two_states) if row["stage"] == "recover"]
    assert steps == list(range(1, EVENTS + 1))


def test_states_that_are_all_damaged_are_all_named(two_states):
    for path in (two_states / "state").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"state\.safetensors.*state-1\.safetensors.*--overwrite"):
        start(two_states, True)


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_states_are_kept_as_asked_for(tmp_path, keep):
    leave(start(tmp_path, False, keep_states=keep, save_every=1).events(), 5)
    files = sorted((tmp_path / "state").iterdir())
    assert len(files) == keep
    facts = [Journal(tmp_path)._states()[age] for age in range(keep)]
    assert sorted(facts) == files


def test_a_run_from_the_start_forgets_the_states_of_another(two_states):
    leave(start(two_states, False).events(), 1)
    # one-shot pruning saves once before its first step
    assert [p.name for p in (two_states / "state").iterdir()] == ["state.safetensors"]


def test_what_a_kill_in_a_write_left_is_removed(two_states):
    half, mine = (
        two_states / "state" / f".state.safetensors.{rest}"
        for rest in ("a1_b2c3d.compress-tmp", "swp")
    )
    half.write_bytes(b"half")
    mine.write_bytes(b"mine")
    leave(start(two_states, True).events(), 1)
    assert not half.exists() and mine.exists()


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
    leave(start(None, False, save_every=1).events(), 3)
    assert list(tmp_path.iterdir()) == []
    assert Journal().load() is None and Journal().state_file is None
