"""Runs on a diffusion pipeline: prune, draw samples of both models, measure, export, report."""

import contextlib
import errno
import logging
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save
from torch.utils.data import Dataset, Subset

from compress.checkpoints.load import load
from compress.checkpoints.slim import save_slim
from compress.common.environment import choose_device, created, versions_of
from compress.common.files import write_bytes
from compress.common.journal import Journal
from compress.common.memory import check_memory
from compress.common.output_folder import remove_states
from compress.data.columns import Columns
from compress.data.sources import BUILTIN, ImageData, Images, builtin_parts, load_images
from compress.eval import diffusion, fidelity
from compress.eval.metrics import DIFFUSION
from compress.eval.sampling import sampler_of
from compress.eval.settings import Sampling, SamplingSettings
from compress.methods.base import Event, PruneJob
from compress.models.licence import licence_id, licence_of
from compress.models.locate import ModelFolder, locate
from compress.models.objective import (
    Inputs,
    check_trainable,
    check_usable,
    inputs_of,
    noise_schedule,
    predicted,
    validation_loss,
)
from compress.models.pipelines import (
    condition_of,
    default_guidance,
    denoiser,
    image_shape,
    placed,
    with_parts,
)
from compress.parallel import distributed
from compress.reports.diffusion import write_report
from compress.runs.recipe import Recipe

logger = logging.getLogger(__name__)

# more real images than this change a distance's third digit, and cost time and memory
REFERENCE_LIMIT = 10_000
VALIDATION_LIMIT = 2_048
SHOWN_SAMPLES = 64
TIMED_BATCH = 64
SPEED = ("latency_ms", "images_per_second", "peak_memory_mb")
BUILTIN_DATA = "builtin:digits"
NO_WEIGHTS = "not measured: no weights"
PACKAGES = (
    "compress-models",
    "torch",
    "diffusers",
    "accelerate",
    "torch-fidelity",
    "torch-pruning",
)


