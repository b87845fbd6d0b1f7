"""What every run does: check, claim the folder, work, checkpoint, metrics, report."""

import contextlib
import shlex
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from compress.common.environment import choose_device, versions_of
from compress.common.events import drain
from compress.common.files import read_json, write_json, write_text
from compress.common.output_folder import (
    CHECKPOINT,
    CHECKPOINT_FACTS,
    PROGRESS,
    check_apart,
    check_same_settings,
    check_target,
    claim,
    is_finished,
    tidy,
)
from compress.common.settings import inputs_of
from compress.methods.base import Event
from compress.parallel import distributed
from compress.runs.recipe import ReaderRecipe, Recipe, dump, load_recipe

# what decides how a run is executed, not what comes out
EXECUTION = (
    "output",
    *(f"train.{key}" for key in ("workers", "prefetch", "save_every", "keep_states", "trackers")),
)


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, what metrics.json holds, and the checkpoint."""

    folder: Path
    metrics: dict[str, Any]
    checkpoint: Path


class Work(Protocol):
    """A recipe with everything that it names opened; what one kind of run does of its own."""

    packages: Sequence[str]  # whose versions the resolved recipe names

    def prepare(self, *, resume: bool) -> Iterator[Event]:
        """Refuse whatever can be known before the folder is touched."""
        ...

    def compress(self) -> Iterator[Event]:
        """Make what the checkpoint holds."""
        ...

    def save(self, checkpoint: Path, metrics: Mapping[str, Any] | None = None) -> None:
        """Write the checkpoint, in place of the one without metrics once they are known."""
        ...

    def measure(self) -> Generator[Event, None, dict[str, Any]]:
        """Measure the model before and after; returns what metrics.json holds."""
        ...

    def report(self, metrics: dict[str, Any]) -> None:
        """Write the report beside metrics.json, and remove what only resuming needs."""
        ...


def run(
    recipe: str | Path | Recipe | ReaderRecipe,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
) -> RunResult:
    """Do what a recipe says, to the end; the same as ``compress run``.

    Parameters
    ----------
    recipe : path of a YAML file, the bare name of a shipped recipe, or a typed recipe.
    overrides : ``"method.keep_macs=0.4"`` each.
    output : the run's folder; the recipe's own when None.
    resume : go on from the folder's saved state, if there is one; a finished run stays as it is.
    overwrite : replace a run that is there.
    device : such as "cpu" or "cuda"; CUDA where there is any when None.

    Raises
    ------
    ValueError : for a recipe, model or data that cannot be used, or to resume other settings.
    FileExistsError : when the folder is in use and neither ``resume`` nor ``overwrite`` is given.
    OSError : when the folder cannot be written or the disk is full.
    """
    return drain(
        run_events(
            recipe,
            overrides=overrides,
            output=output,
            resume=resume,
            overwrite=overwrite,
            device=device,
        )
    )


def run_events(
    recipe: str | Path | Recipe | ReaderRecipe,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
) -> Generator[Event, None, RunResult]:
    """:func:`run` as a generator of events: the caller owns the loop."""
    source = None if isinstance(recipe, Recipe | ReaderRecipe) else recipe
    if not isinstance(recipe, Recipe | ReaderRecipe):
        recipe = load_recipe(recipe, overrides)
    folder = Path(output or recipe.output or "runs/compress")
    checkpoint = folder / "checkpoint"
    with distributed.explained():
        where = distributed.join(choose_device(device))
        main = distributed.is_main()  # of several processes only this one touches the folder
        if main:
            # the recipe that a run has written, too, may be resumed
            file = (
                {} if resume or source is None or not Path(source).is_file() else {"recipe": source}
            )
            check_apart(folder, inputs_of(recipe) | file)
            check_target(folder, resume=resume, overwrite=overwrite)
            if resume:
                settings = yaml.safe_load(dump(recipe))
                check_same_settings(folder / "recipe.yaml", settings, _not_used_yet(folder))
        if resume and distributed.from_main(lambda: is_finished(folder)):
            distributed.from_main(lambda: tidy(folder))
            metrics = distributed.from_main(lambda: read_json(folder / "metrics.json"))
            yield Event("done", 1, 1, message=f"already finished; checkpoint in {checkpoint}")
            return RunResult(folder, metrics, checkpoint)
        work = open_work(recipe, folder, where)
        yield from work.prepare(resume=resume)
        claimed = claim(folder, "run", resume=resume, overwrite=overwrite)
        with claimed if main else contextlib.nullcontext():
            if main:
                versions = versions_of(work.packages)
                header = [f"{name} {version}" for name, version in versions.items()]
                write_text(folder / "recipe.yaml", dump(recipe, header))
            try:
                yield from work.compress()
                distributed.from_main(lambda: work.save(checkpoint))
                metrics = yield from work.measure()
                yield Event("report", 0, 2)
                distributed.from_main(lambda: work.save(checkpoint, metrics))
                distributed.from_main(lambda: write_json(folder / "metrics.json", metrics))
                yield Event("report", 1, 2)
                distributed.from_main(lambda: work.report(metrics))
            except Exception as error:
                if note := _next_step(error, recipe, folder):
                    error.add_note(note)
                raise
    yield Event("done", 1, 1, message=f"checkpoint in {checkpoint}")
    return RunResult(folder, metrics, checkpoint)


def _next_step(error: Exception, recipe: Recipe | ReaderRecipe, folder: Path) -> str:
    """What is kept of a run that failed, and how to go on; nothing where the error says so."""
    checkpoint = folder / CHECKPOINT
    if (checkpoint / CHECKPOINT_FACTS).is_file():
        changes = ", ".join(sorted(key for key in _not_used_yet(folder) if "evaluate" in key))
        return (
            f"the checkpoint in {checkpoint} is complete; go on with --resume, which takes changes "
            f"of {changes}, or measure it by itself with: compress eval "
            f"{shlex.quote(str(checkpoint))} --data {shlex.quote(recipe.data)}"
        )
    explained = "--resume" in str(error) or "--overwrite" in str(error)
    if explained or not any((folder / name).exists() for name in PROGRESS):
        return ""
    return f"what was done is kept in {folder}; once the cause is removed, go on with --resume"


def _not_used_yet(folder: Path) -> set[str]:
    """The keys of a recipe that decide nothing of what a folder holds."""
    if is_finished(folder):
        return {*EXECUTION}
    if any((folder / name).exists() for name in ("calibration.json", "predictions/dense.jsonl")):
        return {*EXECUTION, "evaluate.metrics", "evaluate.strict"}
    return {*EXECUTION, "evaluate"}


def open_work(recipe: Recipe | ReaderRecipe, folder: Path, device: str) -> Work:
    """Open what a recipe names.

    Raises
    ------
    ValueError, FileNotFoundError : for a model or data that cannot be used.
    """
    # each kind needs packages that the other does not
    if isinstance(recipe, Recipe):
        from compress.runs.diffusion import DiffusionRun

        return DiffusionRun(recipe, folder, device)
    from compress.runs.reader import ReaderRun

    return ReaderRun(recipe, folder, device)
