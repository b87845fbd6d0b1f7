"""``compress run`` on a reader: apply run-time methods, read pages, compare, export, report."""

import datetime
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from compress.checkpoints.applied import Applied
from compress.checkpoints.runtime import check_dense, save_patched
from compress.common.environment import choose_device, device_name, versions_of
from compress.common.files import folder_hash, read_json, write_json, write_text
from compress.common.output_folder import check_same_settings, check_target, claim
from compress.data.ocr_pages import RENDERED, OcrData, OcrPage, load_pages
from compress.data.pages import page
from compress.eval import ocr
from compress.eval.metrics import metric
from compress.eval.retention import retention, worst_page_delta
from compress.eval.values import Value
from compress.methods.base import Calibrated, Event, RuntimeMethod
from compress.models.deepseek_ocr_processor import with_mode
from compress.models.page_images import open_image
from compress.models.transformers_folder import stored_shapes
from compress.models.visual import adapter_for, build_prompt
from compress.models.vlm import load_vlm, model_folder
from compress.reports.reader import write_reader_report
from compress.runs.reading import DTYPES, PACKAGES, counted, counted_metrics, page_reader
from compress.runs.recipe import ReaderRecipe, dump
from compress.runs.run import RunResult

CALIBRATION = "calibration.json"
MODEL = "model.json"


@dataclass(frozen=True)
class Variant:
    """One way to read the pages: the dense model, the recipe's methods, or one to compare."""

    name: str
    methods: tuple[RuntimeMethod, ...]

    @property
    def file(self) -> str:
        """Where its predictions go, below the run's folder."""
        return f"predictions/{self.name}.jsonl"


def variants(recipe: ReaderRecipe) -> list[Variant]:
    """What a recipe asks to be read, dense first; names are unique."""
    found = [Variant("dense", ()), Variant("compressed", tuple(recipe.method))]
    for method in recipe.compare:
        name = variant_name(method)
        same = sum(v.name == name or v.name.startswith(f"{name} #") for v in found)
        found.append(Variant(f"{name} #{same + 1}" if same else name, (method,)))
    return found


def variant_name(method: RuntimeMethod) -> str:
    """A method and the settings that are not its defaults, as one name."""
    fields = type(method).model_fields
    changed = {k: v for k, v in method.model_dump().items() if v != fields[k].default}
    return " ".join([method.name, *(f"{key}={value}" for key, value in changed.items())])


def reader_events(
    recipe: ReaderRecipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
) -> Generator[Event, None, RunResult]:
    """Do what a recipe says, as a generator of events: the caller owns the loop.

    Raises
    ------
    ValueError : for a model, data or methods that cannot be used, or to resume another recipe or
        with another model.
    FileExistsError : when the folder is in use and neither ``resume`` nor ``overwrite`` is given.
    """
    asked, where = recipe.evaluate, choose_device(device)
    check_target(folder, resume=resume, overwrite=overwrite)
    if resume:
        check_same_settings(folder / "recipe.yaml", yaml.safe_load(dump(recipe)))
    data = load_pages(recipe.data, open_image, asked.samples, asked.unseen_font)
    ocr.check_accuracy(data)
    base = model_folder(recipe.model)
    check_dense(recipe.model, base)
    weights = folder_hash(base)
    if resume:
        _check_same_model(folder, recipe.model, weights)
    model, processor = load_vlm(base, DTYPES[asked.dtype])
    processor = with_mode(processor, asked.mode)
    model.to(where)
    for variant in variants(recipe)[1:]:
        Applied(model, variant.methods).remove()  # a method that cannot serve the model says so now
    yield Event("prepare", 1, 1, message=f"{recipe.model}: {len(data.pages)} pages")
    with claim(folder, resume=resume, overwrite=overwrite):
        write_text(folder / "recipe.yaml", dump(recipe, _header()))
        write_json(folder / MODEL, {"model": recipe.model, "model_hash": weights})
        calibrated = yield from _calibrations(recipe, model, processor, folder)
        found = [
            replace(v, methods=tuple(with_calibration(m, calibrated) for m in v.methods))
            for v in variants(recipe)
        ]
        (folder / "predictions").mkdir(exist_ok=True)
        for variant in found:
            applied = Applied(model, variant.methods) if variant.methods else None
            read = page_reader(model, processor, asked.prompt, asked.max_new_tokens, applied)
            try:
                for count in ocr.predict(data, read, asked.batch, folder / variant.file):
                    yield Event(variant.name, count, len(data.pages))
            finally:
                if applied is not None:
                    applied.remove()
        yield Event("report", 0, 2)
        metrics = {
            **_measured(recipe, data, found, folder),
            "calibration": {name: one.facts for name, one in calibrated.items()} or None,
            "run": _facts(recipe, where, len(data.pages), weights),
        }
        facts = {
            "base_model": recipe.model,
            "base_hash": weights,
            "recipe": recipe.model_dump(mode="json"),
            "calibration": metrics["calibration"],
            "metrics": metrics["metrics"],
        }
        checkpoint = save_patched(
            model,
            processor,
            found[1].methods,
            folder / "checkpoint",
            facts,
            recipe.model if recipe.weights == "reference" else None,
        )
        write_json(folder / "metrics.json", metrics)
        yield Event("report", 1, 2)
        write_reader_report(folder, data, found, metrics, model, processor, asked.prompt)
    yield Event("done", 1, 1, message=f"checkpoint in {checkpoint}")
    return RunResult(folder, metrics, checkpoint)


