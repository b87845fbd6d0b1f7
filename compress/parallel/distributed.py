"""Several processes that work as one: accelerate's process group, and what a run asks of it.

What started the processes (``compress run --processes``, torchrun, accelerate, SLURM) describes
them in the environment; in a single process the functions below do nothing.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
    reduce,
)

from compress.common.journal import fingerprint
from compress.parallel import sharding

Item = TypeVar("Item")
Result = TypeVar("Result")

# the others wait while the main process alone measures and writes; a dead one is noticed at once
PATIENCE = timedelta(hours=4)
NO_LIMIT = timedelta(days=365)
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
# words of torch's errors when a collective does not reach the other processes
BROKEN = ("gloo", "NCCL", "Connection", "store", "socket")


class ProcessesDifferError(OSError):
    """What must be the same on every process is not."""


def join(device: str, patience: timedelta = PATIENCE) -> str:
    """Join the other processes that the environment describes; returns this process's device.

    Parameters
    ----------
    device : what was asked for, or chosen; a GPU without a number where there are several
        processes, since each takes its own.
    patience : how long a process waits for the others.

    Raises
    ------
    ValueError : for a device with a number on several processes, or a way to share a model between
        processes (accelerate's configuration) that pruning does not support.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    # this state does not know of FSDP, which accelerate decides on when a run begins
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        sharding.check(FullyShardedDataParallelPlugin(), device)
    if ":" in device:
        raise ValueError(
            f"every process takes its own GPU, so expected cpu or cuda; got --device {device}; "
            "choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    state = PartialState(cpu=device == "cpu", timeout=patience)
    if state.distributed_type not in SUPPORTED:
        raise ValueError(
            "expected processes that share data (DDP) or cut weights by FSDP; accelerate's "
            f"configuration asks for {state.distributed_type.value}; set distributed_type to "
            "MULTI_GPU, MULTI_CPU or FSDP"
        )
    return str(state.device)


def processes() -> int:
    """How many processes work together."""
    return torch.distributed.get_world_size() if _together() else 1


def process() -> int:
    """The number of this one; 0 is the main one, which alone writes and prints."""
    return torch.distributed.get_rank() if _together() else 0


def is_main() -> bool:
    """Whether this is the main process."""
    return process() == 0


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let the main process of each machine do first what the others then find done."""
    if processes() == 1:
        yield
        return
    with PartialState().local_main_process_first():
        yield


def mean(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mean over all processes; the same bits on each of them."""
    return dict(tensors) if processes() == 1 else reduce(dict(tensors), "mean")


def mean_value(value: float, device: torch.device | str = "cpu") -> float:
    """Mean of a number over all processes; the same bits on each of them."""
    if processes() == 1:
        return value
    return reduce(torch.tensor(value, dtype=torch.float64, device=device), "mean").item()


def from_main(work: Callable[[], Result]) -> Result:
    """Do something on the main process alone; everybody gets the result."""
    if processes() == 1:
        return work()
    return broadcast_object_list([work() if is_main() else None])[0]


def wait_for_all() -> None:
    """Wait until every process is here; :func:`from_main` lets the main one go on before others."""
    if processes() > 1:
        PartialState().wait_for_everyone()


def shared_out(items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """Results of ``work`` for all items, in their order, on every process.

    Item ``i`` is done by process ``i`` modulo their number, whole: a result does not depend on how
    many there are. The caller must use all results up, since all processes move round by round.
    """
    count = processes()
    if count == 1:
        yield from map(work, items)
        return
    for first in range(0, len(items), count):
        mine = items[first : first + count][process() : process() + 1]
        yield from gather_object([work(item) for item in mine])


def check_same(what: str, tensors: Mapping[str, torch.Tensor], *facts: object) -> None:
    """Compare tensors and facts with those of all other processes, by checksum.

    Parameters
    ----------
    what : their name in the message, and when this is.
    tensors, facts : compared to the last bit, and by their text.

    Raises
    ------
    ProcessesDifferError : on every process, naming those that differ from the majority (from the
        main one where there is none).
    """
    if processes() == 1:
        return
    sums = gather_object([f"{fingerprint(tensors)} {facts!r}"])
    common, votes = Counter(sums).most_common(1)[0]
    if 2 * votes <= len(sums):
        common = sums[0]
    odd = [str(index) for index, total in enumerate(sums) if total != common]
    if odd:
        raise ProcessesDifferError(
            f"{what} should be the same on all {len(sums)} processes; process {', '.join(odd)} "
            "differs from the others; check that all have the same recipe, data, packages and kind "
            "of device, then go on with --resume"
        )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say that another process is gone where torch says only that a collective failed.

    Raises
    ------
    ConnectionError : instead of the RuntimeError of a collective whose partner died.
    """
    try:
        yield
    except RuntimeError as error:
        if processes() == 1 or not any(word in str(error) for word in BROKEN):
            raise
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"another process of this job ended, or cannot be reached ({reason}); once it is clear "
            "why, go on with --resume, on any number of processes"
        ) from error
