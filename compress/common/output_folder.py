"""The folders that compress writes: whose a folder is, and who may write into it.

A run or an evaluation puts a marker into its folder before anything else; what is written at once
(a checkpoint, pages) lists its files. Without one of these, a folder that holds anything is not
written into; with it, nothing is removed but the names that compress writes.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from compress.common.files import atomic_folder, expand, read_json, remove, unfinished, write_json
from compress.common.foreign import foreign

MARKER = ".compress"
CHECKPOINT, CHECKPOINT_FACTS = "checkpoint", "compress.json"
PAGES, TEXTS = "set of pages", "set of texts"
LOCK, REPORT = ".lock", "report.html"
# what runs and evaluations write; their checkpoint lists its other files
NAMES = (
    f"{CHECKPOINT}/{CHECKPOINT_FACTS}",
    *(MARKER, LOCK, "recipe.yaml", "evaluation.yaml", "model.json", "calibration.json"),
    *("log.jsonl", "trackers/*", "state/state.safetensors", "state/state-*.safetensors"),
    *("predictions.jsonl", "predictions/*.jsonl", "samples.safetensors", "trace.safetensors"),
    *("metrics.json", "figures/*.png", REPORT),
)
# what makes an unfinished one worth keeping
PROGRESS = (
    f"{CHECKPOINT}/{CHECKPOINT_FACTS}",
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
    if not folder.exists():
        return
    names = sorted(entry.name for entry in folder.iterdir() if not _is_leftover(folder, entry))
    if not names:
        return
    others = not_ours(folder)
    if not _is_marked(folder) and not others:
        raise FileExistsError(
            f"output folder {folder} looks like a run, but lacks the marker {MARKER} by which "
            "compress knows its own, as of an early version or of a copy without hidden files; "
            f"copy {MARKER} too, move the folder away, or choose another --output"
        )
    if not _is_marked(folder):
        raise FileExistsError(
            f"output folder {folder} holds what is no run of compress: {_some(names)}; choose "
            "another --output"
        )
    if overwrite and others:
        raise FileExistsError(
            f"--overwrite removes only what compress wrote, and output folder {folder} also holds "
            f"{_some(others)}; move that away, or choose another --output"
        )
    if resume and not is_finished(folder):
        check_replaceable(folder / CHECKPOINT, CHECKPOINT, overwrite=True)
    if overwrite or resume:
        return
    what = "a finished run" if is_finished(folder) else "an unfinished run"
    ways = ["choose another --output"] if is_finished(folder) else ["go on with --resume"]
    ways += [] if others else ["replace it with --overwrite"]
    raise FileExistsError(f"output folder {folder} holds {what}; {', or '.join(ways)}")


def check_apart(folder: Path, inputs: Mapping[str, str | Path]) -> None:
    """Refuse an output folder that an input lies in, or that lies in an input.

    Parameters
    ----------
    folder : to be written.
    inputs : what is read by what it is called: paths, ``folder:PATH``, or names of another kind,
        which are not looked at. What links below a folder lead to is read, too, and so is the
        model that a runtime checkpoint refers to.

    Raises
    ------
    ValueError : naming both, wherever links lead.
    """
    target = Path(os.path.realpath(folder))
    for name, source in inputs.items():
        path = os.path.expanduser(str(source).removeprefix("folder:"))
        for real in _read_with(Path(path)):
            if target == real or target in real.parents or real in target.parents:
                what = (
                    path if str(real) == os.path.realpath(path) else f"{path}, which reads {real}"
                )
                raise ValueError(
                    f"output and input must not lie in one another; {name} is {what}, the output "
                    f"folder {folder}; choose another --output, or move the input"
                )


def _read_with(path: Path) -> Iterator[Path]:
    """Where what is read of a path really lies: itself, and what it leads to from there."""
    left, seen = [path], set[Path]()
    while left:
        at = left.pop()
        real = Path(os.path.realpath(at))  # which takes loops of links, too
        if real in seen or not real.exists():
            continue
        seen.add(real)
        yield real
        left += _links_below(real)
        with contextlib.suppress(ValueError, LookupError, TypeError, OSError):
            left.append(expand(read_json(real / CHECKPOINT_FACTS)["weights"]["model"]))


def _links_below(folder: str | Path) -> Iterator[Path]:
    """The links in a folder and those below it; data may be millions of files, so none is opened.

    What cannot be listed is left out, as is a file in place of a folder.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield Path(entry)
            elif entry.is_dir(follow_symlinks=False):
                yield from _links_below(entry.path)


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a run or an evaluation to whose end nothing is missing."""
    return _is_marked(folder) and (folder / REPORT).is_file()


def not_ours(folder: Path) -> list[str]:
    """What lies in the folder of a run or an evaluation and was not written by compress."""
    listed = _listed(folder / CHECKPOINT, CHECKPOINT)
    return _not_ours(folder, [*NAMES, *(f"{CHECKPOINT}/{pattern}" for pattern in listed)])


def _not_ours(folder: Path, patterns: Sequence[str], below: str = "") -> list[str]:
    unknown = []
    for path in sorted((folder / below).iterdir()):
        name = path.relative_to(folder).as_posix()
        inside = any(p.startswith(f"{name}/") or fnmatchcase(f"{name}/", p) for p in patterns)
        if _is_folder(path):
            if inside:
                unknown += _not_ours(folder, patterns, name)
            elif not _is_leftover(folder, path, patterns):
                unknown.append(name)
        elif not (
            (path.is_symlink() and inside)
            or _is_leftover(folder, path, patterns)
            or any(fnmatchcase(name, pattern) for pattern in patterns)
        ):
            unknown.append(name)
    return unknown


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_marked(folder: Path) -> bool:
    try:
        marker = read_json(folder / MARKER)
    except (ValueError, OSError):
        return False
    return isinstance(marker, dict) and "compress" in marker


def _listed(folder: Path, kind: str) -> list[str]:
    """Patterns of the files that a folder of a kind lists; none for any other folder."""
    name = CHECKPOINT_FACTS if kind == CHECKPOINT else MARKER
    try:
        facts = read_json(folder / name)
        ours = "format" in facts if kind == CHECKPOINT else facts["kind"] == kind
        return [name, *map(escape, facts["files"])] if ours else []
    except (ValueError, TypeError, KeyError, OSError):
        return []


def _is_leftover(folder: Path, entry: Path, patterns: Sequence[str] = ()) -> bool:
    """Whether what lies in a folder is our lock, or what a killed process had not yet renamed.

    Parameters
    ----------
    folder, entry : the folder, and what lies in it.
    patterns : of what is written there, beside what runs write.
    """
    if entry == folder / LOCK:
        return entry.is_file() and entry.stat().st_size == 0
    target = unfinished(entry.name)
    if target is None:
        return False
    name = entry.with_name(target).relative_to(folder).as_posix()
    return any(fnmatchcase(name, pattern) for pattern in (*NAMES, CHECKPOINT, *patterns))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check_same_settings(
    path: Path, current: Mapping[str, Any], unused: Collection[str] = ("output",)
) -> None:
    """Half a run with each of two settings is a run with neither: refuse to resume other ones.

    Parameters
    ----------
    path : YAML file of the settings that the folder was begun with; nothing is checked without it.
    current : those of now.
    unused : dotted keys that may differ, since what is there does not depend on them.

    Raises
    ------
    ValueError : naming what changed.
    """
    if not path.is_file():
        return
    with foreign(path, "the settings of a run", "restore it, or start again with --overwrite"):
        stored = yaml.safe_load(path.read_text(encoding="utf8"))
    if not isinstance(stored, dict):
        return
    before, now = (_without(settings, unused) for settings in (stored, current))
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if changed:
        what, way = "other settings", "resume it with its own settings"
        if path.name == "recipe.yaml":
            what = "another recipe"
            way = f"go on with: compress run {path} --output {path.parent} --resume"
        raise ValueError(
            f"what was begun in {path.parent} has {what}: {', '.join(changed)} changed; "
            f"{way}, or start again with --overwrite"
        )


def _without(
    settings: Mapping[str, Any], unused: Collection[str], above: str = ""
) -> dict[str, Any]:
    return {
        key: _without(value, unused, f"{above}{key}.") if isinstance(value, dict) else value
        for key, value in settings.items()
        if f"{above}{key}" not in unused
    }


@contextlib.contextmanager
def locked(folder: Path, lock: Path | None = None) -> Iterator[None]:
    """Hold an output folder for this process by a lock file, which goes at the end.

    Parameters
    ----------
    folder : that is held.
    lock : the file; one beside the folder when None.

    Raises
    ------
    FileExistsError : when another process holds it.
    """
    lock = lock or folder.with_name(f".{folder.name}{LOCK}")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"output folder {folder} is in use by another process; choose another --output or "
                "wait"
            ) from error
        try:
            yield
        finally:
            if os.fstat(handle.fileno()).st_size == 0:  # what holds something is not ours
                lock.unlink(missing_ok=True)


@contextlib.contextmanager
def claim(folder: Path, kind: str, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Hold the output folder for this process; a folder that failed before any state goes again.

    Parameters
    ----------
    folder : to write, and to mark as ours.
    kind : of what is written, such as "run".
    resume, overwrite : as in :func:`check_target`, which is asked again when the folder is held.
    """
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder, folder / LOCK):
            check_target(folder, resume=resume, overwrite=overwrite)
            _clear(folder, lambda entry: _is_leftover(folder, entry) or (overwrite and not resume))
            write_json(folder / MARKER, _marker(kind))
            try:
                yield
            except Exception:
                if not existed and not any((folder / name).exists() for name in PROGRESS):
                    others = {name.partition("/")[0] for name in not_ours(folder)}
                    _clear(folder, lambda entry: entry.name not in others)
                    remove(folder / MARKER)
                raise
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def _clear(folder: Path, choose: Callable[[Path], bool]) -> None:
    # the report first: without it the rest is no finished run, should a kill leave it here
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name != REPORT):
        if entry.name not in (LOCK, MARKER) and choose(entry):
            remove(entry)


