"""Choose between a Triton kernel and plain torch.

``COMPRESS_KERNELS=auto`` (the default) takes the kernel on a GPU where Triton imports and the
kernel supports the shapes and dtypes, ``torch`` never, and ``triton`` always, or raises. The choice
and its reason are logged once per kernel under the name of this module: as a warning where a GPU
does not use its kernel, as information otherwise.
"""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

try:
    import triton
except ImportError as error:  # optional: plain torch does everything
    triton, MISSING = None, str(error)
tl: Any = triton and triton.language

VARIABLE = "COMPRESS_KERNELS"
CHOICES = ("auto", "torch", "triton")
OLDEST = (8, 0)  # compute capability that the tests compile the kernels for

_logger = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()


def jit(do_not_specialize: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` where Triton imports; elsewhere the function stays, and is never called.

    Its annotations must be strings (``from __future__ import annotations``).

    Parameters
    ----------
    do_not_specialize : arguments that change at every call and must not cause a recompilation.
    """
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=list(do_not_specialize))


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU and slowly."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def current_device_of(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Let launches go to a tensor's GPU, where that is not the current one."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(tensor)


_HERE = nullcontext()


def use_triton(kernel: str, device: torch.device, why_unsupported: str | None = None) -> bool:
    """Whether a call goes to the Triton kernel.

    Parameters
    ----------
    kernel : its name, for the log and for errors.
    device : of the call's tensors.
    why_unsupported : why the kernel cannot compute this call, None when it can.

    Raises
    ------
    ValueError : for an unknown value of ``COMPRESS_KERNELS``, or "triton" where that cannot be.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise ValueError(
            f"{VARIABLE} should be one of {', '.join(CHOICES)}; got {choice!r}; correct it or "
            "unset it"
        )
    if choice == "torch":
        _log_once(kernel, f"plain torch, as {VARIABLE}=torch requests", logging.INFO)
        return False
    reason = why_unsupported or _why_not_here(device, forced=choice == "triton")
    if reason is None:
        text = f"Triton on {device.type} ({VARIABLE}=torch for plain torch)"
        _log_once(kernel, text, logging.INFO)
        return True
    if choice == "triton":
        raise ValueError(
            f"{VARIABLE}=triton requests the kernel {kernel}, which cannot run: {reason}; fix "
            f"that, or set {VARIABLE}=auto"
        )
    level = logging.WARNING if device.type == "cuda" else logging.INFO
    _log_once(kernel, f"plain torch: {reason}", level)
    return False


def _why_not_here(device: torch.device, forced: bool) -> str | None:
    """Why no kernel can run on a device."""
    if triton is None:
        return f"Triton does not import ({MISSING})"
    if forced and interpreted():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a GPU"
    capability = _capability(device)
    if capability < OLDEST:
        return f"the GPU has compute capability {capability}, below {OLDEST}"
    return None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _log_once(kernel: str, text: str, level: int) -> None:
    if (kernel, text) not in _logged:
        _logged.add((kernel, text))
        _logger.log(level, "%s: %s", kernel, text)
