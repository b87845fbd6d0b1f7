"""Each kernel against the time that its bytes take, and against other ways to the same result.

Where no kernel runs, as on a CPU, its plain-torch reference is timed in its place.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from ot.bregman import sinkhorn_log
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from torch.nn.functional import pad

from compress.bench.attention import ModelName, head_sizes, sdpa, two_products
from compress.bench.cells import interval, profile, where, with_note
from compress.bench.rows import SEED, Dtype, Row, against, make_row
from compress.bench.suite import Benchmark
from compress.bench.timing import Bench, Ceilings, Ways, costliest, reached, time_ways
from compress.common.settings import Batch, Count, NonNegative
from compress.kernels import sinkhorn as transport
from compress.kernels import sparse_decode as attention
from compress.kernels import summaries as groups_of
from compress.kernels import topk as choice
from compress.kernels.backend import use_triton

COPY_AIM = 0.6  # of the copy bandwidth, sparse_decode at batch 32, on a GPU
TOPK_AIM = 4.0  # times as fast as torch's topk with what is needed beside it, on a GPU
POT_AIM = 10.0  # times as fast as POT's torch backend, sinkhorn, on a GPU
DUSTBIN, ITERATIONS = 0.2, 100  # of sinkhorn
GROUPS = 64  # of summaries, a key head


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class KernelShape:
    """One call.

    Parameters
    ----------
    kernel : which one.
    model : whose heads the layer has, of the attention kernels.
    visual : tokens in the cache of a sequence, or tokens of a page that may be pruned (sinkhorn).
    text : tokens behind them, of the attention kernels.
    batch : sequences or pages.
    keep : fraction of the visual tokens that is read (sparse_decode), left out of the groups
        (summaries), chosen (top_rows), or kept (sinkhorn).
    dtype : of the cache; top_rows and sinkhorn compute in float32.
    """

    kernel: Literal["sparse_decode", "focal_decode", "summaries", "top_rows", "sinkhorn"] = (
        "sparse_decode"
    )
    model: ModelName = "qwen2.5-vl-7b"
    visual: Annotated[Count, Field(ge=2)] = 4096
    text: NonNegative = 256
    batch: Batch = 1
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.05
    dtype: Dtype = "float32"


def default_shapes(device: str) -> list[KernelShape]:
    """What is timed on a device where no shape is requested."""
    cuda = torch.device(device).type == "cuda"
    dtype: Dtype = "bfloat16" if cuda else "float32"
    decode: list[Any] = ["sparse_decode", "focal_decode", "summaries", "top_rows"]
    return [
        *(
            KernelShape(kernel=kernel, visual=visual, batch=batch, dtype=dtype)
            for kernel in decode
            for visual in (4096, 16384)
            for batch in ((1, 8, 32) if cuda else (1, 8))
        ),
        *(
            KernelShape(kernel="sinkhorn", visual=visual, keep=0.8425, batch=batch)
            for visual in (256, 400)  # of DeepSeek-OCR's base and large
            for batch in (1, 16)
        ),
    ]


@dataclass(frozen=True)
class _Task:
    """What is timed of a kernel.

    Parameters
    ----------
    ways : by name; the first is ours, "triton", or "torch" where no kernel runs.
    moved : bytes that each way must move.
    aim : of the share of the copy bandwidth, or of the ratio.
    """

    ways: Ways
    moved: dict[str, int]
    aim: float

    @property
    def ours(self) -> str:
        """The way that does the work where it runs."""
        return next(iter(self.ways))


def run(shape: KernelShape, bench: Bench, ceilings: Ceilings) -> Iterator[Row]:
    """Time the kernel, or its reference, and the other ways, in turns."""
    tasks = {"sinkhorn": _sinkhorn, "summaries": _summaries, "top_rows": _top_rows}
    task = tasks.get(shape.kernel, _decode)(shape, bench.device)
    timing = time_ways(task.ways, bench)
    ms = {name: latency.median for name, latency in timing.ms.items()}
    ours = task.ours
    best = min((name for name in ms if name not in ("triton", "torch")), key=ms.__getitem__)
    speed = {name: reached(moved, ms[name]) for name, moved in task.moved.items()}
    facts: dict[str, Any] = {
        **against(ms[best] / ms[ours], task.moved[best] / task.moved[ours]),
        "aim": task.aim,
        "ours": ours,
        "best": best,
        "bytes": task.moved,
        "gb_per_s": speed,
        "share_of_copy": {name: value / ceilings.copy for name, value in speed.items()},
        "graphs": timing.graphs,
        "profile": {ours: costliest(task.ways[ours], bench.device)},
    }
    yield make_row("kernels", shape.kernel, asdict(shape), timing.ms, bench, facts)


def _ours(
    kernel: str,
    device: torch.device,
    why_not: str | None,
    pair: tuple[Callable[..., Any], Callable[..., Any]],
    *inputs: Any,
) -> dict[str, Callable[[], Any]]:
    """A kernel, where it runs, and the plain torch that stands in for it."""
    fast, plain = (partial(way, *inputs) for way in pair)
    return ({"triton": fast} if use_triton(kernel, device, why_not) else {}) | {"torch": plain}


def _decode(shape: KernelShape, device: str) -> _Task:
    """The attention of one layer, against two ways of attending to the whole cache."""
    heads, kv_heads, dim = head_sizes(shape.model)
    length = shape.visual + shape.text
    generator = torch.Generator(device).manual_seed(SEED)
    options: Any = {
        "generator": generator,
        "device": device,
        "dtype": getattr(torch, shape.dtype),
    }
    query = torch.randn(shape.batch, heads, 1, dim, **options)
    key, value = (torch.randn(shape.batch, kv_heads, length, dim, **options) for _ in range(2))
    kept, scaling = math.ceil(shape.keep * shape.visual - 1e-9), dim**-0.5
    scores = torch.rand(shape.batch, shape.visual, generator=generator, device=device)
    rows, text = scores.topk(kept, dim=1).indices.int(), (shape.visual, length)

    moved = partial(
        attention.bytes_moved,
        batch=shape.batch,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        itemsize=key.element_size(),
    )
    cache, why_not = (query, key, value), attention.why_unsupported(query, key, value)
    pair: Any = attention.sparse_decode, attention.sparse_decode_reference
    others: Any = rows, None, text, None, scaling
    own = moved(picked=kept, dense=shape.text)
    if shape.kernel == "focal_decode":
        pair, others = (attention.focal_decode, attention.focal_decode_reference), (None, scaling)
        own = moved(picked=0, dense=length, focal=True)
    ways = _ours(shape.kernel, query.device, why_not, pair, *cache, *others)
    dense: Ways = {
        name: partial(way, *cache, scaling)
        for name, way in (("sdpa", sdpa), ("matmul", two_products))
    }
    whole = moved(picked=0, dense=length)
    bytes_of = dict.fromkeys(ways, own) | dict.fromkeys(dense, whole)
    return _Task({**ways, **dense}, bytes_of, COPY_AIM)


def _summaries(shape: KernelShape, device: str) -> _Task:
    """The summaries of one layer without a fixation, against new means of all other tokens."""
    _, kv_heads, dim = head_sizes(shape.model)
    generator = torch.Generator(device).manual_seed(SEED)
    options: Any = {"generator": generator, "device": device}
    size = (shape.batch, kv_heads, shape.visual)
    key, value = (
        torch.randn(*size, dim, dtype=getattr(torch, shape.dtype), **options) for _ in range(2)
    )
    member = torch.randint(GROUPS, size, **options)
    groups = torch.arange(GROUPS + 1, device=device)[:, None]

    def sums(member: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        share = (member[:, :, None] == groups[:-1]).to(key.dtype)
        return (share @ key).float(), (share @ value).float(), share.float().sum(3)

    kept = math.ceil(shape.keep * shape.visual - 1e-9)
    scores = torch.rand(shape.batch, shape.visual, **options)
    index = scores.topk(kept, dim=1).indices

    def means_of_the_others() -> tuple[torch.Tensor, ...]:
        others = member.scatter(2, index[:, None].expand(-1, kv_heads, -1), GROUPS)
        keys, values, sizes = sums(others)
        count = sizes.clamp(min=1)[..., None]
        return (keys / count).to(key.dtype), (values / count).to(key.dtype), sizes.log()

    inputs = key, value, index.int(), index, None, member, sums(member)
    why_not = attention.why_unsupported(key[:, :, :1], key, value)
    pair = groups_of.summaries, groups_of.summaries_reference
    ways = _ours("summaries", key.device, why_not, pair, *inputs)
    ways["from_all"] = means_of_the_others
    moved = groups_of.bytes_moved(
        batch=shape.batch,
        kv_heads=kv_heads,
        dim=dim,
        itemsize=key.element_size(),
        kept=kept,
        groups=GROUPS,
    )
    whole = shape.batch * kv_heads * shape.visual * (2 * dim * key.element_size() + 8)
    return _Task(ways, dict.fromkeys(ways, moved) | {"from_all": whole}, COPY_AIM)


def _top_rows(shape: KernelShape, device: str) -> _Task:
    """The choice that one layer's weights make, against torch's, whose lists have no order."""
    kept = math.ceil(shape.keep * shape.visual - 1e-9)
    generator = torch.Generator(device).manual_seed(SEED)
    size = (shape.batch, shape.visual + shape.text)
    # over as many orders of magnitude as attention
    weights = torch.randn(size, generator=generator, device=device).mul(3).softmax(1)
    tokens = torch.arange(shape.visual, device=device).repeat(shape.batch, 1)
    rows = tokens.int()
    index = torch.zeros(shape.batch, kept, dtype=torch.long, device=device)
    budgets = torch.full((shape.batch,), kept, dtype=torch.int32, device=device)
    inputs = weights, rows, None, budgets, index, index.int()

    def topk() -> None:
        index.copy_(weights.gather(1, tokens).topk(kept, dim=1, sorted=False).indices)
        rows.gather(1, index)

    pair = choice.top_rows, choice.top_rows_reference
    ways = _ours("top_rows", weights.device, choice.why_unsupported(rows), pair, *inputs)
    ways["topk"] = topk
    moved = choice.bytes_moved(shape.batch, shape.visual, kept)
    return _Task(ways, dict.fromkeys(ways, moved), TOPK_AIM)


def _sinkhorn(shape: KernelShape, device: str) -> _Task:
    """The transport of a batch of pages, against POT from page to page."""
    kept = max(1, int(shape.visual * shape.keep))
    pruned = shape.visual - kept
    generator = torch.Generator(device).manual_seed(SEED)
    size = (shape.batch, kept, pruned)
    scores = torch.rand(size, generator=generator, device=device) * 2 - 1
    rows, columns = (torch.full((shape.batch,), n, device=device) for n in (kept, pruned))

    def pot(numpy: bool) -> None:
        for page in scores:
            _by_pot(page, numpy)

    problem = scores, rows, columns, DUSTBIN, ITERATIONS
    pair = transport.sinkhorn, transport.sinkhorn_reference
    ways = _ours("sinkhorn", scores.device, transport.why_unsupported(pruned), pair, *problem)
    ways["pot"] = partial(pot, numpy=False)
    if not scores.is_cuda:
        ways["pot_numpy"] = partial(pot, numpy=True)
    return _Task(ways, dict.fromkeys(ways, transport.bytes_moved(rows, columns)), POT_AIM)


def _by_pot(scores: torch.Tensor, numpy: bool) -> torch.Tensor:
    """The plan of one page ``(rows, columns)`` by POT, on its torch or its NumPy backend."""
    rows, columns = scores.shape
    total = rows + columns
    source, target = scores.new_ones(rows + 1), scores.new_ones(columns + 1)
    source[-1], target[-1] = columns, rows
    problem: list[Any] = [source / total, target / total, -pad(scores, (0, 1, 0, 1), value=DUSTBIN)]
    if numpy:
        problem = [part.cpu().numpy() for part in problem]
    plan = sinkhorn_log(*problem, 1.0, numItermax=ITERATIONS, stopThr=0, warn=False)
    return torch.as_tensor(plan).to(scores)[:-1, :-1] * total


# ---- the benchmark and its table ---------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, with what was timed beneath."""

    def sizes(row: Row) -> str:
        shape = row["shape"]
        if row["part"] == "sinkhorn":
            return f"{shape['visual']} tokens a page, {shape['keep']:.2%} kept"
        if row["part"] == "top_rows":
            return f"{shape['visual']:,} visual tokens, {shape['keep']:.0%} chosen"
        verb = {"sparse_decode": "read", "summaries": "left out"}.get(row["part"])
        listed = f", {shape['keep']:.0%} {verb}" if verb else ""
        return f"{shape['model']}, {shape['dtype']}, {shape['visual']:,} visual tokens{listed}"

    def ours(row: Row) -> str:
        return f"{row['ours']} {interval(row['ms'][row['ours']])}"

    def others(row: Row) -> str:
        left = (name for name in row["ms"] if name != row["ours"])
        return "; ".join(f"{name} {interval(row['ms'][name])}" for name in left)

    def rate(row: Row) -> str:
        return f"{row['gb_per_s'][row['ours']]:.3g}, {row['share_of_copy'][row['ours']]:.1%}"

    return with_note(
        rows,
        {
            "device": where,
            "kernel": lambda row: f"`{row['part']}`",
            "sizes": sizes,
            "batch": lambda row: str(row["shape"]["batch"]),
            "ours": ours,
            "others": others,
            "over the best": lambda row: f"{row['ratio']:.2f}x",
            "possible": lambda row: f"{row['bound']:.2f}x",
            "GB/s, of the byte bound": rate,
            "costliest operators": profile,
        },
        "One call of each kernel, of one layer where it is attention; `torch` is the plain torch "
        "that stands in for the kernel where no GPU is. `sdpa` and `matmul` attend to the whole "
        "cache; `from_all` sums up all other tokens again; `topk` is torch's, with the gathering "
        "before and behind it; `pot` goes from page to page. The byte "
        "bound is the time in which the bytes that a call cannot do without would be copied; "
        "`sinkhorn` adds up its scores 200 times, and is bounded by that long before. Aims, on a "
        f"GPU: `sparse_decode` {COPY_AIM:.0%} of the byte bound at batch 32, `top_rows` "
        f"{TOPK_AIM:g}x `topk`, `sinkhorn` {POT_AIM:g}x POT's torch backend.",
    )


BENCHMARK = Benchmark(
    "kernels", KernelShape, "model=tiny,visual=60,text=8", default_shapes, run, table
)
