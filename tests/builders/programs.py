"""Programs of tests/programs, each in a process of its own."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
_COMMAND = ("-m", "compress.cli")
# the command line on two processes, by what starts them; the first takes --processes, too
LAUNCHERS = {
    "processes": (sys.executable, "-P", *_COMMAND),
    "torchrun": (
        *(sys.executable, "-P", "-m", "torch.distributed.run"),
        *("--standalone", "--nproc_per_node=2", *_COMMAND),
    ),
    "accelerate": (
        *(sys.executable, "-P", "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
        *("--main_process_port=0", *_COMMAND),
    ),
}


def path(name: str) -> str:
    return str(TESTS / "programs" / f"{name}.py")


def environment(**variables: str) -> dict[str, str]:
    """This environment and the variables, with tests/ on the path and one thread."""
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | variables


def run(
    name: str,
    *arguments: object,
    cwd: Path | None = None,
    timeout: int = 600,
    fresh: bool = False,
    mounts: bool = False,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run tests/programs/NAME.py to its end, which must be a good one; returns what it printed.

    It runs in a fork of a process that has imported torch, diffusers and transformers;
    with ``fresh`` in an interpreter that has imported nothing. With ``mounts`` it may make mounts
    of its own, where this machine permits that.
    """
    command = [path(name), *map(str, arguments)]
    if fresh:
        done = subprocess.run(
            [sys.executable, "-P", *command],
            capture_output=True,
            text=True,
            env=environment(**variables),
            cwd=cwd,
            timeout=timeout,
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            outputs = {name: os.path.join(folder, name) for name in ("stdout", "stderr")}
            job = {"command": command, "cwd": str(cwd or os.getcwd()), "timeout": timeout}
            job |= {"mounts": mounts}
            job |= {"environment": environment(**variables)} | outputs
            server = _server(variables.get("TRITON_INTERPRET", "0"))
            print(json.dumps(job), file=server.stdin, flush=True)
            code = int(server.stdout.readline())
            texts = [Path(file).read_text() for file in outputs.values()]
            done = subprocess.CompletedProcess(command, code, *texts)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return done


def rank_of(launcher: int, rank: int) -> int:
    """The process of a rank that a launcher started."""
    found = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    for line in found.splitlines()[1:]:
        child, parent = map(int, line.split())
        if parent == launcher:
            names = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in names:
                return child
    raise LookupError(f"no process with rank {rank} under {launcher}")


@cache
def _server(interpret: str) -> subprocess.Popen[str]:
    """Triton's functions are interpreted or not from its import on."""
    server = subprocess.Popen(
        [sys.executable, "-P", str(TESTS / "builders" / "server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(TRITON_INTERPRET=interpret),
    )

    def end() -> None:
        server.stdin.close()
        server.stdout.close()
        server.wait()

    atexit.register(end)
    return server
