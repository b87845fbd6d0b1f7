"""The folder that a run or an evaluation writes: whose it is, and who may write into it."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

# what a folder of ours holds: the settings of the run, or of the evaluation
SETTINGS = ("recipe.yaml", "evaluation.yaml")
# what makes an unfinished one worth keeping
PROGRESS = (
    "state/state.safetensors",
    "state/state-1.safetensors",
    "predictions.jsonl",
    "predictions/dense.jsonl",
)


def check_target(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that holds something this run must not touch.

    Raises
    ------
    FileExistsError : saying what is there and which option goes on.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(
            f"output folder expected at {folder}, which is a file; choose another"
        )
    if not folder.exists() or all(_is_leftover(entry) for entry in folder.iterdir()):
        return
    if not any((folder / name).exists() for name in SETTINGS):
        raise FileExistsError(
            f"output folder {folder} holds files that are no run of compress; choose another "
            "--output"
        )
    if overwrite:
        return
    if (folder / "report.html").exists():
        raise FileExistsError(
            f"output folder {folder} holds a finished run; choose another --output, or replace "
            "it with --overwrite"
        )
    if not resume:
        raise FileExistsError(
            f"output folder {folder} holds an unfinished run; go on with --resume, or start "
            "again with --overwrite"
        )


def _is_leftover(entry: Path) -> bool:
    """Whether an entry is our lock, or a file or folder that a killed run had not yet renamed."""
    known = (
        *(*SETTINGS, "model.json", "calibration.json"),
        *("log.jsonl", "checkpoint", "metrics.json", "report.html", "samples"),
    )
    return entry.name == ".lock" or entry.name.startswith(tuple(f".{name}" for name in known))


def check_same_settings(path: Path, wanted: Mapping[str, Any]) -> None:
    """Half a run with each of two settings is a run with neither: refuse to resume other ones.

    Parameters
    ----------
    path : YAML file of the settings that the folder was begun with; nothing is checked without it.
    wanted : those of now. ``output`` may differ: a folder may be moved.

    Raises
    ------
    ValueError : naming what changed.
    """
    if not path.is_file():
        return
    found = yaml.safe_load(path.read_text(encoding="utf8"))
    if not isinstance(found, dict):
        return
    changed = sorted(
        key for key in {*found, *wanted} - {"output"} if found.get(key) != wanted.get(key)
    )
    if changed:
        what = "recipe" if path.name == "recipe.yaml" else "settings"
        raise ValueError(
            f"what was begun in {path.parent} has another {what}: {', '.join(changed)} changed; "
            f"resume it with its own {what}, or start again with --overwrite"
        )


@contextlib.contextmanager
def claim(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Hold the output folder for this process; a folder that failed before any state goes again."""
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"output folder {folder} is in use by another process; choose another --output or "
                "wait"
            ) from error
        for entry in folder.iterdir():
            if entry == lock or not (_is_leftover(entry) or (overwrite and not resume)):
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        try:
            yield
        except Exception:
            if not existed and not any((folder / name).exists() for name in PROGRESS):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            lock.unlink(missing_ok=True)
