"""The pipeline: load -> compress -> recover -> evaluate -> export -> report; resumable."""

import contextlib
import copy
import datetime
import errno
import math
import shutil
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import save
from torch.utils.data import Dataset, Subset

from compress.checkpoints.applied import Compressed
from compress.checkpoints.slim import save_slim
from compress.common.environment import choose_device, device_name, versions_of
from compress.common.files import write_bytes, write_json, write_text
from compress.common.journal import Journal
from compress.common.output_folder import check_same_settings, check_target, claim
from compress.data.digits import LICENCE as DIGITS_LICENCE
from compress.data.digits import digits
from compress.data.sources import ImageData, Images, load_images
from compress.eval import diffusion, fidelity
from compress.eval.metrics import DIFFUSION
from compress.methods.base import Event
from compress.methods.gradflow import GradFlow, OneShot
from compress.methods.gradflow.groups import dense_widths
from compress.methods.gradflow.objective import Inputs, inputs_of, noise_schedule
from compress.methods.gradflow.train import Pruned, PruningRun, validation_loss
from compress.methods.training import Training
from compress.models.free_width import inner_width
from compress.models.loading import load_pipeline, model_hash, pipeline_folder
from compress.models.pipelines import (
    check_pipeline,
    default_guidance,
    image_shape,
    placed,
    wanted,
    with_parts,
)
from compress.parallel import distributed
from compress.parallel.launch import launched
from compress.reports.diffusion import write_report
from compress.runs.forecast import forecast
from compress.runs.recipe import Columns, ReaderRecipe, Recipe, dump, load_recipe
from compress.runs.run import RunResult

# more real images than this change a distance's third digit, and cost time and memory
REFERENCE_LIMIT = 10_000
VALIDATION_LIMIT = 2_048
SHOWN_SAMPLES = 64
PACKAGES = (
    "compress-models",
    "torch",
    "diffusers",
    "accelerate",
    "torch-fidelity",
    "torch-pruning",
)


