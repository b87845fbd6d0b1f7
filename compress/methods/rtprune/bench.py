"""The prefill of DeepSeek-OCR, dense against RTPrune, split into its parts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from transformers import UnlimitedOcrForConditionalGeneration

from compress.bench.building import built
from compress.bench.cells import by_size, times, where, with_note
from compress.bench.rows import SEED, Dtype, Row, against, make_row
from compress.bench.suite import Benchmark
from compress.bench.timing import Bench, Ceilings, Marks, costliest, summarise_spans, time_spans
from compress.common.settings import Batch, Tokens
from compress.common.stages import watched
from compress.eval.latency import Latency
from compress.models.cache_argument import cache_in
from compress.models.deepseek_ocr_layout import TEXT, native_config
from compress.models.deepseek_ocr_views import MODES, page_tokens
from compress.models.generation import replaced_method
from compress.models.visual import text_model
from compress.models.vlm import load_vlm

if TYPE_CHECKING:
    from compress.methods.rtprune.method import RTPrune

AIM = 0.9  # of the bound of the language model, at batch 16 and more
OVERHEAD_AIM = 0.02  # of the prefill, selection and merging together
STRIDE = 64  # pixels of a visual token: patches of 16, downsampled by 4
WORD = 0  # any id of a word
READER = "builtin:reader-deepseek"
READER_SIDE, READER_STRIDE = 224, 16


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PrefillShape:
    """One prefill.

    Parameters
    ----------
    model : "deepseek-ocr" at its published size, or the built-in reader as it ships.
    mode : resolution, for the first: base and large are the paper's.
    batch : pages.
    encoded : of them, pages that the vision encoder encodes, for machines where it takes hours for
        all. The others get the same features, and count as much time. None is all.
    text : words of the prompt behind the page.
    layers : of the first model's decoder that are built, at least 2 (one dense and one of experts),
        for machines that cannot hold all; the time of the last one then counts for those that
        are missing. None is all.
    keep_tokens : of RTPrune.
    dtype : of weights and pages.
    """

    model: Literal["deepseek-ocr", "reader-deepseek"] = "deepseek-ocr"
    mode: Literal["tiny", "small", "base", "large"] = "large"
    batch: Batch = 1
    encoded: Batch | None = None
    text: Tokens = 16
    layers: Annotated[int, Field(ge=2)] | None = None
    keep_tokens: Annotated[float, Field(gt=0, lt=1)] = 0.8425
    dtype: Dtype = "float32"

    @property
    def encoded_pages(self) -> int:
        """Pages that the vision encoder encodes."""
        return min(self.encoded or self.batch, self.batch)


def default_shapes(device: str) -> list[PrefillShape]:
    """What is timed on a device where no shape is requested."""
    if torch.device(device).type == "cuda":
        return [
            PrefillShape(mode=mode, batch=batch, dtype="bfloat16")
            for mode in ("base", "large")
            for batch in (1, 4, 16, 32)
        ]
    return [
        PrefillShape(model="reader-deepseek", batch=1, text=3),
        PrefillShape(model="reader-deepseek", batch=16, text=3),
        PrefillShape(mode="base", layers=2, dtype="bfloat16"),
        PrefillShape(mode="large", layers=2, dtype="bfloat16"),
    ]


def run(
    kind: type["RTPrune"], shape: PrefillShape, bench: Bench, ceilings: Ceilings
) -> Iterator[Row]:
    """Time a prefill with and without RTPrune, in turns."""
    model = _model(shape, bench.device)
    inputs = _inputs(shape, model, bench.device)
    method = kind(keep_tokens=shape.keep_tokens)
    lengths: dict[str, int] = {}
    ways = {
        name: partial(_prefill, shape, model, inputs, way, lengths, name)
        for name, way in (("dense", None), ("rtprune", method))
    }
    built_layers = len(text_model(model).layers)
    all_layers = TEXT["num_hidden_layers"] if shape.model == "deepseek-ocr" else built_layers
    missing, share = all_layers - built_layers, shape.encoded_pages / shape.batch
    stages = {
        name: summarise_spans([parts(repeat, missing, share) for repeat in repeats])
        for name, repeats in time_spans(ways, bench).items()
    }
    profiled = costliest(lambda: ways["rtprune"](Marks(bench)), bench.device)
    facts = {
        **derived(stages, lengths),
        "aim": AIM,
        "tokens": lengths,
        "timed": f"{built_layers} of {all_layers} layers"
        + (", the last one counted for the others" if missing else "")
        + (f"; vision of {shape.encoded_pages} page(s), counted for all" if share < 1 else ""),
        "stages": {
            name: {part: asdict(latency) for part, latency in of_way.items() if part != "prefill"}
            for name, of_way in stages.items()
        },
        "graphs": False,  # what is kept decides the shapes
        "profile": {"rtprune": profiled},
    }
    sizes = asdict(shape) | {"layers": built_layers}
    whole = {name: of_way["prefill"] for name, of_way in stages.items()}
    yield make_row("rtprune", "prefill", sizes, whole, bench, facts)


def derived(
    stages: Mapping[str, Mapping[str, Latency]], lengths: Mapping[str, int]
) -> dict[str, Any]:
    """Ratios of a row.

    Parameters
    ----------
    stages : of "dense" and "rtprune"; "prefill" is the whole.
    lengths : tokens that the language model reads of a sequence, text included.

    Returns
    -------
    Of the language model ratio, bound and share of the bound; ``end_to_end`` is the ratio of the
    whole, ``end_to_end_bound`` the same if the language model reached its bound at no cost, and
    ``overhead`` the share of selection and merging in RTPrune's prefill.
    """
    dense, ours = (
        {part: latency.median for part, latency in stages[name].items()}
        for name in ("dense", "rtprune")
    )
    bound = lengths["dense"] / lengths["rtprune"]
    language = dense["language_model"]
    return {
        **against(language / ours["language_model"], bound),
        "end_to_end": dense["prefill"] / ours["prefill"],
        "end_to_end_bound": dense["prefill"] / (dense["prefill"] - language + language / bound),
        "overhead": (ours["selection"] + ours["merge"]) / ours["prefill"],
        "overhead_aim": OVERHEAD_AIM,
    }


def parts(spans: Mapping[str, float], missing: int, encoded: float = 1.0) -> dict[str, float]:
    """Milliseconds of the disjoint parts of one prefill, and of the whole.

    Parameters
    ----------
    spans : as they were marked: "merge" lies inside "selection", "last_layer" inside
        "language_model", all inside "prefill".
    missing : layers that were not built, and take as long as the last one.
    encoded : share of the pages that the vision encoder encoded; the others take as long.
    """
    more = missing * spans["last_layer"]
    vision = spans["vision"] / encoded
    merging = spans.get("merge", 0.0)
    selecting = spans.get("selection", 0.0) - merging
    language = spans["language_model"] + more
    whole = spans["prefill"] + more + vision - spans["vision"]
    return {
        "vision": vision,
        "selection": selecting,
        "merge": merging,
        "language_model": language,
        "other": whole - vision - selecting - merging - language,
        "prefill": whole,
    }


def _model(shape: PrefillShape, device: str) -> Any:
    dtype = getattr(torch, shape.dtype)
    if shape.model == "reader-deepseek":
        return load_vlm(READER, dtype)[0].to(device)
    layers = min(shape.layers or TEXT["num_hidden_layers"], TEXT["num_hidden_layers"])
    config = native_config({"num_hidden_layers": layers})
    config.image_token_id = WORD + 1
    return built(lambda: UnlimitedOcrForConditionalGeneration(config), dtype, device)


def _inputs(shape: PrefillShape, model: Any, device: str) -> dict[str, torch.Tensor]:
    """A prompt of a page and words; its pixels are noise, as the ratio is fixed."""
    side, stride = MODES[shape.mode].side, STRIDE
    if shape.model == "reader-deepseek":
        side, stride = READER_SIDE, READER_STRIDE
    visual = len(page_tokens(side // stride, 0, (1, 1)))
    ids = torch.full((shape.batch, visual + shape.text), WORD, device=device)
    ids[:, :visual] = model.config.image_token_id
    generator = torch.Generator(device).manual_seed(SEED)
    size = (shape.batch, 3, side, side)
    pixels = torch.rand(size, generator=generator, device=device) * 2 - 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.to(getattr(torch, shape.dtype)),
    }


def _prefill(
    shape: PrefillShape,
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    method: "RTPrune | None",
    lengths: dict[str, int],
    name: str,
    marks: Marks,
) -> None:
    """Read a prompt into a new cache and mark the parts; attaching is outside the marks."""
    text = text_model(model)
    with ExitStack() as stack:
        encode = _encode_first(marks, shape.encoded_pages)
        stack.enter_context(replaced_method(model.model, "get_image_features", encode))
        if method is not None:
            stack.enter_context(method.attach(model))
        # after the method's own hook, which shortens the prompt
        stack.enter_context(marks.calls("language_model", text))
        stack.enter_context(marks.calls("last_layer", text.layers[-1]))
        stack.enter_context(watched(marks.span))
        with torch.no_grad(), marks.span("prefill"):
            output = model(**inputs, use_cache=True, logits_to_keep=1)
        lengths[name] = cache_in(output).get_seq_length()


def _encode_first(marks: Marks, pages: int) -> Callable[..., Any]:
    """``get_image_features`` that encodes the first pages, and gives theirs to the others."""

    def _encode(
        original: Callable[..., Any], pixel_values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        with marks.span("vision"):
            output = original(pixel_values[:pages], *args, **kwargs)
        features = list(output.pooler_output)
        # copies, as the method prunes features once that several sequences share
        more = [features[n % pages].clone() for n in range(pages, len(pixel_values))]
        output.pooler_output = features + more
        return output

    return _encode


# ---- the benchmark and its table ---------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, with what was timed beneath."""

    def model(row: Row) -> str:
        shape = row["shape"]
        mode = f", {shape['mode']}" if shape["model"] == "deepseek-ocr" else ""
        return f"{shape['model']}{mode}, {shape['dtype']}"

    def share(row: Row, *parts: str) -> str:
        stages = row["stages"]["rtprune"]
        spent = sum(stages[part]["median"] for part in parts)
        return f"{spent / row['ms']['rtprune']['median']:.1%}"

    return with_note(
        by_size(rows, "model", "mode", "batch"),
        {
            "device": where,
            "model": model,
            "batch": lambda row: str(row["shape"]["batch"]),
            "dense prefill": times("dense"),
            "rtprune prefill": times("rtprune"),
            "language model": lambda row: f"{row['ratio']:.3f}x",
            "of its bound": lambda row: f"{row['share_of_bound']:.0%} of {row['bound']:.3f}x",
            "end to end": lambda row: f"{row['end_to_end']:.3f}x",
            "possible": lambda row: f"{row['end_to_end_bound']:.3f}x",
            "vision": lambda row: share(row, "vision"),
            "selection": lambda row: share(row, "selection"),
            "merging": lambda row: share(row, "merge"),
            "timed": lambda row: row["timed"],
        },
        "One prefill at 84.25% of the visual tokens, random weights (the reader's own where it is "
        "named). The bound is the ratio of the tokens that the language model reads; `vision`, "
        "`selection` and `merging` are shares of RTPrune's prefill. Aims, on a GPU: 90% of the "
        "bound at batch 16 and more, selection and merging together at most 2%.",
    )


def benchmark(kind: type["RTPrune"]) -> Benchmark:
    """What ``compress bench rtprune`` times."""
    smallest = "model=reader-deepseek"
    return Benchmark("rtprune", PrefillShape, smallest, default_shapes, partial(run, kind), table)
