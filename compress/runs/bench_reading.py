"""A whole folder of pages, read densely and with every method that serves the model."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.bench.cells import times, where, with_note
from compress.bench.reading_parts import PARTS, in_parts, marked_parts
from compress.bench.rows import Dtype, Row, make_row
from compress.bench.suite import Benchmark
from compress.bench.timing import Bench, Ceilings, Marks, summarise_spans, time_spans
from compress.checkpoints.applied import Applied
from compress.checkpoints.runtime import check_dense
from compress.data.ocr_pages import OcrPage, rendered_page
from compress.data.page_files import find_pages
from compress.data.pages import LINE, PAGE, SQUARE_PAGE
from compress.eval.latency import Latency, peak_of
from compress.eval.settings import OcrEvaluation, ReadSettings
from compress.eval.tables import Cell
from compress.methods.base import RuntimeMethod
from compress.methods.registry import RUNTIME_METHODS, benchmarks, runtime_method
from compress.models.locate import locate
from compress.runs.reader import calibrate_on_pages, calibration_pages, with_calibration
from compress.runs.reading import by_tokens, in_batches, open_reader, read_batch, token_counter

FILE_ORDER = 16  # pages of a batch where they are not sorted
CALIBRATION_PAGES = 4
KINDS = (PAGE, LINE, SQUARE_PAGE, PAGE)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FolderShape:
    """A folder that is read.

    Parameters
    ----------
    model : a reader, as ``compress read`` takes it.
    folder : of images and PDFs; rendered pages of three sizes when None.
    pages : that are read, the first of the folder.
    batch_tokens : visual tokens of a batch, padding counted.
    new_tokens : longest text of a page.
    dtype : of the weights.
    """

    model: str = "builtin:reader-qwen"
    folder: str | None = None
    pages: Annotated[int, Field(ge=1)] = 32
    batch_tokens: Annotated[int, Field(ge=1)] = 5_000
    new_tokens: Annotated[int, Field(ge=1)] = 64
    dtype: Dtype = "float32"


def default_shapes(device: str) -> list[FolderShape]:
    """What is timed where no shape is requested."""
    return [FolderShape(model=f"builtin:reader-{name}") for name in ("qwen", "deepseek")]


def pages_of(shape: FolderShape) -> list[OcrPage]:
    """The pages that are read, each opened when it is its turn."""
    if shape.folder is not None:
        return list(itertools.islice(find_pages([shape.folder]), shape.pages))
    kinds = itertools.islice(itertools.cycle(KINDS), shape.pages)
    return [rendered_page(str(i), i, kind, "test") for i, kind in enumerate(kinds)]


def served(model: Any, processor: Any, shape: FolderShape) -> dict[str, tuple[RuntimeMethod, ...]]:
    """Every method that serves the model, as it is by default, and those that stack, by name."""
    methods: list[RuntimeMethod] = []
    for name in RUNTIME_METHODS:
        method = runtime_method({"name": name})
        try:
            if method.needs_calibration():
                pages = calibration_pages("builtin:pages", CALIBRATION_PAGES)
                calibrated = calibrate_on_pages(
                    method, model, processor, pages, OcrEvaluation(), shape.new_tokens
                )
                method = with_calibration(method, calibrated)
            Applied(model, [method]).remove()
            methods.append(method)
        except ValueError:  # it does not serve the model
            continue
    ways: dict[str, tuple[RuntimeMethod, ...]] = {method.name: (method,) for method in methods}
    for several in itertools.permutations(methods, 2):
        name = " + ".join(sorted(method.name for method in several))
        try:
            Applied(model, several).remove()
            ways.setdefault(name, several)
        except ValueError:
            continue
    return ways


def run(shape: FolderShape, bench: Bench, ceilings: Ceilings) -> Iterator[Row]:
    """Read the folder in all ways, taking turns, and once more for the memory of each."""
    settings = ReadSettings(dtype=shape.dtype, max_new_tokens=shape.new_tokens)
    at = locate(shape.model, "reader")
    check_dense(at)
    model, processor, _ = open_reader(at, settings, bench.device)
    pages = pages_of(shape)
    count = token_counter(model, processor)
    sorted_batches = list(by_tokens(pages, shape.batch_tokens, count))
    methods: dict[str, tuple[RuntimeMethod, ...]] = {"dense": ()}
    methods |= served(model, processor, shape)
    ways = {
        name: partial(_read, model, processor, sorted_batches, settings, chosen)
        for name, chosen in methods.items()
    }
    in_order = list(in_batches(pages, FILE_ORDER))
    ways["dense, in file order"] = partial(_read, model, processor, in_order, settings, ())
    spans_of = time_spans(ways, bench)
    weights = [*model.parameters(), *model.buffers()]
    ms = {
        name: summarise_spans([in_parts(spans) | {"page": spans["folder"]} for spans in repeats])
        for name, repeats in spans_of.items()
    }
    for name, way in ways.items():
        page, dense = (_a_page(ms[of]["page"], len(pages)) for of in (name, "dense"))
        facts = {
            "ratio": dense.median / page.median,
            "pages_per_second": 1e3 / page.median,
            "parts": {part: ms[name][part].median / len(pages) for part in PARTS},
            "memory_mb": peak_of(partial(way, Marks(bench)), weights, bench.device).megabytes,
            "model": shape.model,
            "model_hash": at.hash,
        }
        sizes = asdict(shape) | {"way": name}
        yield make_row("reading", "folder", sizes, {"page": page}, bench, facts)


def _a_page(folder: Latency, pages: int) -> Latency:
    """Milliseconds of a page, on average, from those of a folder."""
    bounds = {k: t and t / pages for k, t in asdict(folder).items() if k != "n"}
    return Latency(**bounds, n=folder.n)


def _read(
    model: Any,
    processor: Any,
    batches: Sequence[Sequence[OcrPage]],
    settings: ReadSettings,
    methods: Sequence[RuntimeMethod],
    marks: Marks,
) -> None:
    with ExitStack() as stack:
        if methods:
            stack.enter_context(Applied(model, methods))
        stack.enter_context(marked_parts(model, marks))
        stack.enter_context(torch.no_grad())
        with marks.span("folder"):
            for batch in batches:
                for reading in read_batch(model, processor, batch, settings):
                    if reading.error:  # its time would be none of reading
                        raise ValueError(
                            f"every page should be read to be timed; got {reading.error}; choose "
                            "pages, lengths or a device with which it can be"
                        )


def table(rows: Sequence[Row]) -> str:
    """A line for each way, with what was timed beneath."""
    columns: dict[str, Cell] = {
        "device": where,
        "model": lambda row: f"{row['model']}, {row['dtype']}",
        "way": lambda row: row["way"],
        "ms a page": times("page"),
        "pages/s": lambda row: f"{row['pages_per_second']:.2f}",
        "of dense": lambda row: f"{row['ratio']:.2f}x",
        "peak MB": lambda row: f"{row['memory_mb']:,.0f}",
        **{part: partial(_part, part) for part in PARTS},
    }
    sizes = "; ".join(
        dict.fromkeys(
            f"{row['pages']} pages, {row['batch_tokens']:,} visual tokens a batch, at most "
            f"{row['new_tokens']} new ones"
            for row in rows
        )
    )
    return with_note(
        rows,
        columns,
        f"A whole folder, rendered pages of three sizes unless the row says otherwise: {sizes}. "
        f"`in file order` is batches of {FILE_ORDER}; all others are sorted within the budget of "
        "tokens. Methods are as they are by default, which may be to leave prompts alone that are "
        "too short to gain. Parts are ms a page: opening a page is in `preprocess`, the prefill is "
        "without the encoder. Memory is weights and live tensors, on a CPU without scratch inside "
        "operators.",
    )


def _part(part: str, row: Row) -> str:
    return f"{row['parts'][part]:.1f}"


BENCHMARK = Benchmark(
    "reading",
    FolderShape,
    "pages=2,new_tokens=2",
    default_shapes,
    run,
    table,
    repeats=3,
)


def all_benchmarks() -> dict[str, Benchmark]:
    """What ``compress bench`` times, by name: methods, kernels, and whole folders."""
    return benchmarks() | {BENCHMARK.name: BENCHMARK}