@dataclass(frozen=True)
class _Job:
    """A recipe with everything it names opened."""

    recipe: Recipe
    folder: Path
    pipeline: DiffusionPipeline
    data: ImageData
    training: Training
    inputs: Inputs
    settings: diffusion.SamplingSettings
    device: str


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
    resume : go on from the folder's saved state, if there is one.
    overwrite : replace a run that is there.
    device : such as "cpu" or "cuda"; CUDA where there is any when None.

    Raises
    ------
    ValueError : for a recipe, model or data that cannot be used.
    FileExistsError : when the folder is in use and neither ``resume`` nor ``overwrite`` is given.
    OSError : when the folder cannot be written or the disk is full.
    """
    events = run_events(
        recipe,
        overrides=overrides,
        output=output,
        resume=resume,
        overwrite=overwrite,
        device=device,
    )
    while True:
        try:
            next(events)
        except StopIteration as stop:
            return stop.value


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
    if not isinstance(recipe, Recipe | ReaderRecipe):
        recipe = load_recipe(recipe, overrides)
    if isinstance(recipe, ReaderRecipe):
        from compress.runs.reader import reader_events

        if launched():
            raise ValueError("readers run on one process; start it without a launcher")
        folder = Path(output or recipe.output or "")
        return (
            yield from reader_events(
                recipe, folder, resume=resume, overwrite=overwrite, device=device
            )
        )
    with distributed.explained():
        return (yield from _run_events(recipe, output, resume, overwrite, device))


def _run_events(
    recipe: Recipe, output: str | Path | None, resume: bool, overwrite: bool, device: str | None
) -> Generator[Event, None, RunResult]:
    job = _open(recipe, output, device)
    main = distributed.is_main()
    check_trainable(job.pipeline)
    # everything that a user can have got wrong is checked before the folder is touched
    if main:
        check_target(job.folder, resume=resume, overwrite=overwrite)
        if resume:
            check_same_settings(job.folder / "recipe.yaml", yaml.safe_load(_resolved(job)))
        _check_space(job)
    pruning = _pruning_run(job, Journal(job.folder), resume=resume)
    yield Event("prepare", 1, 1, message=_plan(job, pruning))
    # of several processes only the main one touches the folder
    claimed = claim(job.folder, resume=resume, overwrite=overwrite)
    with claimed if main else contextlib.nullcontext():
        if main:
            write_text(job.folder / "recipe.yaml", _resolved(job))
        pruned = yield from pruning.events()
        compressed = with_parts(job.pipeline, {"unet": pruned.unet})
        metrics = yield from _evaluate(job, compressed, pruned)
        yield Event("report", 0, 2)
        checkpoint = distributed.from_main(lambda: _finish(job, compressed, pruned, metrics))
        yield Event("report", 1, 2)
        distributed.from_main(lambda: _report(job))
    yield Event("done", 1, 1, message=f"checkpoint in {checkpoint}")
    return RunResult(job.folder, metrics, checkpoint)


def _finish(
    job: _Job, compressed: DiffusionPipeline, pruned: Pruned, metrics: dict[str, Any]
) -> Path:
    """Write checkpoint, trace and metrics."""
    facts = _provenance(job, pruned, metrics["metrics"])
    source = pipeline_folder(job.recipe.model)
    checkpoint = save_slim(compressed, job.folder / "checkpoint", facts, source=source)
    if pruned.trace:
        write_bytes(job.folder / "trace.safetensors", save(pruned.trace))
    write_json(job.folder / "metrics.json", metrics)
    return checkpoint


def _report(job: _Job) -> None:
    write_report(job.folder, job.recipe.method)
    shutil.rmtree(job.folder / "state", ignore_errors=True)


def apply(
    pipeline: DiffusionPipeline,
    method: GradFlow | OneShot,
    *,
    data: ImageData | Images | str,
    training: Training | None = None,
    device: str | None = None,
) -> Compressed:
    """Compress a diffusers pipeline in memory; the given one is not changed.

    Parameters
    ----------
    pipeline : with a ``unet`` and a ``scheduler``.
    method : what to do.
    data : a data source as in a recipe, or a data set of ``(channels, height, width)`` images in
        [-1, 1], whose every tenth image is held out; an ``ImageData`` with conditions, or a source
        with columns "text" or "label", for a pipeline that takes captions or labels.
    training : how weights are trained.
    device : CUDA where there is any when None.

    Returns
    -------
    With ``model`` (a pipeline), ``report`` and ``save(folder)``.
    """
    unet = pipeline.unet
    check_trainable(pipeline)
    if isinstance(data, str):
        data = load_images(data, *image_shape(pipeline), wanted(pipeline))
    elif not isinstance(data, ImageData):
        data = ImageData.split("data", data)
    where, inputs = distributed.join(choose_device(device)), inputs_of(pipeline)
    with placed(inputs.modules, where):
        run_ = PruningRun(
            copy.deepcopy(unet),
            pipeline.scheduler,
            data,
            method,
            training or Training(),
            Journal(),
            device=where,
            inputs=inputs,
        )
        events = run_.events()
        while True:
            try:
                next(events)
            except StopIteration as stop:
                pruned: Pruned = stop.value
                break
    report = {
        **pruned.report,
        "method": method.model_dump(mode="json"),
        "widths": _widths(unet, pruned),
    }
    return Compressed(with_parts(pipeline, {"unet": pruned.unet}), report)


def dry_run(
    recipe: str | Path | Recipe | ReaderRecipe, *, device: str | None = None
) -> dict[str, Any]:
    """Predict what a recipe would make, without training or writing anything.

    Returns
    -------
    What ``forecast`` predicts, ``optimiser_steps``, ``memory_mb`` (weights,
    gradients and Adam's moments; activations come on top), ``not_trainable`` (why a pipeline that
    can be cut cannot be trained here, if so) and ``problems``; for readers see
    :func:`compress.runs.reader.dry_run`.
    """
    try:
        if not isinstance(recipe, Recipe | ReaderRecipe):
            recipe = load_recipe(recipe)
        if isinstance(recipe, ReaderRecipe):
            from compress.runs.reader import dry_run as dry_run_of_reader

            return dry_run_of_reader(recipe, device=device)
        job = _open(recipe, None, device)
        source, method = pipeline_folder(recipe.model), recipe.method
        predicted = forecast(job.pipeline, source, cast(GradFlow | OneShot, method), job.training)
    except (ValueError, FileNotFoundError) as error:
        return {"problems": [str(error)]}
    refused, problems = [], []
    try:
        check_trainable(job.pipeline)
    except ValueError as error:
        refused.append(str(error))
    try:
        check_target(job.folder, resume=False, overwrite=False)
    except FileExistsError as error:
        problems.append(str(error))
    # weights, gradients, two moments and a teacher of dense size
    memory = 5 * 4 * _parameters(job.pipeline.unet) / 2**20
    return {
        "model": job.recipe.model,
        **predicted,
        "optimiser_steps": method.steps + job.training.steps,
        "memory_mb": round(memory, 1),
        "output": str(job.folder),
        "not_trainable": refused,
        "problems": problems,
    }


@distributed.explained()
def evaluate_model(
    model: str,
    *,
    data: str = "builtin:digits",
    samples: int = 512,
    steps: int = 20,
    sampler: str = "ddim",
    sampling_seeds: int = 3,
    guidance_scale: float | None = None,
    batch: int = 128,
    columns: Columns | None = None,
    inception_weights: str | None = None,
    device: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure any diffusers pipeline that can be trained here with the diffusion suite.

    Parameters
    ----------
    model : ``builtin:NAME``, a hub id, or a local diffusers folder.
    columns : where the data has captions or labels.
    data, samples, steps, sampler, sampling_seeds, guidance_scale, batch, inception_weights : as in
        a recipe.
    device : CUDA where there is any when None.

    Returns
    -------
    Per metric ``value``, ``ci95``, ``n``, ``how``, ``better`` and ``unit``.
    """
    from compress.checkpoints.slim import load

    where = distributed.join(choose_device(device))
    pipeline = load(model)
    unet = _unet_of(pipeline, model)
    check_trainable(pipeline)
    images = _load_data(data, pipeline, columns or Columns())
    settings = _with_conditions(
        diffusion.SamplingSettings(
            samples=samples,
            sampler=sampler,
            steps=steps,
            sampling_seeds=sampling_seeds,
            batch=batch,
            guidance_scale=guidance_scale,
        ),
        pipeline,
        images,
    )
    inputs = inputs_of(pipeline)
    inputs.check(images)
    validation = distributed.from_main(lambda: _validation(pipeline, images, inputs, where))
    found = diffusion.evaluate(
        pipeline,
        reference=diffusion.reference_images(images.held_out, REFERENCE_LIMIT),
        settings=settings,
        extractor=_extractor(data),
        weights=inception_weights,
        device=where,
        extra={"validation_loss": validation},
    )
    found |= distributed.from_main(
        lambda: diffusion.speed({"model": unet}, settings, device=where, batch=_timed(settings))[
            "model"
        ]
    )
    return {
        name: asdict(found[name]) | {"better": metric.better, "unit": metric.unit}
        for name, metric in DIFFUSION.items()
        if name in found and not name.endswith("_to_dense")
    }