def dry_run(recipe: ReaderRecipe, *, device: str | None = None) -> dict[str, Any]:
    """Predict what a recipe would do, without reading a page or writing anything.

    Returns
    -------
    ``model``, the ``parameters`` that run, the ``stored_values`` of its files (of DeepSeek-OCR's
    layout they include tensors that nothing reads), ``pages``, ``variants`` and ``problems``.
    """
    folder = Path(recipe.output or "")
    problems: list[str] = []
    facts: dict[str, Any] = {"model": recipe.model, "data": recipe.data}
    try:
        choose_device(device)
        asked = recipe.evaluate
        data = load_pages(recipe.data, open_image, asked.samples, asked.unseen_font)
        facts |= {"pages": len(data.pages), "readings": len(data.pages) * len(variants(recipe))}
        ocr.check_accuracy(data)
        base = model_folder(recipe.model)
        check_dense(recipe.model, base)
        model, processor = load_vlm(base)
        with_mode(processor, asked.mode)
        facts["family"] = adapter_for(model.config).name
        facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        facts["stored_values"] = sum(map(math.prod, stored_shapes(base).values()))
        for variant in variants(recipe)[1:]:
            Applied(model, variant.methods).remove()
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    try:
        check_target(folder, resume=False, overwrite=False)
    except FileExistsError as error:
        problems.append(str(error))
    names = [variant.name for variant in variants(recipe)]
    return {**facts, "variants": names, "output": str(folder), "problems": problems}


# ---- calibration -----------------------------------------------------------------------------


def _calibrations(
    recipe: ReaderRecipe, model: Any, processor: Any, folder: Path
) -> Generator[Event, None, dict[str, Calibrated]]:
    """Measure what methods leave open, by their names; kept for a resumed run.

    Of several methods of one name the first is calibrated, for all of them.
    """
    methods = [*recipe.method, *recipe.compare]
    left_open = {m.name: m for m in reversed(methods) if m.needs_calibration()}
    if not left_open:
        return {}
    path = folder / CALIBRATION
    if path.is_file():
        return {name: Calibrated(**one) for name, one in read_json(path).items()}
    yield Event("calibrate", 0, len(left_open))
    pages = calibration_pages(recipe.data, recipe.calibrate.pages)
    calibrated: dict[str, Calibrated] = {}
    for name, method in left_open.items():
        found = calibrated[name] = calibrate_on_pages(
            model,
            processor,
            method,
            pages,
            prompt=recipe.evaluate.prompt,
            batch=recipe.evaluate.batch,
            max_new_tokens=recipe.calibrate.max_new_tokens,
        )
        settings = ", ".join(f"{knob} {value}" for knob, value in found.settings.items())
        yield Event("calibrate", len(calibrated), len(left_open), message=f"{name}: {settings}")
    write_json(path, {name: asdict(one) for name, one in calibrated.items()})
    return calibrated


