"""Times, ceilings and profiles of ways to do a thing, on a CPU or a GPU."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from compress.eval.latency import Latency, summarise, taking_turns

Ways = Mapping[str, Callable[[], Any]]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OPERATORS = 4  # of a profile, the costliest


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each way, and whether CUDA graphs were replayed: for all ways, or for none.

    A way that waits for the device or decides on the CPU cannot be captured; the others then do
    without a graph as well, so that the comparison stays one of like with like.
    """

    ms: dict[str, Latency]
    graphs: bool


@dataclass(frozen=True)
class Bench:
    """Where and how often things are timed.

    Parameters
    ----------
    device : that runs them.
    repeats : timed calls of each way.
    clock : on a CPU, in :data:`CLOCKS`. "cpu" is the time that the process was running: the
        wall time on an idle machine, but for shared caches and memory; for one thread only.
    """

    device: str
    repeats: int
    clock: str = "wall"

    def __post_init__(self) -> None:
        threads = torch.get_num_threads()
        if self.clock not in CLOCKS or (self.clock == "cpu" and (self.cuda or threads > 1)):
            raise ValueError(
                f"a clock among {', '.join(CLOCKS)} is expected, cpu for one thread of a CPU; got "
                f"clock={self.clock!r} with {threads} threads on {self.device}; use wall, or set "
                "OMP_NUM_THREADS=1"
            )

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return torch.device(self.device).type == "cuda"

    @property
    def now(self) -> Callable[[], float]:
        """The clock, in seconds."""
        return CLOCKS[self.clock]


def time_ways(ways: Ways, bench: Bench, eager: bool = False) -> Timing:
    """Time ways in turns, as CUDA graphs where all of them can be captured, unless ``eager``."""
    captured = _captured(ways) if bench.cuda and not eager else None
    warmup = min(3, 1 + bench.repeats // 4)
    ms = taking_turns(
        captured or ways, bench.device, repeats=bench.repeats, warmup=warmup, clock=bench.now
    )
    return Timing(ms, captured is not None)


@torch.no_grad()
def _captured(ways: Ways) -> dict[str, Callable[[], Any]] | None:
    """Each way as the replay of a graph; None where one of them cannot be captured."""
    graphs: dict[str, Callable[[], Any]] = {}
    for name, way in ways.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries and Triton set themselves up outside the graph
            for _ in range(3):
                way()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                way()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        graphs[name] = graph.replay
    return graphs


class Marks:
    """Named spans of one call, on the clock of the CPU or as events of the GPU's stream.

    Spans may lie inside each other; a name that comes more than once is summed up.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure what happens inside."""
        begin = self.now()
        yield
        self.spans.append((name, begin, self.now()))

    def now(self) -> Any:
        """Return this moment, for :meth:`add`."""
        if not self.bench.cuda:
            return self.bench.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, begin: Any) -> None:
        """A span from ``begin``, a moment of :meth:`now`, to now."""
        self.spans.append((name, begin, self.now()))

    @contextmanager
    def calls(self, name: str, module: torch.nn.Module) -> Iterator[None]:
        """Measure each call of a module inside, behind the hooks that it has."""
        began: list[Any] = []
        with (
            module.register_forward_pre_hook(lambda *_: began.append(self.now())),
            module.register_forward_hook(lambda *_: self.add(name, began.pop())),
        ):
            yield

    def milliseconds(self) -> dict[str, float]:
        """The sum of each name's spans; waits for the GPU."""
        if self.bench.cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for name, begin, end in self.spans:
            span = begin.elapsed_time(end) if self.bench.cuda else (end - begin) * 1e3
            totals[name] = totals.get(name, 0.0) + span
        return totals


@torch.no_grad()
def time_spans(
    ways: Mapping[str, Callable[[Marks], Any]], bench: Bench
) -> dict[str, list[dict[str, float]]]:
    """Milliseconds of the spans that each way marks, one mapping a repeat, taking turns."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    warmup = min(2, 1 + bench.repeats // 4)
    for repeat in range(warmup + bench.repeats):
        for name, way in ways.items():
            marks = Marks(bench)
            way(marks)
            if repeat >= warmup:
                times[name].append(marks.milliseconds())
    return times


def summarise_spans(repeats: Sequence[Mapping[str, float]]) -> dict[str, Latency]:
    """:func:`compress.eval.latency.summarise` of each span; one that is missing took no time."""
    names = dict.fromkeys(name for repeat in repeats for name in repeat)
    return {name: summarise([repeat.get(name, 0.0) for repeat in repeats]) for name in names}


@torch.no_grad()
def costliest(way: Callable[[], Any], device: str) -> list[dict[str, Any]]:
    """Where a way's time goes: its costliest operators with their shares, by torch's profiler."""
    # read by the profiler's library when it is first used, whose log (errors too, where there is no
    # GPU) goes past Python's stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cuda = torch.device(device).type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as profiler:
        way()
        if cuda:
            torch.cuda.synchronize()
    kind = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {event.key: getattr(event, kind) for event in profiler.key_averages()}
    total = sum(times.values())
    ranked = sorted(times.items(), key=lambda item: -item[1])[:OPERATORS]
    return [{"operator": name, "share": round(t / total, 4)} for name, t in ranked if total]


# ---- ceilings --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the device can do at best.

    Parameters
    ----------
    copy : GB/s, a byte that is read and written counted twice.
    rate : TFLOP/s of a square matrix product, by dtype.
    ms : of the two.
    shapes : what was copied and multiplied.
    """

    copy: float
    rate: dict[str, float]
    ms: dict[str, Latency]
    shapes: dict[str, int]


def measure_ceilings(bench: Bench, dtypes: Sequence[str]) -> Ceilings:
    """Copy bandwidth and matrix rates of a device.

    Parameters
    ----------
    bench : on a GPU the copy is far larger than its caches; on a CPU than a core's share of them.
    dtypes : of the matrices.
    """
    device = bench.device
    size, side = (2**30, 8192) if bench.cuda else (2**27, 1024)
    source = torch.empty(size, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    ways: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    for name in dtypes:
        matrix = torch.randn(side, side, device=device).to(getattr(torch, name))
        ways[name] = lambda m=matrix: m @ m  # type: ignore[misc]
    ms = taking_turns(ways, device, repeats=bench.repeats, clock=bench.now)
    rate = {name: 2 * side**3 / ms[name].median / 1e9 for name in dtypes}
    shapes = {"copy_bytes": size, "matrix_side": side}
    return Ceilings(reached(2 * size, ms["copy"].median), rate, ms, shapes)


def reached(moved: float, milliseconds: float) -> float:
    """GB/s.

    >>> reached(3e9, 1000.0)
    3.0
    """
    return moved / milliseconds / 1e6
