"""Which code does the work: a Triton kernel, or plain torch.

``COMPRESS_KERNELS=auto`` (the default) takes the kernel on a GPU where Triton imports and the
kernel serves the shapes and dtypes at hand, ``torch`` never, and ``triton`` always, or raises. What
was chosen, and why, is logged once per kernel under the name of this module: as a warning where a
GPU does without its kernel, as information otherwise.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
except ImportError as error:  # optional: without it nothing here needs it
    triton, MISSING = None, str(error)
tl: Any = triton and triton.language

VARIABLE = "COMPRESS_KERNELS"
CHOICES = ("auto", "torch", "triton")
OLDEST = (8, 0)  # compute capability for which the kernels are compiled in the tests

_logger = logging.getLogger(__name__)
_said: set[tuple[str, str]] = set()


def jit(do_not_specialize: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` where Triton imports; elsewhere the function stays, and nobody calls it.

    Its annotations must be strings (``from __future__ import annotations``).

    Parameters
    ----------
    do_not_specialize : arguments that change at every call and shall not compile it anew.
    """
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=list(do_not_specialize))


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU and slowly."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def takes_triton(kernel: str, device: torch.device, obstacle: str | None = None) -> bool:
    """Whether a call goes to the Triton kernel.

    Parameters
    ----------
    kernel : its name, for the log and for errors.
    device : of the call's tensors.
    obstacle : why the kernel cannot serve this call, None when it can.

    Raises
    ------
    ValueError : for an unknown value of ``COMPRESS_KERNELS``, or "triton" where that cannot be.
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in CHOICES:
        raise ValueError(
            f"{VARIABLE} should be one of {', '.join(CHOICES)}; got {wanted!r}; correct it or "
            "unset it"
        )
    if wanted == "torch":
        _say(kernel, f"plain torch, as {VARIABLE}=torch wants", logging.INFO)
        return False
    reason = obstacle or _obstacle(device, forced=wanted == "triton")
    if reason is None:
        _say(kernel, f"Triton on {device.type} ({VARIABLE}=torch for plain torch)", logging.INFO)
        return True
    if wanted == "triton":
        raise ValueError(
            f"{VARIABLE}=triton wants the kernel {kernel}, which cannot run: {reason}; mend that, "
            f"or set {VARIABLE}=auto"
        )
    level = logging.WARNING if device.type == "cuda" else logging.INFO
    _say(kernel, f"plain torch: {reason}", level)
    return False


def _obstacle(device: torch.device, forced: bool) -> str | None:
    """Why no kernel can run on a device."""
    if triton is None:
        return f"Triton does not import ({MISSING})"
    if forced and interpreted():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"the GPU has compute capability {capability}, below {OLDEST}"
    return None


def _say(kernel: str, text: str, level: int) -> None:
    if (kernel, text) not in _said:
        _said.add((kernel, text))
        _logger.log(level, "%s: %s", kernel, text)