def _open(typed: Recipe, output: str | Path | None, device: str | None) -> _Job:
    where = distributed.join(choose_device(device))
    # what the hub has, one process downloads, and the others find it
    with distributed.main_first():
        pipeline = load_pipeline(typed.model)
        _unet_of(pipeline, typed.model)
        data = _load_data(typed.data, pipeline, typed.columns)
    training = Training(**typed.recover.model_dump(), **typed.train.model_dump(), seed=typed.seed)
    folder = Path(output or typed.output or "runs/compress")
    asked = typed.evaluate
    settings = _with_conditions(
        diffusion.SamplingSettings(
            samples=asked.samples,
            sampler=asked.sampler,
            steps=asked.steps,
            sampling_seeds=asked.sampling_seeds,
            batch=asked.batch,
            guidance_scale=asked.guidance_scale,
        ),
        pipeline,
        data,
    )
    return _Job(typed, folder, pipeline, data, training, inputs_of(pipeline), settings, where)


def _unet_of(pipeline: DiffusionPipeline, model: str) -> Any:
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        raise ValueError(
            f"a pipeline with a unet is expected; {model} is a {type(pipeline).__name__} with "
            f"{sorted(pipeline.components)}; choose a DDPM-like pipeline"
        )
    return unet


def _load_data(source: str, pipeline: DiffusionPipeline, columns: Columns) -> ImageData:
    """Images as a pipeline draws them, with what its UNet must know about each."""
    wants = wanted(pipeline)
    column = None if wants is None else getattr(columns, wants)
    return load_images(source, *image_shape(pipeline), wants, column)


