"""A decode step over many visual tokens: its attention alone, and the text model end to end."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from compress.bench.attention import MODELS, ModelName, head_sizes, sdpa, two_products
from compress.bench.building import built, sharing_weights
from compress.bench.cells import by_size, profile, times, where, with_note
from compress.bench.rows import SEED, Dtype, Row, against, make_row, newest
from compress.bench.suite import Benchmark
from compress.bench.timing import Bench, Ceilings, costliest, reached, time_ways
from compress.common.settings import Batch, Count
from compress.eval.tables import Cell, markdown
from compress.methods.fastocr.choosing import SummaryPolicy, group_count, sign_cost
from compress.methods.fastocr.fixation import budget
from compress.methods.fastocr.hooks import attached
from compress.methods.fastocr.policy import FocalPolicy
from compress.methods.fastocr.recall import default_count
from compress.methods.fastocr.state import Counts, DecodeState
from compress.methods.fastocr.visual_tokens import VisualTokens
from compress.models.cache_argument import cache_argument
from compress.models.deepseek_ocr_views import view_tokens
from compress.models.visual import VisualLayout, text_model

AIM = 0.7  # of the byte bound, of attention alone
TWO_PRODUCTS = "compress_bench_two_products"  # of the dense attention, in transformers' registry
DYNAMIC = ", dynamic cache"  # of a dense way end to end: as plain generate has it
EAGER = "fastocr, eager"  # beside its graph, on a GPU


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DecodeShape:
    """One decode step.

    Parameters
    ----------
    part : "attention" of all layers alone, or "end_to_end": the text model and its head.
    model : whose sizes the text model has.
    visual, text : tokens in the cache of a sequence.
    batch : sequences.
    layers : that are built and timed, for machines that cannot hold all; None is all. End to end,
        the time of the layers is scaled to all, and that of the head is not.
    keep_visual : fraction of the visual tokens in the fixation, or that a layer opens.
    choose : as the method has it; of summaries there are the square root of the visual tokens.
    dtype : of weights and cache.
    without : a dense way that is left out, for machines that cannot hold what it needs: SDPA for
        grouped heads copies keys and values for every query head on a CPU. None times all.
    """

    part: Literal["attention", "end_to_end"] = "attention"
    model: ModelName = "qwen2.5-vl-7b"
    visual: Count = 4096
    text: Count = 256
    batch: Batch = 1
    layers: Count | None = None
    keep_visual: Annotated[float, Field(gt=0, le=1)] = 0.05
    choose: Literal["focal", "summaries", "signs"] = "focal"
    dtype: Dtype = "float32"
    without: Literal["sdpa"] | None = None

    @property
    def built_layers(self) -> int:
        """Layers that are timed."""
        return min(self.layers or self.all_layers, self.all_layers)

    @property
    def all_layers(self) -> int:
        """Layers of the model."""
        return MODELS[self.model]["num_hidden_layers"]

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key heads, and the size of one."""
        return head_sizes(self.model)

    @property
    def focal(self) -> tuple[int, ...]:
        """Layers that attend to all: spread over the depth, as calibration tends to choose."""
        layers = self.built_layers
        count = default_count(layers)
        return tuple(round((k + 0.5) * layers / count) for k in range(count))

    def cached_bytes(self, sparse: bool) -> int:
        """Bytes of keys and values that a step must read, of the layers that are timed."""
        kept = budget(self.keep_visual, self.visual)
        if not sparse or self.choose == "focal":
            return self.bytes_of(len(self.focal) if sparse else self.built_layers, kept)
        groups = group_count("auto", self.visual)
        if self.choose == "signs":
            kept += sign_cost(self.visual, self.heads[2], groups)
        return self.bytes_of(0, kept + groups)

    def bytes_of(self, dense: int, kept: int) -> int:
        """The same where some layers read all, and the others so many visual tokens."""
        rows = dense * self.visual + (self.built_layers - dense) * kept
        rows += self.built_layers * self.text
        _, kv_heads, dim = self.heads
        itemsize = getattr(torch, self.dtype).itemsize
        return int(rows * self.batch * kv_heads * 2 * dim * itemsize)

    @property
    def byte_bound(self) -> float:
        """Ratio of the cached bytes that the dense step and ours must read: what is possible."""
        return self.cached_bytes(sparse=False) / self.cached_bytes(sparse=True)

    def facts(self) -> dict[str, Any]:
        """All sizes, for a row."""
        heads, kv_heads, dim = self.heads
        sizes = {"heads": heads, "kv_heads": kv_heads, "dim": dim}
        return asdict(self) | {"layers": self.built_layers} | sizes