class DiffusionRun:
    """A recipe of a diffusion pipeline with everything that it names opened."""

    packages: Sequence[str] = PACKAGES

    def __init__(self, recipe: Recipe, folder: Path, device: str) -> None:
        self.recipe, self.folder, self.device = recipe, folder, device
        # what the hub has, one process downloads, and the others find it
        with distributed.main_first():
            self.at = locate(recipe.model, "diffusion")
            self.pipeline = load(self.at)
            self.data = load_data(recipe.data, self.pipeline, recipe.columns)
        self.training = recipe.training()
        self.inputs = inputs_of(self.pipeline)
        self.settings = with_conditions(recipe.evaluate, self.pipeline, self.data)
        self.lacking = ""  # why some metrics cannot be measured

    def job(self, *, resume: bool) -> PruneJob:
        """What the method works on."""
        return PruneJob(
            self.pipeline,
            self.data,
            self.training,
            self.device,
            Journal(self.folder),
            resume,
        )

    def check_sampling(self) -> None:
        """Refuse a pipeline that cannot be sampled and measured as the recipe says."""
        sampler_of(self.pipeline, self.settings.sampler, self.settings.steps)
        self.lacking = check_measurable(self.data, self.settings, self.recipe.data)
        if self.lacking:
            self.settings = _without_distances(self.settings)

    def prepare(self, *, resume: bool) -> Iterator[Event]:
        """Check pipeline, method and disk; the method's own events begin here."""
        check_trainable(self.pipeline)
        self.check_sampling()
        if distributed.is_main():
            self._check_space()
        if distributed.processes() == 1:  # several may cut the weights
            check_memory(
                16 * denoiser(self.pipeline)[1].num_parameters(),
                self.device,
                "weights, gradients and Adam's moments are held while the net is trained",
                "choose another --device, or a machine with more memory",
            )
        self._events = self.recipe.method.prune(self.job(resume=resume))
        event = next(self._events)
        plan = f"{self.recipe.model}: {event.message}, output {self.folder}"
        plan += f"; {self.lacking}" if self.lacking else ""
        yield Event(event.stage, event.step, event.total, event.values, plan)

    def compress(self) -> Iterator[Event]:
        """Prune."""
        self.pruned = yield from self._events
        part, _ = denoiser(self.pipeline)
        self.compressed = with_parts(self.pipeline, {part: self.pruned.model})

    def save(self, checkpoint: Path, metrics: Mapping[str, Any] | None = None) -> None:
        """Write the slim pipeline, and the trace of the method's work."""
        facts = self._provenance({} if metrics is None else metrics["metrics"])
        # a run's own folder: what is there was written by the run that is resumed
        save_slim(self.compressed, checkpoint, facts, source=self.at.folder, overwrite=True)
        if self.pruned.trace:
            write_bytes(self.folder / "trace.safetensors", save(self.pruned.trace))

    def report(self, metrics: dict[str, Any]) -> None:
        """Write the report; the states go."""
        write_report(self.folder, self.recipe.method)
        remove_states(self.folder)

    def _check_space(self) -> None:
        """Refuse a disk that cannot hold the states and the checkpoint."""
        existing = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        params = denoiser(self.pipeline)[1].num_parameters()
        # one state more than are kept, since the oldest goes when the newest is complete
        needed = ((self.training.keep_states + 1) * 4 + 1) * 4 * params + 2**22
        # the checkpoint holds the frozen parts as they are, and is written again with its metrics
        frozen = (p for module in self.inputs.modules for p in module.parameters())
        needed += 4 * params + 2 * sum(p.numel() * p.element_size() for p in frozen)
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"about {needed / 2**20:.0f} MB are needed in {self.folder} for state and "
                f"checkpoint, {free / 2**20:.0f} MB are free; free some space or choose another "
                "--output",
            )

    def measure(self) -> Generator[Event, None, dict[str, Any]]:
        """Measure the pipeline before and after."""
        settings, pipelines = self.settings, {"dense": self.pipeline, "compressed": self.compressed}
        key = diffusion.samples_key(self.at.hash, settings, self.device)
        cache = diffusion.samples_cache_path(key)
        cached = distributed.from_main(lambda: diffusion.load_samples(cache))
        images = {} if cached is None else {"dense": cached}
        missing = [name for name in pipelines if name not in images]
        done, total = 0, settings.batches * len(missing)
        for name in missing:
            batches = []
            for batch in diffusion.draw_batches(pipelines[name], settings, self.device):
                batches.append(batch)
                done += 1
                yield Event("evaluate", done, total)
            images[name] = diffusion.gather(batches, settings)
        if cached is None and distributed.is_main():
            with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
                diffusion.save_samples(cache, images["dense"])
        reference = diffusion.reference_images(self.data.held_out, REFERENCE_LIMIT)
        values = {}
        for name, pipeline in pipelines.items():
            validation = distributed.from_main(
                partial(_validation, pipeline, self.data, self.inputs, self.device)
            )
            values[name] = diffusion.evaluate(
                pipeline,
                reference=reference,
                settings=settings,
                samples=images[name],
                dense=None if name == "dense" else images["dense"],
                extractor=fidelity.extractor_of(self.recipe.data),
                device=self.device,
                extra={"validation_loss": validation},
            )
        models = {name: denoiser(pipeline)[1] for name, pipeline in pipelines.items()}
        if settings.wants(*SPEED):
            for name, speed in _speed(models, settings, self.device).items():
                values[name] |= speed
        table = diffusion.side_by_side(values["dense"], values["compressed"])
        table = {name: entry for name, entry in table.items() if settings.wants(name)}
        if self.lacking:
            table = _with_distances(
                table, lambda side: {"dense": side, "compressed": side, "ratio": None}
            )
        if distributed.is_main():
            shown = {n: s.flatten(0, 1)[:SHOWN_SAMPLES].contiguous() for n, s in images.items()}
            write_bytes(self.folder / "samples.safetensors", save(shown))
        return {
            "run": self._facts(),
            "widths": self.pruned.widths,
            "metrics": table,
            "floor": floor(self.recipe.data, settings.samples),
            "warnings": diffusion.warnings_of(table) + ([self.lacking] if self.lacking else []),
        }

    def _facts(self) -> dict[str, Any]:
        return {
            "method": self.recipe.method.model_dump(mode="json"),
            "model": self.recipe.model,
            "data": self.recipe.data,
            "seed": self.recipe.seed,
            **created(self.device),
            "processes": distributed.processes(),
            "versions": versions_of(PACKAGES),
            **self.pruned.report,
        }

    def _provenance(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "base_model": self.recipe.model,
            "base_hash": self.at.hash,
            "base_licence": licence_of(self.at.folder, self.recipe.model),
            "base_licence_id": licence_id(self.at.folder),
            "recipe": self.recipe.model_dump(mode="json"),
            "widths": self.pruned.widths,
            "metrics": metrics,
            "versions": versions_of(PACKAGES),
        }


