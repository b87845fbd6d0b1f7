"""Time and memory of a forward pass, measured so that two models can be compared."""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass over ``n`` repeats.

    ``low`` and ``high`` bound the median with at least 95% confidence, by order statistics and
    without an assumption about the distribution; None when ``n`` is too small for that (below 6).
    """

    p20: float
    median: float
    p80: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Memory:
    """Peak memory of one forward pass in MB (1e6 bytes), weights included, and how it was found."""

    megabytes: float
    how: str


def summarise(milliseconds: list[float]) -> Latency:
    """Median, 20th and 80th percentile of the times of repeats, and an interval of the median."""
    times = np.sort(np.asarray(milliseconds, dtype=np.float64))
    if len(times) == 0:
        raise ValueError("a latency needs at least 1 repeat; got none; raise repeats")
    p20, median, p80 = (float(value) for value in np.percentile(times, [20, 50, 80]))
    # P(fewer than k of n values lie under the true median) = Binomial(n, 1/2)
    rank = int(stats.binom.ppf(0.025, len(times), 0.5))
    low = high = None
    if rank >= 1:
        low, high = float(times[rank - 1]), float(times[len(times) - rank])
    return Latency(p20, median, p80, low, high, len(times))


@torch.no_grad()
def taking_turns(
    ways: Mapping[str, Callable[[], Any]],
    device: str | torch.device,
    *,
    repeats: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Time some ways of doing a thing, such as forward passes of models, in turns: A B A B.

    Taking turns lets clock changes and other load hit all of them alike.

    Parameters
    ----------
    ways : by name.
    device : CUDA events measure on a GPU.
    repeats, warmup : timed and untimed calls of each way.
    clock : seconds, on a CPU.
    """
    device = torch.device(device)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1; got repeats={repeats}; raise it")
    for _ in range(warmup):
        for way in ways.values():
            way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(_once(way, device, clock))
    return {name: summarise(values) for name, values in times.items()}


def _once(way: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type != "cuda":
        start = clock()
        way()
        return (clock() - start) * 1e3
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        way()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))


@torch.no_grad()
def peak_memory(
    model: nn.Module, inputs: Mapping[str, Any], *, device: str | torch.device = "cpu"
) -> Memory:
    """Peak memory of one forward pass: weights, buffers, inputs and live intermediate tensors.

    On a GPU, what PyTorch's allocator held at most beyond what other tensors held before. On a CPU
    there is no such counter: the bytes of all tensors alive at once are summed up as operators
    return them, which leaves out scratch space inside an operator.

    Parameters
    ----------
    model : on ``device`` already.
    inputs : keyword arguments of the forward, on ``device`` already.
    device : of the model.
    """
    own = [*model.parameters(), *model.buffers()]
    own += [leaf for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, torch.Tensor)]
    return peak_of(lambda: model(**inputs), own, device)


@torch.no_grad()
def peak_of(
    work: Callable[[], Any], own: Sequence[torch.Tensor], device: str | torch.device
) -> Memory:
    """Peak memory of any work, as :func:`peak_memory` has it.

    Parameters
    ----------
    work : run once.
    own : what is there before: weights, buffers and inputs.
    device : of the work.
    """
    device = torch.device(device)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        extra = torch.cuda.max_memory_allocated(device) - before
        how = "weights + inputs + rise of torch.cuda.max_memory_allocated over a forward"
    else:
        with _LiveTensors(set(storages)) as live:
            work()
        extra = live.peak
        how = "weights + inputs + live tensors of a forward; scratch inside operators not counted"
    return Memory((sum(storages.values()) + extra) / 1e6, how)


class _LiveTensors(TorchDispatchMode):
    """Sums the storages that operators return, as long as they live; ``peak`` is the most at once.

    Parameters
    ----------
    known : addresses of storages that are counted elsewhere.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.peak = known, 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self.known or address in self.seen:
            return
        self.seen.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.now -= size
