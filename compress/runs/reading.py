"""``compress eval MODEL --suite ocr``: read pages, keep the predictions, score them, report."""

import datetime
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from compress.checkpoints.applied import Applied
from compress.checkpoints.runtime import base_model, load_reader
from compress.common.environment import choose_device, device_name, versions_of
from compress.common.files import folder_hash, write_json, write_text
from compress.common.output_folder import check_same_settings, check_target, claim
from compress.data.ocr_pages import OcrData, load_pages
from compress.eval import ocr
from compress.eval.metrics import metric
from compress.eval.values import Value
from compress.methods.base import Event, RuntimeMethod
from compress.models.deepseek_ocr_processor import with_mode
from compress.models.page_images import open_image
from compress.models.reading import read_pages
from compress.models.vlm import model_folder
from compress.reports.reader import write_ocr_report

SETTINGS = "evaluation.yaml"
PREDICTIONS = "predictions.jsonl"
PACKAGES = ("compress-models", "torch", "transformers", "rapidfuzz", "jiwer", "sacrebleu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class OcrSettings:
    """What an OCR evaluation depends on.

    Parameters
    ----------
    model : ``builtin:NAME``, a folder, a hub id, or a patched checkpoint with its methods.
    data : as in :func:`compress.data.ocr_pages.load_pages`; for a built-in reader and checkpoints
        made of it, when None, the pages of the kind that it was trained on, and ``builtin:pages``
        for other models.
    samples : rendered pages of each kind; a folder is read as a whole.
    batch : pages that are read together.
    prompt : the family's own for plain text when None.
    max_new_tokens : of a page; what the checkpoint says when None.
    dtype : of the weights: float32, bfloat16 or float16.
    mode : DeepSeek-OCR's resolution; the checkpoint's own when None.
    seed : of the bootstrap.
    ocean_order : ``correct`` or ``published``: how Ocean-OCR's metrics are computed.
    """

    model: str
    data: str | None = None
    samples: int = 64
    batch: int = 8
    prompt: str | None = None
    max_new_tokens: int | None = None
    dtype: str = "float32"
    mode: str | None = None
    seed: int = 0
    ocean_order: str = "correct"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}; choose one"
            )
        if self.ocean_order not in ocr.OCEAN_ORDERS:
            raise ValueError(
                f"--ocean-order must be one of {', '.join(ocr.OCEAN_ORDERS)}; got "
                f"{self.ocean_order!r}; choose one"
            )
        if self.data is None:
            square = base_model(self.model) == "builtin:reader-deepseek"
            object.__setattr__(self, "data", f"builtin:{'square-' * square}pages")


def evaluate_events(
    settings: OcrSettings,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
) -> Generator[Event, None, dict[str, Any]]:
    """Evaluate a model, as a generator of events: the caller owns the loop.

    ``output`` gets ``evaluation.yaml`` (settings and the model's hash), ``predictions.jsonl``,
    ``metrics.json`` and ``report.html``.

    Returns
    -------
    What metrics.json holds: ``metrics`` (per metric ``value``, ``ci95``, ``n``, ``how`` and
    ``better``; of a patched checkpoint also what its methods counted), ``methods``, ``counted`` and
    ``run``.

    Raises
    ------
    ValueError : for a model, data or images that cannot be used, or to resume other settings.
    FileExistsError : when the folder is in use and neither ``resume`` nor ``overwrite`` is given.
    """
    where = choose_device(device)
    check_target(output, resume=resume, overwrite=overwrite)
    data = load_pages(str(settings.data), open_image, settings.samples)
    if data.annotations is not None:
        ocr.check_accuracy(data)
    folder = model_folder(settings.model)
    facts = asdict(settings) | {"model_hash": folder_hash(folder)}
    if resume:
        check_same_settings(output / SETTINGS, facts)
    model, processor, methods = load_reader(folder, DTYPES[settings.dtype])
    model.to(where)
    processor = with_mode(processor, settings.mode)
    applied = Applied(model, methods) if methods else None
    read = page_reader(model, processor, settings.prompt, settings.max_new_tokens, applied)
    with claim(output, resume=resume, overwrite=overwrite):
        write_text(output / SETTINGS, yaml.safe_dump(facts, sort_keys=False, allow_unicode=True))
        for count in ocr.predict(data, read, settings.batch, output / PREDICTIONS):
            yield Event("read", count, len(data.pages))
        metrics = _score(data, output, settings, methods)
        metrics["methods"] = [method.model_dump(mode="json") for method in methods]
        metrics["run"] = _facts(facts, len(data.pages), where)
        write_json(output / "metrics.json", metrics)
        write_ocr_report(output, data, ocr.read_predictions(output / PREDICTIONS), metrics)
    yield Event("done", 1, 1, message=f"report in {output / 'report.html'}")
    return metrics