def load_data(source: str, pipeline: DiffusionPipeline, columns: Columns) -> ImageData:
    """Images as a pipeline draws them, with what its denoiser must know about each."""
    condition = condition_of(pipeline)
    column = None if condition is None else getattr(columns, condition)
    return load_images(source, *image_shape(pipeline), condition, column)


def with_conditions(
    sampling: Sampling, pipeline: DiffusionPipeline, data: ImageData
) -> SamplingSettings:
    """Say what images are drawn of: held-out captions, or labels spread over the classes.

    Raises
    ------
    ValueError : for guidance where there are no prompts.
    """
    guidance, default = sampling.guidance_scale, default_guidance(pipeline)
    if guidance is not None and default is None:
        raise ValueError(
            f"guidance_scale is for pipelines that take prompts; {type(pipeline).__name__} takes "
            f"none; got {guidance:g}; leave it out"
        )
    conditions: Sequence[Any] = ()
    if condition_of(pipeline) == "caption":
        held_out = data.held_out_conditions or ()
        conditions = [held_out[i] for i in range(min(len(held_out), REFERENCE_LIMIT))]
    elif condition_of(pipeline) == "label":
        conditions = sorted({*(data.train_conditions or ())})
    scale = default if guidance is None else guidance
    return SamplingSettings(
        **dict(sampling) | {"guidance_scale": scale}, conditions=tuple(conditions)
    )


def check_measurable(data: ImageData, settings: SamplingSettings, source: str) -> str:
    """Refuse, before anything is trained or drawn, what could not be measured at the end.

    Parameters
    ----------
    data : the images.
    settings : how many are drawn, and which metrics are measured.
    source : the data as a recipe names it, which decides the features of the distances.

    Returns
    -------
    Why the distances cannot be measured, where none is requested by name and Inception's
    weights can neither be found nor fetched; else empty.

    Raises
    ------
    ValueError : for metrics that these data do not give, too few images, more than memory holds, or
        a file of Inception weights that cannot be read; for weights that cannot be had where
        ``settings.metrics`` names what needs them.
    """
    extractor = fidelity.extractor_of(source)
    distances = fidelity.metric_names(extractor)
    others = {name for each in fidelity.SUFFIXES for name in fidelity.metric_names(each)}
    if wrong := sorted({*(settings.metrics or ())} & (others - {*distances})):
        raise ValueError(
            f"of {source} the distances are {', '.join(distances)}; got {', '.join(wrong)} in "
            "evaluate.metrics; name those"
        )
    count, least = len(data.held_out), fidelity.NEIGHBOURS + 1
    if count < least and settings.wants(*distances):
        raise ValueError(
            f"{', '.join(distances)} need {least} held-out images or more, one in ten of all; "
            f"{source} has {len(data.train) + count} images, {count} of them held out; give "
            f"{10 * least - 9} or more, or name other metrics in evaluate.metrics"
        )
    pixels = data.held_out[0].numel()
    images = min(count, REFERENCE_LIMIT) + 2 * settings.sampling_seeds * settings.samples
    check_memory(
        images * pixels,
        "cpu",
        f"{images:,} images of {pixels:,} bytes are held while they are measured",
        "lower evaluate.samples",
    )
    if extractor == fidelity.INCEPTION and settings.wants(*distances):
        return distributed.from_main(lambda: _lacking(settings))
    return ""


def _lacking(settings: SamplingSettings) -> str:
    """What is to be said about Inception weights that are not at hand; raises if they must be."""
    try:
        fidelity.check_inception(settings.inception_weights)
    except ValueError as error:
        if settings.metrics is not None or settings.inception_weights is not None:
            raise
        return f"{', '.join(fidelity.metric_names(fidelity.INCEPTION))} {NO_WEIGHTS}: {error}"
    return ""


def _without_distances(settings: SamplingSettings) -> SamplingSettings:
    others = [name for name in DIFFUSION if name not in fidelity.metric_names(fidelity.INCEPTION)]
    return settings.model_copy(update={"metrics": tuple(others)})