def remove_states(folder: Path) -> None:
    """Remove what only resuming needs."""
    states = folder / "state"
    if states.is_symlink():
        states.unlink()
    elif states.is_dir():
        others = not_ours(folder)
        _clear(states, lambda entry: f"state/{entry.name}" not in others)
        with contextlib.suppress(OSError):  # it holds something
            states.rmdir()


def tidy(folder: Path) -> None:
    """Remove what a kill left of a run or an evaluation that is finished."""
    with locked(folder, folder / LOCK):
        remove_states(folder)
        _clear(folder, lambda entry: _is_leftover(folder, entry))


def _marker(kind: str) -> dict[str, Any]:
    return {"compress": version("compress-models"), "kind": kind}


@contextlib.contextmanager
def new_folder(folder: Path, kind: str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``folder``, which lists its files, on success.

    Raises
    ------
    FileExistsError : see :func:`check_replaceable`.
    OSError : when the parent cannot be written or the disk is full; ``folder`` is untouched then.
    """
    check_replaceable(folder, kind, overwrite=overwrite)
    with atomic_folder(folder) as temporary:
        yield temporary
        files = (path for path in temporary.rglob("*") if path.is_file())
        names = sorted(path.relative_to(temporary).as_posix() for path in files)
        write_json(temporary / MARKER, _marker(kind) | {"files": names})


@contextlib.contextmanager
def recorded_folder(
    folder: Path,
    kind: str,
    facts: Mapping[str, Any],
    written: Callable[[Mapping[str, Any]], Iterable[str]],
    *,
    resume: bool,
    overwrite: bool,
) -> Iterator[None]:
    """Hold a folder that is filled file by file, and that knows of each file before it is there.

    Parameters
    ----------
    folder : new or empty, or one that was begun so, with ``resume`` or ``overwrite``.
    kind : of what is written, such as "set of texts".
    facts : what the files depend on.
    written : facts of earlier sittings to the names of the files that they may have written.
    resume : go on; the facts must be those of before.
    overwrite : start again.

    Raises
    ------
    FileExistsError : when the folder holds something that is not to be replaced, or is in use.
    ValueError : to resume with other facts.
    """
    marker = _marker(kind) | {"facts": dict(facts)}
    with locked(folder):
        begun = read_json(folder / MARKER) if _is_marked(folder) else {}
        if begun.get("kind") != kind:
            check_replaceable(folder, kind, overwrite=False)
        elif not resume and not overwrite:
            raise FileExistsError(
                f"{folder} holds a {kind} of compress; go on with --resume, replace it with "
                "--overwrite, or choose another folder"
            )
        else:
            with foreign(folder / MARKER, f"the facts of a {kind}", "choose another folder"):
                then = dict(begun["facts"])
                names = {MARKER, *written(then)}
            _check_known(folder, names, kind)
            changed = [key for key, fact in marker["facts"].items() if then.get(key) != fact]
            if resume and changed:
                raise ValueError(
                    f"what was begun in {folder} differs in {', '.join(changed)}; go on with the "
                    "same, start again with --overwrite, or choose another folder"
                )
            for name in _names_below(folder):
                if name not in names or (not resume and name != MARKER):
                    (folder / name).unlink()
            inner = {above for name in names for above in (folder / name).parents}
            for path in sorted(inner - {folder, *folder.parents}, reverse=True):
                with contextlib.suppress(OSError):  # it holds something, or there is none
                    path.rmdir()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MARKER, marker)
        yield


def _names_below(folder: Path) -> Iterator[str]:
    """What lies in a folder and those below it but folders, whatever it is called."""
    for above, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        for name in (*files, *links):
            yield os.path.relpath(os.path.join(above, name), folder)


def _check_known(folder: Path, names: Collection[str], kind: str) -> None:
    """Refuse a folder that holds more than these files, and what a kill left of them."""
    others = []
    for name in _names_below(folder):
        target = unfinished(os.path.basename(name))
        whole = name if target is None else os.path.join(os.path.dirname(name), target)
        if whole not in names:
            others.append(name)
    if others:
        raise FileExistsError(
            f"{folder} holds a {kind} of compress, and also {_some(sorted(others))}; move that "
            "away, or choose another folder"
        )


def check_replaceable(folder: Path, kind: str, *, overwrite: bool) -> None:
    """Refuse a folder that must not be replaced as a whole.

    Parameters
    ----------
    folder : that is to be written at once.
    kind : of what is written, such as "checkpoint".
    overwrite : whether one that compress wrote may be replaced.

    Raises
    ------
    FileExistsError : for a file or a link, a folder that holds anything else than what compress
        wrote as one of this kind, or such a one without ``overwrite``.
    """
    if not os.path.lexists(folder) or (_is_folder(folder) and not any(folder.iterdir())):
        return
    listed = _listed(folder, kind) if _is_folder(folder) else []
    if not listed:
        raise FileExistsError(
            f"a new or empty folder is expected; {folder} holds something that is no {kind} of "
            "compress; choose another folder"
        )
    if others := _not_ours(folder, listed):
        raise FileExistsError(
            f"{folder} holds a {kind} of compress, and also {_some(others)}; move that away, or "
            "choose another folder"
        )
    if not overwrite:
        raise FileExistsError(
            f"{folder} holds a {kind} of compress already; choose another folder, or replace it "
            "with --overwrite (in Python overwrite=True)"
        )


def check_new_file(path: Path) -> None:
    """Refuse to write over a file that is there.

    Raises
    ------
    FileExistsError : naming it.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"a new file is expected; {path} exists; name another, or move it")
