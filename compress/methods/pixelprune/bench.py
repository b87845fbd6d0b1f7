"""The prefill of the built-in Qwen2.5-VL reader, dense against PixelPrune, split into its parts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.bench.cells import by_size, times, where, with_note
from compress.bench.rows import SEED, Dtype, Row, against, make_row
from compress.bench.suite import Benchmark
from compress.bench.timing import Bench, Ceilings, Marks, summarise_spans, time_spans
from compress.common.stages import watched
from compress.data.pages import DOCUMENT, PAGE, page
from compress.models.reading import page_prompts
from compress.models.visual import text_model
from compress.models.vlm import load_vlm

if TYPE_CHECKING:
    from compress.methods.pixelprune.method import PixelPrune

READER = "builtin:reader-qwen"
PAGES = {"page": PAGE, "document": DOCUMENT}


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PrefillShape:
    """One prefill of clean rendered pages.

    Parameters
    ----------
    page : 208x384 pixels with 312 visual tokens, or a document, 512x640 with 1,280.
    batch : pages.
    threshold : of PixelPrune.
    dtype : of weights and pages.
    """

    page: Literal["page", "document"] = "page"
    batch: Annotated[int, Field(ge=1)] = 1
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dtype: Dtype = "float32"


def default_shapes(device: str) -> list[PrefillShape]:
    """What is timed where no shape is requested."""
    return [
        PrefillShape(page=page, batch=batch) for page in ("page", "document") for batch in (1, 8)
    ]


def run(
    kind: type["PixelPrune"], shape: PrefillShape, bench: Bench, ceilings: Ceilings
) -> Iterator[Row]:
    """Time a prefill with and without PixelPrune, in turns."""
    model, processor = load_vlm(READER, getattr(torch, shape.dtype))
    model.to(bench.device)
    form = replace(PAGES[shape.page], wear=0.0)
    pages = [page(SEED, index, form, "validation").image for index in range(shape.batch)]
    inputs = page_prompts(model, processor, pages)
    method = kind(threshold=shape.threshold)
    counted: list[dict[str, Any]] = []
    ways = {
        name: partial(_prefill, model, inputs, way, counted)
        for name, way in (("dense", None), ("pixelprune", method))
    }
    stages = {
        name: summarise_spans([parts(spans) for spans in repeats])
        for name, repeats in time_spans(ways, bench).items()
    }
    facts = {
        **derived(stages, method.count(counted)["units_kept"]),
        "units": counted[0]["total"],
        "stages": {
            name: {part: asdict(latency) for part, latency in of_way.items() if part != "prefill"}
            for name, of_way in stages.items()
        },
        "graphs": False,  # what is kept decides the shapes
    }
    whole = {name: of_way["prefill"] for name, of_way in stages.items()}
    yield make_row("pixelprune", "prefill", asdict(shape), whole, bench, facts)


def parts(spans: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of the disjoint parts of one prefill, and of the whole."""
    named = {name: spans.get(name, 0.0) for name in ("encoder", "selection", "language_model")}
    return named | {"other": spans["prefill"] - sum(named.values()), "prefill": spans["prefill"]}


def derived(stages: Mapping[str, Mapping[str, Any]], kept: float) -> dict[str, Any]:
    """Ratios of a row.

    Parameters
    ----------
    stages : of "dense" and "pixelprune"; "prefill" is the whole.
    kept : share of the units.

    Returns
    -------
    Of the encoder ratio, bound and share of the bound, which attention inside an image exceeds;
    ``end_to_end`` is the ratio of the whole, ``overhead`` the share of the selection in it.
    """
    dense, ours = (
        {part: latency.median for part, latency in stages[name].items()}
        for name in ("dense", "pixelprune")
    )
    return {
        **against(dense["encoder"] / ours["encoder"], 1 / kept),
        "kept": kept,
        "language_model": dense["language_model"] / ours["language_model"],
        "end_to_end": dense["prefill"] / ours["prefill"],
        "overhead": ours["selection"] / ours["prefill"],
    }


def _prefill(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    method: "PixelPrune | None",
    counted: list[dict[str, Any]],
    marks: Marks,
) -> None:
    """Read a prompt into a new cache and mark the parts; attaching is outside the marks."""
    with ExitStack() as stack:
        handle = None if method is None else stack.enter_context(method.attach(model))
        # after the method's own hooks, which shorten the prompt
        stack.enter_context(marks.calls("encoder", model.model.visual))
        stack.enter_context(marks.calls("language_model", text_model(model)))
        stack.enter_context(watched(marks.span))
        with torch.no_grad(), marks.span("prefill"):
            model(**inputs, use_cache=True, logits_to_keep=1)
        if handle is not None:
            counted.append(handle.facts())


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, with what was timed beneath."""
    return with_note(
        by_size(rows, "page", "batch", "threshold"),
        {
            "device": where,
            "page": lambda row: f"{row['shape']['page']}, {row['shape']['dtype']}",
            "batch": lambda row: str(row["shape"]["batch"]),
            "threshold": lambda row: f"{row['shape']['threshold']:g}",
            "patches kept": lambda row: f"{row['kept']:.1%}",
            "dense prefill": times("dense"),
            "pixelprune prefill": times("pixelprune"),
            "encoder": lambda row: f"{row['ratio']:.2f}x",
            "of its bound": lambda row: f"{row['share_of_bound']:.0%} of {row['bound']:.2f}x",
            "language model": lambda row: f"{row['language_model']:.2f}x",
            "end to end": lambda row: f"{row['end_to_end']:.2f}x",
            "selection": lambda row: f"{row['overhead']:.1%}",
        },
        f"One prefill of {READER} on clean rendered pages: a page has 312 visual tokens, a "
        "document, larger than what the reader was trained on, 1,280. The bound is the ratio of "
        "the patches that the encoder reads; `selection` is its share of PixelPrune's prefill.",
    )


def benchmark(kind: type["PixelPrune"]) -> Benchmark:
    """What ``compress bench pixelprune`` times."""
    return Benchmark(
        "pixelprune", PrefillShape, "page=page", default_shapes, partial(run, kind), table
    )
