"""Evaluate any reader: read pages, keep the predictions, score and report them."""

import contextlib
import logging
from collections.abc import Generator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from compress.bench.reading_parts import in_parts, marked_parts
from compress.bench.timing import Bench, Marks
from compress.checkpoints.applied import Applied
from compress.checkpoints.runtime import base_model
from compress.common.environment import choose_device, created, versions_of
from compress.common.files import read_json, write_json, write_text
from compress.common.output_folder import (
    check_apart,
    check_same_settings,
    check_target,
    claim,
    is_finished,
    tidy,
)
from compress.data.ocr_pages import OcrData, OcrPage, load_pages
from compress.eval import ocr
from compress.eval.metrics import metric
from compress.eval.settings import OcrEvaluation, ReadSettings
from compress.eval.values import Value
from compress.methods.base import Event, RuntimeMethod
from compress.models.locate import ModelFolder, locate
from compress.models.reading import try_pages
from compress.parallel import distributed
from compress.reports.reader import write_ocr_report
from compress.runs.counting import counted, counted_metrics
from compress.runs.reading import as_known, open_reader

logger = logging.getLogger(__name__)

SETTINGS = "evaluation.yaml"
PREDICTIONS = "predictions.jsonl"
PACKAGES = ("compress-models", "torch", "transformers", "rapidfuzz", "jiwer", "sacrebleu")
# built-in readers are evaluated on pages of the kind that they were trained on
PAGES_OF = {"builtin:reader-deepseek": "builtin:square-pages"}


def default_pages(at: ModelFolder) -> str:
    """The pages on which a reader is evaluated where none are named."""
    return PAGES_OF.get(base_model(at), "builtin:pages")


def evaluate_events(
    model: str | Path | ModelFolder,
    output: Path,
    settings: OcrEvaluation | None = None,
    *,
    data: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
) -> Generator[Event, None, dict[str, Any]]:
    """Evaluate a reader, as a generator of events: the caller owns the loop.

    ``output`` gets ``evaluation.yaml`` (settings and the model's hash), ``predictions.jsonl``,
    ``metrics.json`` and ``report.html``.

    Parameters
    ----------
    model : ``builtin:NAME``, a folder, a hub id, or a runtime checkpoint with its methods.
    output : folder of the evaluation.
    settings : how pages are read and scored; with the unseen font when None.
    data : pages, as in a recipe; for a built-in reader, and checkpoints made of it, those of the
        kind that it was trained on when None, and ``builtin:pages`` for other models.
    resume : read the pages that are left; a finished evaluation stays as it is.
    overwrite : start again.
    device : CUDA where there is any when None.

    Returns
    -------
    What metrics.json holds: ``metrics`` (per metric ``value``, ``ci95``, ``n``, ``how`` and
    ``better``; of a runtime checkpoint also what its methods counted), ``methods``, ``counted`` and
    ``run``.

    Raises
    ------
    ValueError : for a model, data or images that cannot be used, or to resume other settings.
    FileExistsError : when the folder is in use and neither ``resume`` nor ``overwrite`` is given.
    """
    settings = settings or OcrEvaluation(unseen_font=True)
    report = f"report in {output / 'report.html'}"
    with distributed.explained():
        where = distributed.join(choose_device(device))
        main = distributed.is_main()  # of several processes only this one touches the folder
        at = locate(model, "reader")
        source = data or default_pages(at)
        if main:
            check_target(output, resume=resume, overwrite=overwrite)
            check_apart(output, {"model": at.folder, "data": source})
        pages = load_pages(source, settings.samples, settings.unseen_font)
        pages = replace(pages, pages=tuple(as_known(at)(pages.pages)))
        if pages.annotations is not None:
            ocr.check_accuracy(pages)
        facts = {
            "model": at.name,
            "base_model": base_model(at),
            "data": source,
            **settings.model_dump(mode="json"),
            "model_hash": at.hash,
        }
        if resume and main:
            # what was read does not depend on how it is scored
            scoring = () if is_finished(output) else ("metrics", "strict")
            check_same_settings(output / SETTINGS, facts, scoring)
        if resume and distributed.from_main(lambda: is_finished(output)):
            distributed.from_main(lambda: tidy(output))
            yield Event("done", 1, 1, message=f"already finished; {report}")
            return distributed.from_main(lambda: read_json(output / "metrics.json"))
        network, processor, methods = open_reader(at, settings, where)
        applied = Applied(network, methods) if methods else None
        times: ocr.Times = []
        parts: ocr.Parts = []
        read = page_reader(network, processor, settings, applied, parts)
        claimed = claim(output, "evaluation", resume=resume, overwrite=overwrite)
        with claimed if main else contextlib.nullcontext():
            text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
            distributed.from_main(lambda: write_text(output / SETTINGS, text))
            for count in ocr.predict(pages, read, settings.batch, output / PREDICTIONS, times):
                yield Event("read", count, len(pages.pages))
            run = {
                **facts,
                "pages": len(pages.pages),
                "processes": distributed.processes(),
                **created(where),
                "versions": versions_of(PACKAGES),
            }

            def scored() -> dict[str, Any]:
                speed = ocr.speed(times) | ocr.split(parts)
                metrics = {**_score(pages, output, settings, methods, speed), "run": run}
                write_json(output / "metrics.json", metrics)
                write_ocr_report(output, pages, ocr.read_predictions(output / PREDICTIONS), metrics)
                return metrics

            metrics = distributed.from_main(scored)
        yield Event("done", 1, 1, message=report)
        return metrics


def page_reader(
    model: Any,
    processor: Any,
    settings: ReadSettings,
    applied: Applied | None,
    parts: ocr.Parts,
) -> ocr.Read:
    """What :func:`compress.eval.ocr.predict` reads with.

    Parameters
    ----------
    model, processor : as in :func:`compress.models.reading.try_pages`.
    settings : prompt and longest text.
    applied : the methods on the model, whose counts each batch's first prediction carries.
    parts : gets the pages of every batch, and where its time went.
    """
    bench = Bench(str(model.device), 1)

    def read(pages: Sequence[OcrPage]) -> list[ocr.Prediction]:
        if applied is not None:
            applied.reset()
        marks = Marks(bench)
        with marked_parts(model, marks):
            readings = try_pages(model, processor, pages, **settings.generation)
        parts.append((len(pages), in_parts(marks.milliseconds())))
        none = all(reading.error for reading in readings)
        facts = None if applied is None or none else applied.facts()
        for reading in readings:
            if reading.error:
                logger.warning("scored as an empty page: %s", reading.error)
        return [
            ocr.Prediction(page=page.name, facts=None if place else facts, **asdict(reading))
            for place, (page, reading) in enumerate(zip(pages, readings, strict=True))
        ]

    return read


def _score(
    data: OcrData,
    output: Path,
    settings: OcrEvaluation,
    methods: Sequence[RuntimeMethod],
    speed: dict[str, Value],
) -> dict[str, Any]:
    """The metrics, the methods, and what they counted."""
    read = ocr.read_predictions(output / PREDICTIONS)
    counts = counted(methods, read)
    metrics = ocr.score(data, read, strict=settings.strict).metrics
    metrics |= counted_metrics(methods, counts, len(data.pages)) | speed
    return {
        "metrics": {
            name: asdict(value) | {"better": metric(name).better}
            for name, value in settings.chosen(metrics).items()
        },
        "methods": [method.model_dump(mode="json") for method in methods],
        "counted": counts,
    }