def _with_conditions(
    settings: diffusion.SamplingSettings, pipeline: DiffusionPipeline, data: ImageData
) -> diffusion.SamplingSettings:
    """Say what images are drawn of: held-out captions, or labels spread over the classes.

    Raises
    ------
    ValueError : for guidance where there are no prompts.
    """
    guidance, default = settings.guidance_scale, default_guidance(pipeline)
    if guidance is not None and default is None:
        raise ValueError(
            f"guidance_scale is for pipelines that take prompts; {type(pipeline).__name__} takes "
            f"none; got {guidance:g}; leave it out"
        )
    conditions: Sequence[Any] = ()
    if wanted(pipeline) == "caption":
        held_out = data.held_out_conditions or ()
        conditions = [held_out[i] for i in range(min(len(held_out), REFERENCE_LIMIT))]
    elif wanted(pipeline) == "label":
        conditions = sorted({*(data.train_conditions or ())})
    guidance = default if guidance is None else guidance
    return replace(settings, conditions=tuple(conditions), guidance_scale=guidance)


def _timed(settings: diffusion.SamplingSettings) -> int:
    """Batch of the timed passes: no larger than what sampling is trusted with."""
    return min(64, settings.batch)


def check_trainable(pipeline: DiffusionPipeline) -> None:
    """Refuse a pipeline whose UNet can be planned and cut, but not trained or sampled here.

    Raises
    ------
    ValueError : naming what is not supported.
    """
    check_pipeline(pipeline)
    noise_schedule(pipeline.scheduler)


def _pruning_run(job: _Job, journal: Journal, *, resume: bool = False) -> PruningRun:
    return PruningRun(
        job.pipeline.unet,
        job.pipeline.scheduler,
        job.data,
        cast(GradFlow | OneShot, job.recipe.method),
        job.training,
        journal,
        device=job.device,
        resume=resume,
        inputs=job.inputs,
    )


def _plan(job: _Job, pruning: PruningRun) -> str:
    return (
        f"{job.recipe.model}: widths {tuple(dense_widths(job.pipeline.unet))} -> "
        f"{tuple(pruning.widths)}, {pruning.total_steps} optimiser steps, output {job.folder}"
    )


def _parameters(unet: torch.nn.Module) -> int:
    return sum(p.numel() for p in unet.parameters())


def _check_space(job: _Job) -> None:
    """Refuse a disk that cannot hold the states and the checkpoint."""
    existing = next(p for p in (job.folder, *job.folder.absolute().parents) if p.exists())
    params = _parameters(job.pipeline.unet)
    # one state more than are kept, since the oldest goes when the newest is complete
    needed = ((job.training.keep_states + 1) * 4 + 1) * 4 * params + 2**22
    # the checkpoint holds the frozen parts as they are
    needed += sum(p.numel() * p.element_size() for m in job.inputs.modules for p in m.parameters())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"about {needed / 2**20:.0f} MB are needed in {job.folder} for state and checkpoint, "
            f"{free / 2**20:.0f} MB are free; free some space or choose another --output",
        )


def _extractor(data: str) -> str:
    return fidelity.DIGITS if data == "builtin:digits" else fidelity.INCEPTION


def _validation(
    pipeline: DiffusionPipeline, data: ImageData, inputs: Inputs, device: str
) -> diffusion.Value:
    count = min(VALIDATION_LIMIT, len(data.held_out))
    unet, scheduler = pipeline.unet.to(device).eval(), noise_schedule(pipeline.scheduler)
    with placed(inputs.modules, device):
        loss = validation_loss(
            lambda x, t, **condition: unet(x, t, **condition).sample,
            cast(Images, Subset(cast(Dataset, data.held_out), range(count))),
            scheduler,
            inputs=inputs,
            conditions=data.held_out_conditions,
            device=device,
        )
    how = "denoising MSE on held-out images, fixed noise and stratified timesteps, 2 draws each"
    kind = scheduler.config.prediction_type
    told = [f"prediction_type {kind}"] if kind != "epsilon" else []
    told += ["of latents"] if inputs.encode.modules else []
    told += [f"each with its {inputs.wants}"] if inputs.wants else []
    how = "; ".join([how, *told])
    return diffusion.Value(loss, f"{how}, {torch.device(device).type}", count)


