"""Forked children, which share what is imported and nothing that they do."""

import os
import socket
import sys
import traceback
from collections.abc import Callable


def fork(work: Callable[..., object], *arguments: object) -> int:
    """Start a child that does the work; its exit code is 1 where that fails."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    """Wait for the child; negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