def calibrate_on_pages(
    model: Any,
    processor: Any,
    method: RuntimeMethod,
    pages: Sequence[OcrPage],
    *,
    prompt: str | None = None,
    batch: int = 8,
    max_new_tokens: int = 128,
) -> Calibrated:
    """Let a model transcribe pages densely, and measure what a method leaves open.

    Parameters
    ----------
    model, processor : of :func:`compress.models.vlm.load_vlm`.
    method : to calibrate.
    pages : to transcribe.
    prompt : the family's own for plain text when None.
    batch : pages that are transcribed together.
    max_new_tokens : of a page.
    """
    text = adapter_for(model.config).read_prompt if prompt is None else prompt
    batches = []
    for first in range(0, len(pages), batch):
        images = [p.open() for p in pages[first : first + batch]]
        inputs = build_prompt(model, processor, images, [text] * len(images))
        batches.append(
            {n: t.to(model.device) if torch.is_tensor(t) else t for n, t in inputs.items()}
        )
    return method.calibrate(model, batches, max_new_tokens)


def with_calibration(method: RuntimeMethod, calibrated: Mapping[str, Calibrated]) -> RuntimeMethod:
    """The method with the settings that were measured for it, if it left any open."""
    if not method.needs_calibration():
        return method
    return type(method)(**method.model_dump() | calibrated[method.name].settings)


def calibrated_checkpoint(
    model: str,
    method: RuntimeMethod,
    output: Path,
    *,
    data: str = "builtin:pages",
    pages: int = 16,
    max_new_tokens: int = 128,
    dtype: str = "float32",
    device: str | None = None,
) -> Calibrated:
    """Calibrate a method and write a checkpoint with its settings; as ``compress calibrate``.

    The checkpoint refers to the model's weights and holds no copy.

    Parameters
    ----------
    model : ``builtin:NAME``, a folder or a hub id.
    method : with settings left open.
    output : the checkpoint's folder.
    data, pages : rendered validation pages, or the first of a folder.
    max_new_tokens : as in :func:`calibrate_on_pages`.
    dtype : of the weights.
    device : CUDA where there is any when None.

    Raises
    ------
    ValueError, FileNotFoundError : for a model or data that cannot be used.
    FileExistsError : when the folder holds something.
    """
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"output folder {output} holds files; choose another --output")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}; choose one")
    base = model_folder(model)
    check_dense(model, base)
    network, processor = load_vlm(base, DTYPES[dtype])
    network.to(choose_device(device))
    found = calibrate_on_pages(
        network, processor, method, calibration_pages(data, pages), max_new_tokens=max_new_tokens
    )
    facts = {
        "base_model": model,
        "base_hash": folder_hash(base),
        "calibration": {method.name: found.facts},
        "calibrated_on": {"data": data, "pages": pages},
        "versions": versions_of(PACKAGES),
    }
    methods = [with_calibration(method, {method.name: found})]
    save_patched(network, processor, methods, output, facts, reference=model)
    return found


def calibration_pages(source: str, count: int) -> list[OcrPage]:
    """Pages to calibrate on: rendered ones of the validation split, or the first of a folder."""
    name = source.partition(":")[2]
    if source.startswith("builtin:") and name in RENDERED:
        made = [page(0, index, RENDERED[name], "validation") for index in range(count)]
        return [OcrPage(str(i), lambda p=p: p.image, p.text) for i, p in enumerate(made)]  # type: ignore[misc]
    return list(load_pages(source, open_image).pages[:count])


# ---- measurement -----------------------------------------------------------------------------


