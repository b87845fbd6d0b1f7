"""Forked children, which share what is imported and nothing that they do."""

import ctypes
import gc
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(work: Callable[..., object], *arguments: object) -> int:
    """Start a child that does the work; its exit code is 1 where that fails."""
    gc.freeze()  # the child collects what it makes itself
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


CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000


def unshare_mounts() -> bool:
    """Give this process mounts of its own and the right to make some, where that is permitted."""
    libc = ctypes.CDLL(None)
    user = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    for kind, number in zip(("uid", "gid"), user, strict=True):
        Path(f"/proc/self/{kind}_map").write_text(f"0 {number} 1")
    return not libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)


def give_up_rights() -> bool:
    """Root keeps no right to write where permissions forbid it."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    return not ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())