def _evaluate(
    job: _Job, compressed: DiffusionPipeline, pruned: Pruned
) -> Generator[Event, None, dict[str, Any]]:
    asked, settings = job.recipe.evaluate, job.settings
    key = diffusion.samples_key(model_hash(job.recipe.model, job.pipeline), settings, job.device)
    cache = diffusion.samples_cache_path(key)
    images: dict[str, diffusion.Samples] = {}
    cached = distributed.from_main(lambda: diffusion.load_samples(cache))
    if cached is not None:
        images["dense"] = cached
    todo = [
        (n, p) for n, p in (("dense", job.pipeline), ("compressed", compressed)) if n not in images
    ]
    done, total = 0, settings.batches * len(todo)
    for name, pipeline in todo:
        batches = []
        for batch in diffusion.draw_batches(pipeline, settings, job.device):
            batches.append(batch)
            done += 1
            yield Event("evaluate", done, total, message="")
        images[name] = diffusion.gather(batches, settings)
    if cached is None and distributed.is_main():
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            diffusion.save_samples(cache, images["dense"])
    reference = diffusion.reference_images(job.data.held_out, REFERENCE_LIMIT)
    found = {}
    for name, pipeline in (("dense", job.pipeline), ("compressed", compressed)):
        validation = distributed.from_main(
            partial(_validation, pipeline, job.data, job.inputs, job.device)
        )
        found[name] = diffusion.evaluate(
            pipeline,
            reference=reference,
            settings=settings,
            samples=images[name],
            dense=None if name == "dense" else images["dense"],
            extractor=_extractor(job.recipe.data),
            weights=asked.inception_weights,
            device=job.device,
            extra={"validation_loss": validation},
        )
    unets = {"dense": job.pipeline.unet, "compressed": compressed.unet}
    speed = distributed.from_main(
        lambda: diffusion.speed(unets, settings, device=job.device, batch=_timed(settings))
    )
    for name, values in speed.items():
        found[name] |= values
    table = diffusion.side_by_side(found["dense"], found["compressed"])
    if distributed.is_main():
        shown = {n: s.flat[:SHOWN_SAMPLES].contiguous() for n, s in images.items()}
        write_bytes(job.folder / "samples.safetensors", save(shown))
    return {
        "run": _run_facts(job, pruned),
        "widths": _widths(job.pipeline.unet, pruned),
        "metrics": table,
        "floor": floor(job.recipe.data, settings.samples),
        "warnings": diffusion.warnings_of(table),
    }


def floor(data: str, samples: int) -> dict[str, float]:
    """Distances between the two halves of the real data: what a perfect sampler would reach.

    As many images of half a are taken as a sampling seed draws, since FID is biased by 1 / n.
    """
    if data != "builtin:digits":
        return {}
    halves = [diffusion.reference_images(digits(half)[0]) for half in ("a", "b")]
    found = fidelity.floor(*halves, count=samples)
    return {name: found[name] for name in ("fid_digits", "kid_digits")}


def _run_facts(job: _Job, pruned: Pruned) -> dict[str, Any]:
    facts = {k: v for k, v in pruned.report.items() if k != "surgery"}
    return {
        "method": job.recipe.method.model_dump(mode="json"),
        "model": job.recipe.model,
        "data": job.recipe.data,
        "seed": job.recipe.seed,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(job.device),
        "threads": torch.get_num_threads(),
        "processes": distributed.processes(),
        "versions": versions_of(PACKAGES),
        "surgery": {k: _finite(v) for k, v in pruned.report["surgery"].items()},
        **facts,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _widths(unet: UNet2DModel, pruned: Pruned) -> list[dict[str, Any]]:
    levels = [
        {"level": f"block_out_channels[{i}]", "dense": dense, "compressed": slim}
        for i, (dense, slim) in enumerate(zip(dense_widths(unet), pruned.widths, strict=True))
    ]
    inner = [
        {"level": name, "dense": inner_width(unet.get_submodule(name)), "compressed": slim}
        for name, slim in pruned.inner_widths.items()
    ]
    return levels + inner


def _provenance(job: _Job, pruned: Pruned, metrics: dict[str, Any]) -> dict[str, Any]:
    recipe = job.recipe.model_dump(mode="json")
    licence = DIGITS_LICENCE if job.recipe.model == "builtin:ddpm-digits" else None
    return {
        "base_model": job.recipe.model,
        "base_hash": model_hash(job.recipe.model, job.pipeline),
        "base_licence": licence or "see the base model",
        "recipe": recipe,
        "widths": _widths(job.pipeline.unet, pruned),
        "metrics": metrics,
        "versions": versions_of(PACKAGES),
    }


def _resolved(job: _Job) -> str:
    lines = [f"# {name} {number}" for name, number in versions_of(PACKAGES).items()]
    return "\n".join([*lines, dump(job.recipe)])