def default_shapes(device: str) -> list[DecodeShape]:
    """What is timed on a device where no shape is requested."""
    if torch.device(device).type == "cuda":
        return [
            DecodeShape(part=part, model=model, visual=visual, batch=batch, dtype="bfloat16")
            for part in ("attention", "end_to_end")
            for model in ("qwen2.5-vl-3b", "qwen2.5-vl-7b")
            for visual in (256, 1024, 4096, 16384)
            for batch in (1, 8, 32)
        ]
    small: Any = {"part": "end_to_end", "model": "qwen2.5-vl-3b", "layers": 7, "dtype": "bfloat16"}
    return [
        *(DecodeShape(visual=visual) for visual in (2048, 8192, 32768)),
        *(
            DecodeShape(model=model, visual=visual, choose=choose)
            for model in ("qwen2.5-vl-3b", "qwen2.5-vl-7b")
            for visual in (4096, 16384)
            for choose in ("summaries", "signs")
        ),
        *(DecodeShape(visual=n, **small) for n in (256, 1024, 4096, 16384)),
    ]


def run(shape: DecodeShape, bench: Bench, ceilings: Ceilings) -> Iterator[Row]:
    """Time a step of dense attention's best ways and of FastOCR, in turns."""
    if shape.part == "attention":
        yield _attention_row(shape, bench, ceilings)
    else:
        yield _end_to_end_row(shape, bench)