def page_reader(
    model: Any,
    processor: Any,
    prompt: str | None,
    max_new_tokens: int | None,
    applied: Applied | None = None,
) -> ocr.Read:
    """What :func:`compress.eval.ocr.predict` reads with.

    Parameters
    ----------
    model, processor, prompt, max_new_tokens : as in :func:`compress.models.reading.read_pages`.
    applied : the methods on the model, whose counts each batch's first prediction carries.
    """

    def read(names: Sequence[str], images: Sequence[Image.Image]) -> list[ocr.Prediction]:
        if applied is not None:
            applied.reset()
        readings = read_pages(model, processor, images, prompt, max_new_tokens)
        facts = None if applied is None else applied.facts()
        return [
            ocr.Prediction(name, facts=None if place else facts, **asdict(reading))
            for place, (name, reading) in enumerate(zip(names, readings, strict=True))
        ]

    return read


def read_files(
    model: str,
    pages: Sequence[Path],
    *,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    dtype: str = "float32",
    mode: str | None = None,
    device: str | None = None,
) -> list[str]:
    """Read image files one by one; the same as ``compress read``.

    Parameters
    ----------
    model : ``builtin:NAME``, a folder, a hub id, or a patched checkpoint with its methods.
    pages : image files.
    prompt, max_new_tokens, dtype, mode : as in `OcrSettings`.
    device : CUDA where there is any when None.

    Raises
    ------
    ValueError, FileNotFoundError : for a model or an image that cannot be used.
    """
    settings = OcrSettings(model, prompt=prompt, max_new_tokens=max_new_tokens, dtype=dtype)
    images = [open_image(path) for path in pages]
    network, processor, methods = load_reader(model, DTYPES[settings.dtype])
    network.to(choose_device(device))
    processor = with_mode(processor, mode)
    if methods:
        Applied(network, methods)  # the network holds it
    return [
        read_pages(network, processor, [image], prompt, max_new_tokens)[0].text for image in images
    ]


def counted(
    methods: Sequence[RuntimeMethod], predictions: Sequence[ocr.Prediction]
) -> dict[str, Any]:
    """What run-time methods counted over all pages; see :meth:`RuntimeMethod.count`."""
    batches = [p.facts for p in predictions if p.facts]
    counts: dict[str, Any] = {}
    for method in methods:
        counts |= method.count([facts[method.name] for facts in batches if method.name in facts])
    return counts


def counted_metrics(
    methods: Sequence[RuntimeMethod], counts: Mapping[str, Any], pages: int
) -> dict[str, Value]:
    """The metrics among what :func:`counted` returns; they have no interval."""
    return {
        name: Value(counts[name], metric.how, pages)
        for method in methods
        for name, metric in method.metrics.items()
        if name in counts
    }


def _score(
    data: OcrData, output: Path, settings: OcrSettings, methods: Sequence[RuntimeMethod]
) -> dict[str, Any]:
    """The metrics, and what methods counted."""
    read = ocr.read_predictions(output / PREDICTIONS)
    counts = counted(methods, read)
    found = ocr.score(data, read, settings.seed, settings.ocean_order).metrics
    found |= counted_metrics(methods, counts, len(data.pages))
    metrics = {n: asdict(value) | {"better": metric(n).better} for n, value in found.items()}
    return {"metrics": metrics, "counted": counts}


def _facts(settings: dict[str, Any], pages: int, device: str) -> dict[str, Any]:
    return {
        **settings,
        "pages": pages,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions_of(PACKAGES),
    }
