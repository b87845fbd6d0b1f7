"""Starts a command on several processes with torch's launcher, and says how each of them ended.

torchrun, `accelerate launch` and `srun` start the processes themselves; then only their environment
is read here.
"""

import logging
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence

# how long the others get to end by themselves after one has died
GRACE_SECONDS = 10
# exit code after SIGTERM, as a shell gives it
TERMINATED = 128 + signal.SIGTERM
# marks processes that `launch` started
OURS = "COMPRESS_LAUNCHED"


class Stopped(Exception):
    """The job ended early: ``code`` is its exit code, the message says what happened."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def rank() -> int:
    """The number of this process as the launcher gave it; 0 is the main one."""
    return int(os.environ.get("RANK", 0)) if launched() else 0


def reports_the_end() -> bool:
    """Whether this process says that the job ended early: our launcher, or else the main one."""
    return not launched() or (rank() == 0 and OURS not in os.environ)


def needed(processes: int) -> bool:
    """Whether this process must start that many others."""
    if launched() and processes not in (1, int(os.environ["WORLD_SIZE"])):
        raise ValueError(
            f"a launcher started {os.environ['WORLD_SIZE']} processes, but --processes is "
            f"{processes}; leave it out"
        )
    return processes > 1 and not launched()


def adopt_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """What a task of `srun` must put into its environment so that torch finds its partners.

    The main process's machine is the first of the step's node list, unless MASTER_ADDR names
    another; the port is a function of the job's number. Empty outside of a step of several tasks,
    and where torch's own variables are set already. Before torch is imported, since that is when
    it reads how many threads it may use. Written after SLURM's manual; not tried on a cluster yet.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in environment or int(tasks) < 2:
        return {}
    first = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", environment.get("SLURM_STEP_NODELIST", ""))
    host = "".join(part or "" for part in first.groups()) if first else "localhost"
    # a step of its own port, since several may run in one allocation
    number = int(environment.get("SLURM_JOB_ID", 0)) + int(environment.get("SLURM_STEP_ID", 0))
    return {
        "WORLD_SIZE": tasks,
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", host),
        "MASTER_PORT": environment.get("MASTER_PORT", str(20_000 + number % 20_000)),
        # as many as srun gives a task; accelerate would take the whole machine's for each
        "OMP_NUM_THREADS": environment.get(
            "OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", "1")
        ),
        # a task may see one GPU, whose number is 0: accelerate would look for LOCAL_RANK's
        "ACCELERATE_BYPASS_DEVICE_MAP": "true",
    }


def launch(processes: int, arguments: Sequence[str]) -> None:
    """Run ``compress`` with these arguments on several processes of this machine, to the end.

    Parameters
    ----------
    processes : how many; each takes its own GPU where there are any, and an equal share of the
        processor's cores unless OMP_NUM_THREADS is set.
    arguments : of the command, without the program's name.

    Raises
    ------
    Stopped : when one of them failed; the others have been ended then.
    KeyboardInterrupt : on Ctrl-C, after all have ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # its tables of exit codes and log files say less than the message below
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ[OURS] = "1"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE_SECONDS))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"compress-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        # -P: a checkout's kernels/ must not be found as a top-level module
        elastic_launch(config, sys.executable)("-P", "-m", "compress.cli", *arguments)
    except ChildFailedError as error:
        codes = {index: failure.exitcode for index, failure in error.failures.items()}
        raise _stopped(codes, processes) from error
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        name = signal.Signals(error.sigval).name
        raise Stopped(f"stopped by {name}", 128 + error.sigval) from error


def _stopped(codes: Mapping[int, int], processes: int) -> Stopped:
    """Say which process died, and of what.

    Parameters
    ----------
    codes : exit codes by process, of those that had ended when the first failure was noticed.
    """
    # the launcher ends the survivors with SIGTERM: no cause where there is another one
    ended = (-signal.SIGTERM, TERMINATED)
    order = {i: 2 if code in ended else int(code > 0) for i, code in codes.items()}
    index = min(codes, key=lambda i: (order[i], i))
    code = codes[index]
    if code > 0:
        return Stopped(f"process {index} of {processes} failed; all have ended", code)
    name = signal.Signals(-code).name
    hint = " (perhaps for lack of memory)" if code == -signal.SIGKILL else ""
    return Stopped(f"process {index} of {processes} was killed by {name}{hint}; all have ended", 1)
