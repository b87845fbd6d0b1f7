"""Runs on a reader of pages: apply run-time methods, read, compare, export, report."""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress.checkpoints.applied import Applied
from compress.checkpoints.runtime import check_dense, save_runtime
from compress.common.environment import choose_device, created, versions_of
from compress.common.files import read_json, write_json
from compress.common.output_folder import CHECKPOINT, check_apart, check_replaceable, locked
from compress.data.ocr_pages import RENDERED, OcrPage, load_pages, rendered_page
from compress.eval import ocr
from compress.eval.metrics import metric
from compress.eval.retention import retention, worst_page_delta
from compress.eval.settings import Calibration, OcrEvaluation, ReadSettings
from compress.eval.values import Value
from compress.methods.base import Calibrated, Event, RuntimeMethod
from compress.models.locate import locate
from compress.models.reading import open_prompts
from compress.models.visual import adapter_for
from compress.models.weights import stored_tensors
from compress.parallel import distributed
from compress.reports.reader import write_reader_report
from compress.runs.counting import counted, counted_metrics
from compress.runs.evaluation import PACKAGES, page_reader
from compress.runs.reading import as_known, in_batches, open_reader
from compress.runs.recipe import ReaderRecipe

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
    """What a recipe lets read, dense first; names are unique."""
    result = [Variant("dense", ()), Variant("compressed", tuple(recipe.method))]
    for method in recipe.compare:
        name = variant_name(method)
        same = sum(v.name == name or v.name.startswith(f"{name} #") for v in result)
        result.append(Variant(f"{name} #{same + 1}" if same else name, (method,)))
    return result


def calibration_name(method: RuntimeMethod) -> str:
    """What a calibration is filed under: all methods that share it have the same name for it."""
    return variant_name(method.calibrated_as())


def variant_name(method: RuntimeMethod) -> str:
    """A method and the settings that are not its defaults, as one name."""
    fields = type(method).model_fields
    changed = {k: v for k, v in method.model_dump().items() if v != fields[k].default}
    return " ".join([method.name, *(f"{key}={value}" for key, value in changed.items())])


