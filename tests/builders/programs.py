"""Programs of tests/programs, each in an interpreter of its own."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def command(name: str, *arguments: object) -> list[str]:
    """What starts tests/programs/NAME.py, in :func:`environment`."""
    return [sys.executable, "-P", str(TESTS / "programs" / f"{name}.py"), *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    """This environment and the variables, with tests/ on the path and one thread."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables


def run(
    name: str,
    *arguments: object,
    prefix: list[str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run tests/programs/NAME.py to its end, which must be a good one; returns what it printed."""
    done = subprocess.run(
        [*(prefix or []), *command(name, *arguments)],
        capture_output=True,
        text=True,
        env=environment(**variables),
        cwd=cwd,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done
