"""``compress bench``: time what the methods promise, against the best dense way, in one run."""

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from compress.environment import choose_device, device_name, versions_of
from compress.eval.latency import Latency, summarise
from compress.eval.tables import append_row
from compress.fastocr.calibration import default_count
from compress.fastocr.gaze import MovingGaze
from compress.fastocr.state import Counts, Pages, Request
from compress.models.deepseek_ocr_views import view_tokens
from compress.models.visual import VisualLayout

PACKAGES = ("compress-models", "torch", "transformers", "triton")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DecodeShape:
    """The attention of one decode step: that of Qwen2.5-VL-7B unless told otherwise.

    Parameters
    ----------
    visual, text : tokens in the cache of a sequence.
    batch : sequences.
    layers, heads, kv_heads, dim : of the text model.
    keep_visual : fraction of the visual tokens in the fixation.
    dtype : of the cache.
    """

    visual: int
    text: int = 256
    batch: int = 1
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    dim: int = 128
    keep_visual: float = 0.05
    dtype: str = "float32"

    @property
    def focal(self) -> int:
        """Layers that attend to all."""
        return default_count(self.layers)

    @property
    def byte_bound(self) -> float:
        """Ratio of the cached bytes that the dense step and ours must read: what is possible."""
        length = self.visual + self.text
        kept = round(self.keep_visual * self.visual) + self.text
        dense = self.layers * length
        return dense / (self.focal * length + (self.layers - self.focal) * kept)


def decode_attention(
    shapes: Sequence[DecodeShape], *, repeats: int = 15, device: str | None = None, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Time the attention of a decode step, dense and with FastOCR, taking turns: A B A B.

    Ours goes through the method's own code: choice of the fixation, reuse and counting are in it.
    Dense is the faster of two ways: torch's scaled_dot_product_attention with grouped heads, and
    two matrix products with the query heads of a key head side by side.

    Parameters
    ----------
    shapes : to time; a cache of every layer is held in memory.
    repeats : timed steps of each way.
    device : CUDA where there is any when None.
    seed : of the random keys, values and queries, whose values do not matter.

    Yields
    ------
    A row per shape: ``shape``, ``ms`` (per way: median, p20, p80), ``speedup``, ``byte_bound``,
    ``share_of_bound``, device, versions, date.
    """
    where = choose_device(device)
    for shape in shapes:
        generator = torch.Generator(where).manual_seed(seed)
        ways = _ways(shape, where, generator)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(repeats + 3):
            for name, step in ways.items():
                elapsed = _timed(step, where)
                if repeat >= 3:  # the first ones warm up
                    times[name].append(elapsed)
        found: dict[str, Latency] = {name: summarise(values) for name, values in times.items()}
        dense = min(found["sdpa"].median, found["matmul"].median)
        speedup = dense / found["fastocr"].median
        yield {
            "bench": "fastocr",
            "shape": asdict(shape),
            "ms": {name: asdict(latency) for name, latency in found.items()},
            "speedup": speedup,
            "byte_bound": shape.byte_bound,
            "share_of_bound": speedup / shape.byte_bound,
            "device": device_name(where),
            "threads": torch.get_num_threads(),
            "seed": seed,
            "versions": versions_of(PACKAGES),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def _ways(
    shape: DecodeShape, device: str, generator: torch.Generator
) -> dict[str, Callable[[], Any]]:
    length = shape.visual + shape.text
    options: Any = {
        "generator": generator,
        "device": device,
        "dtype": getattr(torch, shape.dtype),
    }
    query = torch.randn(shape.batch, shape.heads, 1, shape.dim, **options)
    size = (shape.batch, shape.kv_heads, length, shape.dim)
    caches = [
        (torch.randn(size, **options), torch.randn(size, **options)) for _ in range(shape.layers)
    ]
    scaling = shape.dim**-0.5
    group = shape.heads // shape.kv_heads

    def sdpa() -> None:
        for key, value in caches:
            scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)

    def matmul() -> None:
        packed = query.reshape(shape.batch, shape.kv_heads, group, shape.dim)
        for key, value in caches:
            ((packed @ key.transpose(2, 3)).float() * scaling).softmax(-1).to(value.dtype) @ value

    side = max(1, round(shape.visual**0.5))
    grid = view_tokens(0, -(-shape.visual // side), side, False)[: shape.visual]
    layout = VisualLayout(
        torch.arange(shape.visual), grid, torch.zeros(shape.visual, dtype=torch.long)
    )
    pages = Pages.of([layout] * shape.batch, length, torch.device(device))
    # spread over the depth, as calibration tends to choose
    focal = [round((k + 0.5) * shape.layers / shape.focal) for k in range(shape.focal)]
    gaze = MovingGaze(
        pages,
        shape.layers,
        keep=shape.keep_visual,
        focal=focal,
        warmup=2,
        dilate=0,
        min_mass=0.0,
        reuse=True,
        periphery=0,
    )
    request = Request(pages, gaze, Counts(shape.layers))

    def fastocr() -> None:
        request.start_step()
        for layer, (key, value) in enumerate(caches):
            request.attend(layer, query, key, value, None, scaling)

    return {"sdpa": sdpa, "matmul": matmul, "fastocr": fastocr}


@torch.no_grad()
def _timed(step: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call."""
    if torch.device(device).type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def bench_fastocr(
    visual: Sequence[int],
    *,
    batch: int,
    dtype: str,
    repeats: int,
    results: Path | None,
    device: str | None,
) -> Iterator[dict[str, Any]]:
    """:func:`decode_attention` of Qwen2.5-VL-7B's shape, its rows appended to a file.

    Raises
    ------
    ValueError : for an unknown dtype or a number of tokens below 1.
    """
    if dtype not in DTYPES or min(visual, default=0) < 1:
        raise ValueError(
            f"visual tokens above 0 and a dtype among {', '.join(DTYPES)} are expected; got "
            f"{list(visual)} and {dtype!r}; correct them"
        )
    shapes = [DecodeShape(tokens, batch=batch, dtype=dtype) for tokens in visual]
    for row in decode_attention(shapes, repeats=repeats, device=device):
        if results is not None:
            append_row(results, row)
        yield row