class ReaderRun:
    """A recipe of a reader with everything that it names opened."""

    packages: Sequence[str] = PACKAGES

    def __init__(self, recipe: ReaderRecipe, folder: Path, device: str) -> None:
        settings = recipe.evaluate
        self.recipe, self.folder, self.device = recipe, folder, device
        self.data = load_pages(recipe.data, settings.samples, settings.unseen_font)
        ocr.check_accuracy(self.data)
        self.at = locate(recipe.model, "reader")
        check_dense(self.at)
        self.data = replace(self.data, pages=tuple(as_known(self.at)(self.data.pages)))
        self.model, self.processor, _ = open_reader(self.at, settings, device)
        self.variants = variants(recipe)
        self.speeds: dict[str, dict[str, Value]] = {}

    def prepare(self, *, resume: bool) -> Iterator[Event]:
        """Check that pages are read on with the same model, and that each method serves it."""
        if resume:
            self._check_same_model()
        for variant in self.variants[1:]:
            Applied(self.model, variant.methods).remove()
        yield Event("prepare", 1, 1, message=f"{self.recipe.model}: {len(self.data.pages)} pages")

    def compress(self) -> Iterator[Event]:
        """Calibrate."""
        facts = {"model": self.recipe.model, "model_hash": self.at.hash}
        distributed.from_main(lambda: write_json(self.folder / MODEL, facts))
        calibrated: dict[str, Calibrated] = {}
        if distributed.is_main():
            calibrated = yield from self._calibrations()
        calibrated = distributed.from_main(lambda: calibrated)
        self.variants = [
            replace(v, methods=tuple(_with_its_own(m, calibrated) for m in v.methods))
            for v in self.variants
        ]
        self.calibration = {name: one.facts for name, one in calibrated.items()} or None

    def measure(self) -> Generator[Event, None, dict[str, Any]]:
        """Read the pages with every variant, and compare what was read."""
        settings = self.recipe.evaluate
        distributed.from_main(lambda: (self.folder / "predictions").mkdir(exist_ok=True))
        for variant in self.variants:
            applied = Applied(self.model, variant.methods) if variant.methods else None
            times: ocr.Times = []
            parts: ocr.Parts = []
            read = page_reader(self.model, self.processor, settings, applied, parts)
            try:
                for count in ocr.predict(
                    self.data, read, settings.batch, self.folder / variant.file, times
                ):
                    yield Event(variant.name, count, len(self.data.pages))
            finally:
                if applied is not None:
                    applied.remove()
            seed = self.recipe.seed
            self.speeds[variant.name] = ocr.speed(times, seed) | ocr.split(parts, seed)
        facts = {"calibration": self.calibration, "run": self._facts()}
        return distributed.from_main(lambda: self._measured() | facts)

    def save(self, checkpoint: Path, metrics: Mapping[str, Any] | None = None) -> None:
        """Write the runtime checkpoint of the recipe's methods."""
        facts = {
            "recipe": self.recipe.model_dump(mode="json"),
            "calibration": self.calibration,
            "metrics": {} if metrics is None else metrics["metrics"],
        }
        save_runtime(
            self.model,
            self.processor,
            self.variants[1].methods,
            checkpoint,
            facts,
            base=self.at,
            reference=self.recipe.weights == "reference",
            # a run's own folder: what is there was written by the run that is resumed
            overwrite=True,
        )

    def report(self, metrics: dict[str, Any]) -> None:
        """Write the report."""
        write_reader_report(
            self.folder,
            self.data,
            self.variants,
            metrics,
            self.model,
            self.processor,
            self.recipe.evaluate.prompt,
        )

    def _check_same_model(self) -> None:
        """Pages that two models read are no measurement of either."""
        if not (path := self.folder / MODEL).is_file():
            return
        begun = read_json(path)["model_hash"]
        if begun != self.at.hash:
            raise ValueError(
                f"what was begun in {self.folder} read with {self.at.name} of hash {begun[:12]}; "
                f"it has {self.at.hash[:12]} now; restore that version, or start again with "
                "--overwrite"
            )

    def _calibrations(self) -> Generator[Event, None, dict[str, Calibrated]]:
        """Measure what methods leave open, by `calibration_name`; kept for a resumed run."""
        recipe = self.recipe
        methods = [*recipe.method, *recipe.compare]
        left_open = {calibration_name(m): m for m in methods if m.needs_calibration()}
        if not left_open:
            return {}
        path = self.folder / CALIBRATION
        if path.is_file():
            return {name: Calibrated(**one) for name, one in read_json(path).items()}
        yield Event("calibrate", 0, len(left_open))
        pages = calibration_pages(recipe.data, recipe.calibrate.pages)
        calibrated: dict[str, Calibrated] = {}
        for name, method in left_open.items():
            result = calibrated[name] = calibrate_on_pages(
                method,
                self.model,
                self.processor,
                pages,
                recipe.evaluate,
                recipe.calibrate.max_new_tokens,
            )
            settings = ", ".join(f"{knob} {value}" for knob, value in result.settings.items())
            yield Event("calibrate", len(calibrated), len(left_open), message=f"{name}: {settings}")
        write_json(path, {name: asdict(one) for name, one in calibrated.items()})
        return calibrated

    def _measured(self) -> dict[str, Any]:
        """Metrics of the dense and the compressed reader side by side, and a row of every variant.

        ``accuracy`` names what ``accuracy_retention`` is the retention of.
        """
        recipe, seed = self.recipe, self.recipe.seed
        strict = recipe.evaluate.strict
        read = {v.name: ocr.read_predictions(self.folder / v.file) for v in self.variants}
        scored = {name: ocr.score(self.data, pages, seed, strict) for name, pages in read.items()}
        dense = scored["dense"]
        if dense.accuracy is None:
            raise ValueError(
                f"pages with texts expected in {recipe.data}; found none; check the data"
            )
        warnings = []
        if dense.accuracy.value <= 0:
            warnings.append("the dense model reads nothing right here: nothing can be retained")
        rows = []
        for variant in self.variants:
            one = scored[variant.name]
            row: dict[str, Any] = {
                "variant": variant.name,
                "methods": [method.model_dump(mode="json") for method in variant.methods],
                **counted(variant.methods, read[variant.name]),
                "metrics": {n: asdict(v) for n, v in (one.metrics | _against(one, dense)).items()},
            }
            if one.accuracy is not None and dense.accuracy.value > 0:
                row["accuracy_retention"] = asdict(retention(one.accuracy, dense.accuracy))
            rows.append(row)
        for method in self.variants[1].methods:
            warnings += method.warnings(rows[1])
        read_dense, compressed = self._with_speed(rows[:2])
        chosen = recipe.evaluate.chosen
        return {
            "metrics": chosen(
                _side_by_side(
                    read_dense, compressed, self.variants[1].methods, len(self.data.pages)
                )
            ),
            "accuracy": dense.accuracy.name,
            "comparison": [row | {"metrics": chosen(row["metrics"])} for row in rows],
            "warnings": warnings,
        }

    def _with_speed(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with their pages per second and its parts, where all were read in this sitting."""
        speeds = [self.speeds[row["variant"]] for row in rows]
        return [
            row | {"metrics": row["metrics"] | {n: asdict(v) for n, v in speed.items()}}
            for row, speed in zip(rows, speeds if all(speeds) else [{}] * len(rows), strict=True)
        ]

    def _facts(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "method": [method.name for method in recipe.method],
            "model": recipe.model,
            "model_hash": self.at.hash,
            "data": recipe.data,
            "pages": len(self.data.pages),
            "seed": recipe.seed,
            "processes": distributed.processes(),
            **created(self.device),
            "versions": versions_of(PACKAGES),
        }


# ---- calibration -----------------------------------------------------------------------------


def calibrate_on_pages(
    method: RuntimeMethod,
    model: Any,
    processor: Any,
    pages: Sequence[OcrPage],
    settings: OcrEvaluation,
    max_new_tokens: int,
) -> Calibrated:
    """Let a model read pages densely, and measure what a method leaves open.

    Parameters
    ----------
    method : with open settings.
    model, processor : of :func:`compress.models.vlm.load_vlm`.
    pages : to read.
    settings : prompt, and the number of pages that are read together.
    max_new_tokens : of a page.
    """
    batches = []
    for chosen in in_batches(pages, settings.batch):
        _, inputs, errors = open_prompts(model, processor, chosen, settings.prompt)
        for error in errors.values():
            raise ValueError(
                f"pages to calibrate on should all be readable: {error}; restore or remove it"
            )
        batches.append(inputs)
    return method.calibrate(model, batches, max_new_tokens)


def calibrated_checkpoint(
    model: str,
    output: Path,
    method: RuntimeMethod,
    *,
    data: str = "builtin:pages",
    calibration: Calibration | None = None,
    read: ReadSettings | None = None,
    device: str | None = None,
    overwrite: bool = False,
) -> Calibrated:
    """Calibrate a method on pages and write a checkpoint with it; as ``compress calibrate``.

    The checkpoint refers to the model's weights and holds no copy.

    Parameters
    ----------
    model : ``builtin:NAME``, a folder or a hub id.
    output : the checkpoint's folder.
    method : with open settings, which the pages decide.
    data : rendered validation pages, or a folder whose first pages are taken.
    calibration : how many pages, and how much of each is read.
    read : prompt and number format.
    device : CUDA where there is any when None.
    overwrite : replace a checkpoint that is there.

    Raises
    ------
    ValueError, FileNotFoundError : for a model or data that cannot be used.
    FileExistsError : when the folder holds something.
    """
    check_replaceable(output, CHECKPOINT, overwrite=overwrite)
    calibration, read = calibration or Calibration(), read or ReadSettings()
    at = locate(model, "reader")
    check_apart(output, {"model": at.folder, "data": data})
    check_dense(at)
    if not method.needs_calibration():
        raise ValueError(
            f"a method with open settings is expected; {method.label()} leaves none open; apply it "
            "as it is, or choose settings that are calibrated"
        )
    with locked(output):
        network, processor, _ = open_reader(at, read, choose_device(device))
        result = calibrate_on_pages(
            method,
            network,
            processor,
            calibration_pages(data, calibration.pages),
            OcrEvaluation(**dict(read)),
            calibration.max_new_tokens,
        )
        facts = {
            "calibration": {calibration_name(method): result.facts},
            "calibrated_on": {"data": data, **calibration.model_dump()},
            "versions": versions_of(PACKAGES),
        }
        methods = [with_calibration(method, result)]
        save_runtime(
            network, processor, methods, output, facts, base=at, reference=True, overwrite=overwrite
        )
    return result


def calibration_pages(source: str, count: int) -> list[OcrPage]:
    """Pages to calibrate on: rendered ones of the validation split, or the first of a folder."""
    name = source.partition(":")[2]
    if source.startswith("builtin:") and name in RENDERED:
        kind = RENDERED[name]
        return [rendered_page(str(i), i, kind, "validation") for i in range(count)]
    return list(load_pages(source).pages[:count])


def with_calibration(method: RuntimeMethod, calibrated: Calibrated) -> RuntimeMethod:
    """The method with the settings that were measured for it, in place of those it left open."""
    return type(method)(**method.model_dump() | calibrated.settings)


def _with_its_own(method: RuntimeMethod, calibrated: Mapping[str, Calibrated]) -> RuntimeMethod:
    if not method.needs_calibration():
        return method
    return with_calibration(method, calibrated[calibration_name(method)])


# ---- measurement -----------------------------------------------------------------------------


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
    shares = {method.used for method in methods}
    counts = counted_metrics(methods, compressed, pages)
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


def forecast(recipe: ReaderRecipe, device: str) -> dict[str, Any]:
    """Predict what a recipe would do, without reading a page or writing anything.

    Returns
    -------
    ``model``, the ``parameters`` that run, the ``stored_values`` of its files (of DeepSeek-OCR's
    layout they include tensors that nothing reads), ``pages`` and ``variants``.
    """
    # of rendered pages, one of each kind stands for all
    one = recipe.evaluate.model_copy(update={"samples": 1})
    run = ReaderRun(recipe.model_copy(update={"evaluate": one}), Path(recipe.output or ""), device)
    for _ in run.prepare(resume=False):
        pass
    rendered = recipe.data.startswith("builtin:")
    count = len(run.data.pages) * (recipe.evaluate.samples if rendered else 1)
    return {
        "model": recipe.model,
        "data": recipe.data,
        "pages": count,
        "readings": count * len(run.variants),
        "family": adapter_for(run.model.config).name,
        "parameters": run.model.num_parameters(),
        "stored_values": sum(math.prod(t.shape) for t in stored_tensors(run.at.folder).values()),
        "variants": [variant.name for variant in run.variants],
    }
