"""Choose between a Triton kernel and plain torch.

``COMPRESS_KERNELS=auto`` (the default) takes the kernel on a GPU where Triton imports and the
kernel supports the shapes and dtypes, ``torch`` never, and ``triton`` always, or raises. The choice
and its reason are logged once per kernel under the name of this module: as a warning where a GPU
does not use its kernel, as information otherwise.
"""

import logging
import os
from collections.abc import Callable
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
OLDEST_TRITON = 3, 3  # what older ones compile takes no constants, which Launch gives

_logger = logging.getLogger(__name__)


def jit(
    do_not_specialize: tuple[str, ...] = (), do_not_specialize_on_alignment: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` where Triton imports; elsewhere the function stays, and is never called.

    Its annotations must be strings (``from __future__ import annotations``).

    Parameters
    ----------
    do_not_specialize : arguments that change at every call and must not cause a recompilation.
    do_not_specialize_on_alignment : tensors that may begin anywhere, without a recompilation.
    """
    if triton is None:
        return lambda function: function
    return triton.jit(
        do_not_specialize=list(do_not_specialize),
        do_not_specialize_on_alignment=list(do_not_specialize_on_alignment),
    )


class Launch:
    """A kernel with all of its arguments but the tensors, for many calls.

    Triton binds the arguments of a call, and looks up what it compiled for their types and for
    which of them are multiples of 16. Here only the tensors' addresses may change, so that it does
    so once for those that are aligned alike, which costs as much as many a kernel on a GPU.

    Parameters
    ----------
    kernel : made by :func:`jit`; its arguments are tensors, numbers and constants, in this order.
    grid : programs along three axes.
    numbers : the arguments behind the tensors.
    constants : by name, and Triton's options.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        numbers: tuple[float, ...],
        constants: dict[str, Any],
    ) -> None:
        self.kernel, self.grid = kernel, grid
        self.numbers, self.constants = numbers, constants
        self._compiled: dict[bool | tuple[bool, ...], Callable[..., None]] = {}
        self._others: tuple[Any, ...] = ()

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Launch it; tensors have the types of the other calls, and None is where it was.

        It goes to the GPU of the first one, where that is not the current one, too.
        """
        first: Any = tensors[0]
        if _several_gpus() and first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device_of(first):
                return self(*tensors)
        addresses: list[int | None] = []
        bits = 0
        for part in tensors:
            if part is None:
                addresses.append(None)
            else:
                addresses.append(address := part.data_ptr())
                bits |= address
        aligned = bits % 16 == 0 or tuple([part % 16 == 0 for part in addresses if part])
        again = self._compiled.get(aligned)
        if again:
            return again(*addresses, *self._others)
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        if compiled is not None:  # as the interpreter returns
            names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            self._others = *self.numbers, *[self.constants[name] for name in names]
            self._compiled[aligned] = compiled[self.grid]
        return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU and slowly."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


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
    # asked for at every call of a kernel: what is not set is found out faster so
    choice = (os.environ[VARIABLE] if VARIABLE in os.environ else "") or "auto"
    return _decide(kernel, device, why_unsupported, choice, choice == "triton" and interpreted())


@cache
def _decide(
    kernel: str, device: torch.device, why_unsupported: str | None, choice: str, interpreted: bool
) -> bool:
    if choice not in CHOICES:
        raise ValueError(
            f"{VARIABLE} should be one of {', '.join(CHOICES)}; got {choice!r}; correct it or "
            "unset it"
        )
    if choice == "torch":
        _log_once(kernel, f"plain torch, as {VARIABLE}=torch requests", logging.INFO)
        return False
    reason = why_unsupported or _why_not_here(device, interpreted)
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


def _why_not_here(device: torch.device, interpreted: bool) -> str | None:
    """Why no kernel can run on a device."""
    if triton is None:
        return f"Triton does not import ({MISSING})"
    if interpreted:
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a GPU"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"Triton is {triton.__version__}, older than that of torch 2.7"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"the GPU has compute capability {capability}, below {OLDEST}"
    return None


@cache
def _log_once(kernel: str, text: str, level: int) -> None:
    _logger.log(level, "%s: %s", kernel, text)
