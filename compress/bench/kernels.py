"""Each kernel on its own bytes, and the plain torch that stands in for it."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.bench.fastocr import MODELS
from compress.bench.rows import SEED, Dtype, Row, make_row
from compress.bench.timing import Bench, Ceilings, costliest, reached, time_ways
from compress.fastocr.fixation import budget
from compress.kernels.backend import takes_triton
from compress.kernels.sinkhorn import bytes_moved as sinkhorn_bytes
from compress.kernels.sinkhorn import obstacle as sinkhorn_obstacle
from compress.kernels.sinkhorn import sinkhorn, sinkhorn_reference
from compress.kernels.sparse_decode import (
    bytes_moved,
    focal_decode,
    focal_decode_reference,
    sparse_decode,
    sparse_decode_reference,
)
from compress.rtprune.transport import DUSTBIN, ITERATIONS, plan_by_pot

COPY_AIM = 0.6  # of the copy bandwidth, sparse_decode at batch 32
POT_AIM = 10.0  # times as fast as POT's torch backend, sinkhorn
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class KernelShape:
    """One call.

    Parameters
    ----------
    kernel : which one.
    model : for the attention kernels, whose heads the layer has.
    visual : tokens in the cache of a sequence, or on a page (sinkhorn).
    text : tokens behind them, of the attention kernels.
    batch : sequences or pages.
    keep : fraction of the visual tokens that is read, or kept.
    dtype : of the cache; sinkhorn computes in float32.
    """

    kernel: Literal["sparse_decode", "focal_decode", "sinkhorn"]
    model: Literal["qwen2.5-vl-3b", "qwen2.5-vl-7b", "tiny"] = "qwen2.5-vl-7b"
    visual: Annotated[int, Field(ge=2)] = 4096
    text: Annotated[int, Field(ge=0)] = 256
    batch: Count = 1
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.05
    dtype: Dtype = "float32"


def default_shapes(device: str) -> list[KernelShape]:
    """What is timed where nobody asks for a shape."""
    cuda = torch.device(device).type == "cuda"
    dtype: Dtype = "bfloat16" if cuda else "float32"
    attention = [
        KernelShape(kernel=kernel, visual=visual, batch=batch, dtype=dtype)
        for kernel in ("sparse_decode", "focal_decode")
        for visual in (4096, 16384)
        for batch in ((1, 8, 32) if cuda else (1, 8))
    ]
    pages = [
        KernelShape(kernel="sinkhorn", visual=visual, keep=0.8425, batch=batch)
        for visual in (256, 400)  # DeepSeek-OCR's base and large
        for batch in ((1, 16, 64) if cuda else (1, 16))
    ]
    return [*attention, *pages]


def run(shape: KernelShape, bench: Bench, ceilings: Ceilings) -> Iterator[Row]:
    """Time the kernel where it runs, and plain torch, in turns."""
    ways, moved = (_sinkhorn if shape.kernel == "sinkhorn" else _decode)(shape, bench.device)
    timing = time_ways(ways, bench)
    ms = {name: latency.median for name, latency in timing.ms.items()}
    ours = next(iter(ways))
    others = {name: value for name, value in ms.items() if name != ours}
    speed = {name: reached(moved, value) for name, value in ms.items()}
    facts: dict[str, Any] = {
        "ratio": min(others.values()) / ms[ours] if others else None,
        "aim": POT_AIM if shape.kernel == "sinkhorn" else COPY_AIM,
        "ways": {name: value / ms[ours] for name, value in others.items()},
        "ours": ours,
        "bytes": moved,
        "gb_per_s": speed,
        "share_of_copy": {name: value / ceilings.copy for name, value in speed.items()},
        "graphs": timing.graphs,
        "profile": {ours: costliest(ways[ours], bench.device)},
    }
    yield make_row("kernels", shape.kernel, asdict(shape), timing.ms, bench, facts)


def _decode(shape: KernelShape, device: str) -> tuple[dict[str, Callable[[], Any]], int]:
    sizes = MODELS[shape.model]
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    dim, length = sizes["hidden_size"] // heads, shape.visual + shape.text
    generator = torch.Generator(device).manual_seed(SEED)
    options: Any = {
        "generator": generator,
        "device": device,
        "dtype": getattr(torch, shape.dtype),
    }
    query = torch.randn(shape.batch, heads, 1, dim, **options)
    key, value = (torch.randn(shape.batch, kv_heads, length, dim, **options) for _ in range(2))
    kept, scaling = budget(shape.keep, shape.visual), dim**-0.5
    focal = shape.kernel == "focal_decode"
    moved = bytes_moved(
        batch=shape.batch,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        itemsize=key.element_size(),
        picked=0 if focal else kept,
        dense=length if focal else shape.text,
        focal=focal,
    )
    ways: dict[str, Callable[[], Any]] = {}

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)

    triton = takes_triton(shape.kernel, query.device)
    if focal:
        if triton:
            ways["triton"] = lambda: focal_decode(query, key, value, None, scaling)
        ways["torch"] = lambda: focal_decode_reference(query, key, value, None, scaling)
        ways["dense sdpa"] = sdpa
        return ways, moved
    scores = torch.rand(shape.batch, shape.visual, generator=generator, device=device)
    rows = scores.topk(kept, dim=1).indices
    text = (shape.visual, length)
    if triton:
        ways["triton"] = lambda: sparse_decode(query, key, value, rows, None, text, None, scaling)
    ways["torch"] = lambda: sparse_decode_reference(
        query, key, value, rows, None, text, None, scaling
    )
    ways["dense sdpa"] = sdpa
    return ways, moved


def _sinkhorn(shape: KernelShape, device: str) -> tuple[dict[str, Callable[[], Any]], int]:
    """The kernel on a GPU, POT's torch backend as it goes from page to page, and plain torch."""
    kept = max(1, int(shape.visual * shape.keep))
    pruned = shape.visual - kept
    generator = torch.Generator(device).manual_seed(SEED)
    size = (shape.batch, kept, pruned)
    scores = torch.rand(size, generator=generator, device=device) * 2 - 1
    rows, columns = (torch.full((shape.batch,), n, device=device) for n in (kept, pruned))

    def pot() -> None:
        for page in scores:
            plan_by_pot(page, DUSTBIN, ITERATIONS)

    ways: dict[str, Callable[[], Any]] = {}
    if takes_triton("sinkhorn", scores.device, sinkhorn_obstacle(pruned)):
        ways["triton"] = lambda: sinkhorn(scores, rows, columns, DUSTBIN, ITERATIONS)
    ways["pot"] = pot
    ways["torch"] = lambda: sinkhorn_reference(scores, rows, columns, DUSTBIN, ITERATIONS)
    return ways, sinkhorn_bytes(rows, columns)
