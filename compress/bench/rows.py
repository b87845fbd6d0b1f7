"""The rows of a benchmark: what they have in common, and the shapes that are asked for."""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeVar, get_args

import torch
from pydantic import TypeAdapter, ValidationError

from compress.bench.timing import Bench, Ceilings
from compress.common.environment import device_name, versions_of
from compress.common.settings import explained
from compress.eval.latency import Latency

Row = dict[str, Any]
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
PACKAGES = ("compress-models", "torch", "transformers", "diffusers", "pot", "triton")
SEED = 0  # of weights, keys and pixels: random, as latency does not depend on their values
S = TypeVar("S")


def parse_shape(text: str, kind: type[S]) -> S:
    """A shape from ``key=value,key=value``; what is left out has its default."""
    values: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value) or key in values:
            raise ValueError(
                f"--shape should be such as visual=4096,batch=8, each key once; got {text!r}"
            )
        values[key] = value
    adapter = TypeAdapter(kind)
    known = list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        raise ValueError(f"--shape {text}: {explained(error, known)}; correct it") from error


def make_row(
    bench: str,
    part: str,
    shape: Mapping[str, Any],
    ms: Mapping[str, Latency],
    run: Bench,
    facts: Mapping[str, Any],
) -> Row:
    """A row: what was timed, on what, with which versions, and what follows from it.

    Parameters
    ----------
    bench, part : which benchmark, and which of its measurements.
    shape : sizes.
    ms : of every way.
    run : where it ran, by which clock.
    facts : of this part alone; ratios among them.
    """
    return {
        "bench": bench,
        "part": part,
        "shape": dict(shape),
        "ms": {name: asdict(latency) for name, latency in ms.items()},
        **facts,
        "device": device_name(run.device),
        "clock": "cuda events" if run.cuda else run.clock,
        "threads": torch.get_num_threads(),
        "seed": SEED,
        "versions": versions_of(PACKAGES),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def newest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each cell: what was timed, at which sizes, on what and by which clock.

    Earlier ones stay in their file; no table shows them.
    """
    latest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        shape = {key: size for key, size in row["shape"].items() if size is not None}
        cell = (row[fact] for fact in ("part", "device", "threads", "clock"))
        latest[*cell, json.dumps(shape, sort_keys=True)] = row
    return list(latest.values())


def against(ratio: float, bound: float) -> dict[str, float]:
    """A ratio of dense over ours, what it can be at most, and how much of that it is."""
    return {"ratio": ratio, "bound": bound, "share_of_bound": ratio / bound}


def ceiling_rows(bench: str, ceilings: Ceilings, run: Bench) -> list[Row]:
    """The two ceilings as rows of their own, beside those of the benchmark that they bound."""
    shape: dict[str, Any] = {"bytes": ceilings.shapes["copy_bytes"]}
    facts = {"gb_per_s": ceilings.copy}
    rows = [make_row(bench, "copy", shape, {"copy": ceilings.ms["copy"]}, run, facts)]
    for dtype, rate in ceilings.rate.items():
        shape = {"side": ceilings.shapes["matrix_side"], "dtype": dtype}
        facts = {"tflop_per_s": rate}
        rows.append(make_row(bench, "matrix", shape, {"matrix": ceilings.ms[dtype]}, run, facts))
    return rows
