"""What a recipe would make, predicted without training, reading or writing anything."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoints.exporting import other_parts, part_files
from compress.common.environment import choose_device
from compress.common.output_folder import check_apart, check_target
from compress.common.settings import inputs_of
from compress.models.objective import check_trainable
from compress.models.pipelines import denoiser
from compress.runs.recipe import ReaderRecipe, Recipe, load_recipe

if TYPE_CHECKING:
    from compress.runs.diffusion import DiffusionRun


def dry_run(
    recipe: str | Path | Recipe | ReaderRecipe, *, device: str | None = None
) -> dict[str, Any]:
    """Predict what a recipe would make.

    Returns
    -------
    Of a pipeline what its method predicts, ``optimiser_steps``, ``memory_mb`` (weights, gradients
    and Adam's moments; activations come on top), ``not_trainable`` (why a pipeline that can be
    cut cannot be trained here, if so) and ``not_measured`` (metrics, and why, if so); of a reader
    what :func:`compress.runs.reader.forecast` predicts. Always ``output`` and ``problems``, the
    texts of errors that a run would end with.
    """
    problems: list[str] = []

    def attempt(check: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        try:
            return check() or {}
        except (ValueError, FileNotFoundError, FileExistsError) as error:
            problems.append(str(error))
            return {}

    if isinstance(recipe, str | Path):
        try:
            recipe = load_recipe(recipe)
        except (ValueError, FileNotFoundError) as error:
            return {"problems": [str(error)]}
    opened = recipe
    folder = Path(recipe.output or "runs/compress")
    predicted = attempt(lambda: _predict(opened, folder, choose_device(device)))
    attempt(lambda: check_apart(folder, inputs_of(opened)))
    attempt(lambda: check_target(folder, resume=False, overwrite=False))
    return {**predicted, "output": str(folder), "problems": problems}


def _predict(recipe: Recipe | ReaderRecipe, folder: Path, device: str) -> dict[str, Any]:
    # each kind needs packages that the other does not
    if isinstance(recipe, ReaderRecipe):
        from compress.runs.reader import forecast

        return forecast(recipe, "cpu")
    from compress.runs.diffusion import DiffusionRun

    run = DiffusionRun(recipe, folder, device)
    refused = []
    try:
        check_trainable(run.pipeline)
    except ValueError as error:
        refused.append(str(error))
    else:
        run.check_sampling()
    # weights, gradients, two moments and a teacher of dense size
    memory = 5 * 4 * denoiser(run.pipeline)[1].num_parameters() / 2**20
    return {
        "model": recipe.model,
        **_sizes(run),
        "optimiser_steps": recipe.method.steps + run.training.steps,
        "memory_mb": round(memory, 1),
        "not_trainable": refused,
        "not_measured": [run.lacking] if run.lacking else [],
    }


def _sizes(run: "DiffusionRun") -> dict[str, Any]:
    """Costs and the size of all files of the pipeline that the method exports."""
    facts = run.recipe.method.forecast(run.pipeline, run.training)
    params, macs = facts.pop("params"), facts.pop("macs")
    source, (part, module) = run.at.folder, denoiser(run.pipeline)
    files = (
        source / path for name in other_parts(source, part) for path in part_files(source, name)
    )
    others = sum(path.stat().st_size for path in files)
    sizes = [others + next(module.parameters()).element_size() * count for count in params]
    return {
        "params": [_change(*(f"{count:,}" for count in params))],
        "macs": [_change(*(f"{count:,}" for count in macs))],
        "keep_macs": round(macs[2] / macs[0], 4),
        "size": [_change(*(megabytes(size) for size in sizes))],
        **facts,
    }


def megabytes(size: float) -> str:
    """A size in words.

    >>> megabytes(1_234_567), megabytes(34_500_000)
    ('about 1.2 MB', 'about 34 MB')
    """
    return f"about {size / 1e6:.{1 if size < 1e7 else 0}f} MB"


def _change(dense: str, least: str, most: str) -> str:
    return f"{dense} -> {most}" if least == most else f"{dense} -> {least} to {most}"