def _caches(shape: DecodeShape, device: str, room: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random keys and values of every layer, with room for new tokens."""
    generator = torch.Generator(device).manual_seed(SEED)
    _, kv_heads, dim = shape.heads
    size = (shape.batch, kv_heads, shape.visual + shape.text + room, dim)
    options: Any = {
        "generator": generator,
        "device": device,
        "dtype": getattr(torch, shape.dtype),
    }
    return [
        (torch.randn(size, **options), torch.randn(size, **options))
        for _ in range(shape.built_layers)
    ]


def _policy(shape: DecodeShape, tokens: VisualTokens, layers: int) -> FocalPolicy | SummaryPolicy:
    if shape.choose != "focal":
        signs = shape.choose == "signs"
        return SummaryPolicy(tokens, keep=shape.keep_visual, by_signs=signs)
    return FocalPolicy(tokens, layers, keep=shape.keep_visual, focal=shape.focal)


def _state(shape: DecodeShape, device: str, counts: Counts | None = None) -> DecodeState:
    """Of a prompt that has just been read: visual tokens of a square page first, then text."""
    side = max(1, round(shape.visual**0.5))
    grid = view_tokens(0, -(-shape.visual // side), side, False)[: shape.visual]
    first_image = torch.zeros(shape.visual, dtype=torch.long)
    layout = VisualLayout(torch.arange(shape.visual), grid, first_image)
    length = shape.visual + shape.text
    tokens = VisualTokens.of([layout] * shape.batch, length, torch.device(device))
    policy = _policy(shape, tokens, shape.built_layers)
    return DecodeState(tokens, policy, counts or Counts(shape.built_layers))


# ---- attention alone ---------------------------------------------------------------------------


def _attention_row(shape: DecodeShape, bench: Bench, ceilings: Ceilings) -> Row:
    ways = _attention_ways(shape, bench.device)
    timing = time_ways(ways, bench)
    ms = {name: latency.median for name, latency in timing.ms.items()}
    dense = min((name for name in ms if name != "fastocr"), key=ms.__getitem__)
    moved = {name: shape.cached_bytes(sparse=name == "fastocr") for name in (dense, "fastocr")}
    speed = {name: reached(count, ms[name]) for name, count in moved.items()}
    facts: dict[str, Any] = {
        **against(ms[dense] / ms["fastocr"], shape.byte_bound),
        "aim": AIM,
        "dense": dense,
        "bytes": moved,
        "gb_per_s": speed,
        "share_of_copy": {name: rate / ceilings.copy for name, rate in speed.items()},
        "graphs": timing.graphs,
        "profile": {"fastocr": costliest(ways["fastocr"], bench.device)},
    }
    return make_row("fastocr", "attention", shape.facts(), timing.ms, bench, facts)


def _attention_ways(shape: DecodeShape, device: str) -> dict[str, Callable[[], Any]]:
    """The attention of all layers: dense in two ways, and through the method's own code.

    The choice of the fixation, its reuse and the counting are part of the last.
    """
    heads, _, dim = shape.heads
    caches = _caches(shape, device, room=0)
    options: Any = {"device": device, "dtype": getattr(torch, shape.dtype)}
    query = torch.randn(shape.batch, heads, 1, dim, **options)
    scaling = dim**-0.5

    state = _state(shape, device)

    def all_layers(attention: Callable[..., Any]) -> None:
        for key, value in caches:
            attention(query, key, value, scaling)

    def fastocr() -> None:
        state.start_step()
        for layer, (key, value) in enumerate(caches):
            state.attend(layer, query, key, value, None, scaling)

    ways: dict[str, Callable[[], Any]] = {
        "sdpa": partial(all_layers, sdpa),
        "matmul": partial(all_layers, two_products),
        "fastocr": fastocr,
    }
    return {name: way for name, way in ways.items() if name != shape.without}


# ---- end to end --------------------------------------------------------------------------------


def _end_to_end_row(shape: DecodeShape, bench: Bench) -> Row:
    with ExitStack() as stack:
        ways = _end_to_end_ways(shape, bench.device, stack)
        timing = time_ways(ways, bench)
        eager = time_ways(ways, bench, eager=True).ms if timing.graphs else timing.ms
        profiled = costliest(ways["fastocr"], bench.device)
    ms = {name: latency.median for name, latency in timing.ms.items()}
    for name, latency in eager.items():
        if name.endswith(DYNAMIC):  # a cache that moves is no part of a graph in generate
            ms[name] = latency.median
        elif name == "fastocr" and timing.graphs:  # as generate runs it
            ms[EAGER] = latency.median
    head = ms["head"]
    scale = shape.all_layers / shape.built_layers
    steps = {name: scale * value + head for name, value in ms.items() if name != "head"}
    dense = min((name for name in steps if "fastocr" not in name), key=steps.__getitem__)
    facts: dict[str, Any] = {
        **against(steps[dense] / steps["fastocr"], end_to_end_bound(shape)),
        "dense": dense,
        "timed": f"{shape.built_layers} of {shape.all_layers} layers, scaled, and the head",
        "step_ms": steps,
        "tokens_per_second": {n: shape.batch * 1e3 / value for n, value in steps.items()},
        "graphs": timing.graphs,
        "eager_ms": {name: latency.median for name, latency in eager.items()},
        "profile": {"fastocr": profiled},
    }
    return make_row("fastocr", "end_to_end", shape.facts(), timing.ms, bench, facts)


def end_to_end_bound(shape: DecodeShape) -> float:
    """Ratio of all bytes that a step of the whole model must read, weights included."""
    sizes = MODELS[shape.model]
    hidden, between = sizes["hidden_size"], sizes["intermediate_size"]
    heads, kv_heads, dim = shape.heads
    layer = 2 * hidden * dim * (heads + kv_heads) + 3 * hidden * between
    whole = shape.all_layers * layer + hidden * sizes["vocab_size"]
    weights = whole * getattr(torch, shape.dtype).itemsize
    scale = shape.all_layers / shape.built_layers
    dense, sparse = (weights + scale * shape.cached_bytes(sparse=flag) for flag in (False, True))
    return dense / sparse


class _FilledLayer(DynamicLayer):
    """A layer's cache that is full but for the last row, where every step writes its token.

    So a step can be repeated, and nothing grows: what FastOCR's cache does in all steps but those
    in which it takes more room.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = key, value
        self.dtype, self.device = key.dtype, key.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new token; ``kwargs`` is what transformers 5.24 hands to layers by name."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens without the new one."""
        return int(self.keys.shape[2]) - 1


class _ConcatenatingLayer(_FilledLayer):
    """The same, copied in every step as transformers' dynamic cache is, but not kept."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values with the new token behind them."""
        return (
            torch.cat([self.keys[:, :, :-1], key_states], 2),
            torch.cat([self.values[:, :, :-1], value_states], 2),
        )


def _model(shape: DecodeShape) -> Qwen2_5_VLForConditionalGeneration:
    """The text model at its size; the vision tower, which is not run, is tiny."""
    sizes: dict[str, Any] = MODELS[shape.model] | {"num_hidden_layers": shape.built_layers}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    dim = shape.heads[2]
    rope["mrope_section"] = [dim // 2 - 2 * (dim * 3 // 16), dim * 3 // 16, dim * 3 // 16]
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": sizes["hidden_size"],
        "fullatt_block_indexes": [0],
    }
    ids = {name: number for number, name in enumerate(("bos_token_id", "eos_token_id"))}
    text = sizes | ids | {"rope_parameters": rope, "pad_token_id": 0}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=2,
        video_token_id=3,
        vision_start_token_id=4,
        vision_end_token_id=5,
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _two_products(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    return two_products(query, key, value, scaling).transpose(1, 2).contiguous(), None


def dense_backends(device: str, dtype: str) -> dict[str, str]:
    """Dense attention that can run here, with its names in transformers' registry."""
    names = {"sdpa": "sdpa", "matmul": TWO_PRODUCTS}
    half = dtype != "float32" and torch.device(device).type == "cuda"
    if half and importlib.util.find_spec("flash_attn"):
        names["flash"] = "flash_attention_2"
    return names


def _end_to_end_ways(
    shape: DecodeShape, device: str, stack: ExitStack
) -> dict[str, Callable[[], Any]]:
    """The text model's step with each attention, on the same weights and caches; and the head."""
    AttentionInterface.register(TWO_PRODUCTS, _two_products)
    AttentionMaskInterface.register(TWO_PRODUCTS, sdpa_mask)
    dtype = getattr(torch, shape.dtype)
    model = built(lambda: _model(shape), dtype, device)
    caches = _caches(shape, device, room=1)
    length = shape.visual + shape.text
    embeds = torch.randn(shape.batch, 1, MODELS[shape.model]["hidden_size"], device=device)
    embeds = embeds.to(dtype)
    places = torch.full((4, shape.batch, 1), length, device=device)  # text, and Qwen's three

    def step_of(network: Any, cache: DynamicCache) -> Callable[[], Any]:
        text = text_model(network)
        inputs = {"inputs_embeds": embeds, "position_ids": places, cache_argument(text): cache}
        return lambda: text(**inputs)

    ways: dict[str, Callable[[], Any]] = {}
    for name, implementation in dense_backends(device, shape.dtype).items():
        if name == shape.without:
            continue
        network = sharing_weights(model)
        network.set_attn_implementation({"text_config": implementation})
        ways[name] = step_of(network, _cache(caches))
        ways[name + DYNAMIC] = step_of(network, _cache(caches, _ConcatenatingLayer))
    handle = stack.enter_context(attached(model, partial(_policy, shape)))
    cache = _cache(caches)
    state = _state(shape, device, handle.counts)
    handle.states[cache] = state
    sparse = step_of(model, cache)

    def fastocr() -> None:
        state.length = length  # the step before is taken back
        sparse()

    hidden = embeds.clone()
    return {**ways, "fastocr": fastocr, "head": lambda: model.lm_head(hidden)}


def _cache(
    caches: Sequence[tuple[torch.Tensor, torch.Tensor]], layer: type[_FilledLayer] = _FilledLayer
) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [layer(key, value) for key, value in caches]
    return cache


# ---- the crossover -----------------------------------------------------------------------------


def crossovers(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """From how many visual tokens on FastOCR with focal layers is faster end to end, by device.

    The smallest number that was measured from which on every measurement, of all batches and
    models, was at least as fast as dense. Where the largest was not, it is the next number, as what
    lies beyond was not measured; 0 where none was slower.

    Parameters
    ----------
    rows : of this benchmark; those of attention alone are left out, those of layers that choose by
        themselves, and those of a step that was measured again.
    """
    table: dict[str, dict[str, Any]] = {}
    focal = [row for row in rows if row["shape"].get("choose", "focal") == "focal"]
    steps = newest([row for row in focal if row["part"] == "end_to_end"])
    for device in dict.fromkeys(row["device"] for row in steps):
        here = [row for row in steps if row["device"] == device]
        sizes = sorted({row["shape"]["visual"] for row in here})
        slow = [r["shape"]["visual"] for r in here if r["ratio"] < 1]
        faster = [size for size in sizes if size > max(slow, default=0)]
        table[device] = {
            "min_visual": (faster[0] if faster else sizes[-1] + 1) if slow else 0,
            "measured": sizes,
            "batch": sorted({row["shape"]["batch"] for row in here}),
            "models": sorted({row["shape"]["model"] for row in here}),
            "dtypes": sorted({row["shape"]["dtype"] for row in here}),
            "threads": sorted({row["threads"] for row in here}),
            "date": max(row["date"] for row in here),
        }
    return table


# ---- the benchmark and its table ---------------------------------------------------------------


def _rate(way: str) -> Cell:
    rates = "tokens_per_second"
    return lambda row: f"{row[rates][way]:.3g}" if way in row[rates] else "–"


def _speed(row: Row) -> str:
    return f"{row['gb_per_s']['fastocr']:.1f}, {row['share_of_copy']['fastocr']:.0%}"


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, with what was timed beneath."""
    rows = by_size(rows, "model", "dtype", "visual", "batch")
    attention = [row for row in rows if row["part"] == "attention"]
    whole = [row for row in rows if row["part"] == "end_to_end"]
    common: dict[str, Cell] = {
        "device": where,
        "sizes of": lambda row: f"{row['shape']['model']}, {row['shape']['dtype']}",
        "choose": lambda row: row["shape"].get("choose", "focal"),
        "batch": lambda row: str(row["shape"]["batch"]),
        "visual tokens": lambda row: f"{row['shape']['visual']:,}",
    }
    parts = []
    if attention:
        parts.append(
            with_note(
                attention,
                {
                    **common,
                    "layers": lambda row: (
                        f"{row['shape']['layers']} of "
                        f"{MODELS[row['shape']['model']]['num_hidden_layers']}"
                    ),
                    "dense, SDPA": times("sdpa"),
                    "dense, two products": times("matmul"),
                    "fastocr": times("fastocr"),
                    "speed-up": lambda row: f"{row['ratio']:.2f}x",
                    "of the byte bound": lambda row: (
                        f"{row['share_of_bound']:.0%} of {row['bound']:.2f}x"
                    ),
                    "GB/s, of copying": _speed,
                    "costliest operators": profile,
                },
                "Attention of one decode step through these layers, 5% of the visual tokens read, "
                "256 tokens of text, a seventh of the layers focal, or none where summaries or "
                "signs choose, the method's own work included. The speed-up is over the faster "
                "dense way; the byte bound is the ratio of the cached bytes that must be read.",
            )
        )
    if whole:
        parts.append(
            with_note(
                whole,
                {
                    **common,
                    "layers timed": lambda row: row["timed"],
                    "plain generate": _rate("sdpa" + DYNAMIC),
                    "dense, SDPA": _rate("sdpa"),
                    "dense, two products": _rate("matmul"),
                    "fastocr": _rate("fastocr"),
                    "speed-up": lambda row: f"{row['ratio']:.3f}x",
                    "possible": lambda row: f"{row['bound']:.3f}x",
                },
                "Tokens per second of the whole text model, end to end, with random weights. Plain "
                "generate is SDPA with transformers' dynamic cache, which every step copies; a "
                "dash there was not timed. The others write the new token in place, as generate "
                "does under FastOCR. The speed-up is over the fastest dense way; possible is the "
                "ratio of all bytes that a step must read, weights included. "
                + " ".join(_crossover(device, entry) for device, entry in crossovers(rows).items()),
            )
        )
    return "\n\n".join([*parts, _bytes_table()])


def _bytes_table() -> str:
    """What a step must read by each policy, counted and not measured."""
    lines = []
    for model in ("qwen2.5-vl-3b", "qwen2.5-vl-7b"):
        for visual in (4096, 16384):
            shape = DecodeShape(model=model, visual=visual, dtype="bfloat16")
            layers, focal = shape.built_layers, len(shape.focal)
            kept = budget(shape.keep_visual, visual)
            dense = shape.bytes_of(layers, 0)
            line = {"sizes of": model, "visual tokens": f"{visual:,}", "dense": _mib(dense)}
            own = {
                f"{choose} that choose": replace(shape, choose=choose).cached_bytes(sparse=True)
                for choose in ("summaries", "signs")
            }
            for policy, read in {
                "focal, as published": shape.cached_bytes(sparse=True),
                "focal, three layers dense": shape.bytes_of(focal + 3, kept),
                "focal, 64 summaries": shape.bytes_of(focal, kept + 64),
                **own,
            }.items():
                line[policy] = f"{_mib(read)}, {dense / read:.1f}x fewer"
            lines.append(line)
    return (
        f"{markdown(lines)}\n\nKeys and values that a decode step must read of one sequence in "
        f"bfloat16, counted: {shape.text} tokens of text, 5% of the visual tokens, a seventh of "
        "the layers focal; a summary is one token, and as many as the square root of the visual "
        "tokens are read where layers choose; signs are the tokens that take as many bytes."
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _crossover(device: str, entry: Mapping[str, Any]) -> str:
    least, most = entry["min_visual"], entry["measured"][-1]
    if least > most:
        return f"On {device} FastOCR was never faster throughout, up to {most:,} visual tokens."
    return f"On {device} FastOCR is faster from {least:,} visual tokens on."


BENCHMARK = Benchmark(
    "fastocr",
    DecodeShape,
    "model=tiny,visual=64,text=8",
    default_shapes,
    run,
    table,
    crossovers,
)