def _measured(
    recipe: ReaderRecipe, data: OcrData, found: Sequence[Variant], folder: Path
) -> dict[str, Any]:
    """Metrics of the dense and the compressed reader side by side, and a row of every variant.

    ``accuracy`` names what ``accuracy_retention`` is the retention of.
    """
    read = {v.name: ocr.read_predictions(folder / v.file) for v in found}
    order = recipe.evaluate.ocean_order
    scored = {v.name: ocr.score(data, read[v.name], recipe.seed, order) for v in found}
    dense = scored["dense"]
    if dense.accuracy is None:
        raise ValueError(f"pages with texts expected in {recipe.data}; found none; check the data")
    warnings = []
    if dense.accuracy.value <= 0:
        warnings.append("the dense model reads nothing right here: nothing can be retained")
    rows = []
    for variant in found:
        counts = counted(variant.methods, read[variant.name])
        one = scored[variant.name]
        row: dict[str, Any] = {
            "variant": variant.name,
            "methods": [m.model_dump(mode="json") for m in variant.methods],
            **counts,
            "metrics": {n: asdict(v) for n, v in (one.metrics | _against(one, dense)).items()},
        }
        if one.accuracy is not None and not warnings:
            row["accuracy_retention"] = asdict(retention(one.accuracy, dense.accuracy))
        rows.append(row)
    warnings += [w for method in found[1].methods for w in method.warnings(rows[1])]
    return {
        "metrics": _side_by_side(rows[0], rows[1], found[1].methods, len(data.pages)),
        "accuracy": dense.accuracy.name,
        "comparison": rows,
        "warnings": warnings,
    }


def _against(compressed: ocr.Scored, dense: ocr.Scored) -> dict[str, Value]:
    """What is measured page by page against the dense model."""
    return {
        f"worst_page_delta{suffix}": worst_page_delta(compressed.distances[suffix], distances)
        for suffix, distances in dense.distances.items()
        if distances
    }


def _side_by_side(
    dense: Mapping[str, Any],
    compressed: Mapping[str, Any],
    methods: Sequence[RuntimeMethod],
    pages: int,
) -> dict[str, Any]:
    """Two rows metric by metric, what the methods used first.

    Visual tokens are left out: they are those of the page before any method, of both the same.
    """
    counts = counted_metrics(methods, compressed, pages)
    # of what methods counted, the shares of visual tokens alone have a dense value
    shares = {method.used for method in methods}
    used = {name: asdict(value) for name, value in counts.items() if name in shares}
    whole = {name: asdict(Value(1.0, "by definition", pages)) for name in used}
    if "accuracy_retention" in compressed:
        whole["accuracy_retention"] = dense["accuracy_retention"]
        used["accuracy_retention"] = compressed["accuracy_retention"]
    sides = (whole | dense["metrics"], used | compressed["metrics"])
    return {
        name: {
            "dense": {key: sides[0][name][key] for key in ("value", "ci95", "n")},
            "compressed": {key: value[key] for key in ("value", "ci95", "n")},
            "ratio": value["value"] / before if (before := sides[0][name]["value"]) else None,
            "better": metric(name).better,
            "unit": "",
            "how": value["how"],
        }
        for name, value in sides[1].items()
        if name != "visual_tokens"
    }


# ---- settings --------------------------------------------------------------------------------


def _check_same_model(folder: Path, model: str, weights: str) -> None:
    """Pages that two models read are no measurement of either."""
    if (path := folder / MODEL).is_file():
        begun = read_json(path)["model_hash"]
        if begun != weights:
            raise ValueError(
                f"what was begun in {folder} read with {model} of hash {begun[:12]}; it has "
                f"{weights[:12]} now; restore that version, or start again with --overwrite"
            )


def _facts(recipe: ReaderRecipe, device: str, pages: int, weights: str) -> dict[str, Any]:
    return {
        "method": [m.name for m in recipe.method],
        "model": recipe.model,
        "model_hash": weights,
        "data": recipe.data,
        "pages": pages,
        "seed": recipe.seed,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions_of(PACKAGES),
    }


def _header() -> list[str]:
    return [f"{name} {version}" for name, version in versions_of(PACKAGES).items()]
