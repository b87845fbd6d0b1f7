"""Runs that are killed at every kind of moment, and resumed: ``resume.py FOLDER SCENARIO ...``.

One process imports torch and forks a child for every run, so that a killed run and its resumption
never share memory; all of them run on one thread.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

import compress.common.journal as journal
from builders import pruning
from builders.events import finish
from builders.forks import exit_code, fork
from builders.models import CONFIGS
from compress.methods.gradflow import GradFlow, OneShot
from compress.methods.gradflow.train import PruningRun
from compress.methods.training import Training

FLOW, RECOVER, SAVE_EVERY = 8, 5, 2
EVENTS = FLOW + RECOVER
SOFT = GradFlow(
    keep_macs=0.28,
    steps=FLOW,
    update_every=2,
    criterion_batches=1,
    max_move=0.4,
    settle=0.25,
)
SHOT = OneShot(keep_macs=0.28, steps=FLOW, criterion="taylor", criterion_batches=1)
TRAINING = {"steps": RECOVER, "batch": 4, "lr": 1e-3, "save_every": SAVE_EVERY}

# states are written at steps 2, 4, 6, 8, after surgery, at 10, 12 and 13
FIXED = {"flow": 3, "settling": 7, "recovery": 11}
RANDOM = random.Random(20250109).sample(sorted(set(range(1, EVENTS)) - set(FIXED.values())), 1)
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
    "uninterrupted": (SOFT, None),
    **{name: (SOFT, where) for name, where in KILLS.items()},
    "one-shot uninterrupted": (SHOT, None),
    "one-shot, event 5": (SHOT, {"event": 5}),
}


def start(folder, resume, method=SHOT, **training) -> PruningRun:
    """A run of a seeded UNet on seeded noise."""
    torch.manual_seed(0)
    # dropout draws from the global generator, which a resumed run must find as it was
    unet = UNet2DModel(**CONFIGS["smallest"], dropout=0.1)
    torch.seed()  # a new process has anything in its generator
    settings = Training(**(TRAINING | training))
    return pruning.start(method, settings, unet, folder=folder, resume=resume)


def to_the_end(method, folder, resume):
    events, pruned = finish(start(folder, resume, method).events())
    save_file(dict(pruned.model.state_dict()), folder / "weights.safetensors")
    if pruned.trace:
        save_file(pruned.trace, folder / "trace.safetensors")
    facts = {"events": len(events), "report": pruned.report, "widths": pruned.widths}
    (folder / "facts.json").write_text(json.dumps(facts))


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Half:
    """A file that gets one half of what is written into it."""

    def __init__(self, handle, mode, open_file=os.fdopen):
        self.file = open_file(handle, mode)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        kill()


def die_in_save(moment, number):
    """A state is written in steps: some bytes, all bytes, the new name."""
    write_bytes, replace, saves = journal.write_bytes, os.replace, iter(range(1, 1000))

    def replaced(*args):
        replace(*args)
        kill()

    def last_save(path, content):
        if next(saves) == number:
            if moment == "half":
                os.fdopen = Half
            else:
                os.replace = kill if moment == "before rename" else replaced
        write_bytes(path, content)

    journal.write_bytes = last_save


def die(method, where, folder):
    if "in_save" in where:
        die_in_save(where["in_save"], where["save"])
    if "at_surgery" in where:
        name = where["at_surgery"]
        surgery = getattr(PruningRun, name)

        def dying(self, *args):
            if where["after"]:
                surgery(self, *args)
            kill()

        setattr(PruningRun, name, dying)
    if "after_log" in where:
        # between the row in the log and the state that knows of it
        save = PruningRun._save
        PruningRun._save = lambda self: kill() if self.step == where["after_log"] else save(self)
    for number, _ in enumerate(start(folder, False, method).events(), start=1):
        if number == where.get("event"):
            kill()


def main(root: Path, *names: str) -> None:
    torch.set_num_threads(1)
    codes = {}
    for name in names:
        method, where = SCENARIOS[name]
        folder = root / name
        folder.mkdir()
        codes[name] = []
        if where:
            codes[name].append(exit_code(fork(die, method, where, folder)))
            left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
            (folder / "left.json").write_text(json.dumps(left))
        codes[name].append(exit_code(fork(to_the_end, method, folder, bool(where))))
    (root / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