def _with_distances(
    table: Mapping[str, dict[str, Any]], entry: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Metrics and, in the order of all, a row that says so for each that was not measured."""
    side = {"value": None, "ci95": None, "n": 0, "why": NO_WEIGHTS}
    rows = {
        name: entry(side)
        | {"better": DIFFUSION[name].better, "unit": DIFFUSION[name].unit, "how": NO_WEIGHTS}
        for name in fidelity.metric_names(fidelity.INCEPTION)
    }
    measured = {**table, **rows}
    return {name: measured[name] for name in DIFFUSION if name in measured}


def _speed(
    models: Mapping[str, torch.nn.Module], settings: SamplingSettings, device: str
) -> dict[str, dict[str, diffusion.Value]]:
    # no larger a batch than sampling is trusted with
    batch = min(TIMED_BATCH, settings.batch)
    return distributed.from_main(
        lambda: diffusion.speed(dict(models), settings, device=device, batch=batch)
    )


def _validation(
    pipeline: DiffusionPipeline, data: ImageData, inputs: Inputs, device: str
) -> diffusion.Value:
    count = min(VALIDATION_LIMIT, len(data.held_out))
    model = denoiser(pipeline)[1].to(device).eval()
    scheduler = noise_schedule(pipeline.scheduler)
    with placed(inputs.modules, device):
        loss = validation_loss(
            lambda x, t, **condition: predicted(model, x, t, condition),
            cast(Images, Subset(cast(Dataset, data.held_out), range(count))),
            scheduler,
            inputs=inputs,
            conditions=data.held_out_conditions,
            device=device,
        )
    how = ["denoising MSE on held-out images, fixed noise and stratified timesteps, 2 draws each"]
    kind = scheduler.config.get("prediction_type", "the velocity of flow matching")
    how += [f"prediction_type {kind}"] if kind != "epsilon" else []
    how += ["of latents"] if inputs.encode else []
    how += [f"each with its {inputs.wants}"] if inputs.wants else []
    return diffusion.Value(loss, f"{'; '.join(how)}, {torch.device(device).type}", count)


def floor(data: str, samples: int) -> dict[str, float]:
    """Distances between two parts of the real data: what a perfect sampler would reach.

    As many images of the first are taken as a sampling seed draws, since FID is biased by 1 / n.
    """
    if data not in BUILTIN:
        return {}
    extractor = fidelity.extractor_of(data)
    parts = [diffusion.reference_images(images) for images, _ in builtin_parts(data)]
    distances = fidelity.floor(*parts, count=samples, extractor=extractor)
    return {name: distances[name] for name in fidelity.metric_names(extractor)[:2]}


@distributed.explained()
def evaluate_pipeline(
    model: str | ModelFolder,
    sampling: Sampling | None = None,
    *,
    data: str = BUILTIN_DATA,
    columns: Columns | None = None,
    device: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure any diffusers pipeline that can be sampled here with the diffusion suite.

    Parameters
    ----------
    model : ``builtin:NAME``, a hub id, or a local diffusers folder.
    sampling : how its images are drawn.
    data : the real images, as in a recipe.
    columns : where the data has captions or labels.
    device : CUDA where there is any when None.

    Returns
    -------
    Per metric ``value``, ``ci95``, ``n``, ``how``, ``better`` and ``unit``.
    """
    where = distributed.join(choose_device(device))
    pipeline: Any = load(locate(model, "diffusion"))
    network = denoiser(pipeline)[1]
    check_usable(pipeline)
    images = load_data(data, pipeline, columns or Columns())
    settings = with_conditions(sampling or Sampling(), pipeline, images)
    inputs = inputs_of(pipeline)
    inputs.check(images)
    lacking = check_measurable(images, settings, data)
    if lacking:
        logger.warning("%s", lacking)
        settings = _without_distances(settings)
    validation = distributed.from_main(lambda: _validation(pipeline, images, inputs, where))
    values = diffusion.evaluate(
        pipeline,
        reference=diffusion.reference_images(images.held_out, REFERENCE_LIMIT),
        settings=settings,
        extractor=fidelity.extractor_of(data),
        device=where,
        extra={"validation_loss": validation},
    )
    if settings.wants(*SPEED):
        values |= _speed({"model": network}, settings, where)["model"]
    table = {
        name: asdict(values[name]) | {"better": metric.better, "unit": metric.unit}
        for name, metric in DIFFUSION.items()
        if name in values and settings.wants(name) and not name.endswith("_to_dense")
    }
    return _with_distances(table, dict) if lacking else table
