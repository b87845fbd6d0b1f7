"""An accelerator of tensors whose values lie on the CPU, for programs: torch keeps a backend.

It refuses what CUDA refuses: operands of two devices, values that NumPy reads without a copy, the
CPU's generators, and products of integers. A copy to the host that nobody waits for is an error.
"""

from functools import cache
from typing import Any, NamedTuple

import accelerate.accelerator
import torch
from accelerate.state import AcceleratorState, PartialState
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# one that accelerate takes for a device with float16
NAME = "musa"
DEVICE = torch.device("privateuseone", 0)  # until it has the name
ATEN = torch.ops.aten
COPIES = {ATEN.copy_.default, ATEN._to_copy.default}
# where indices of the CPU are taken
INDEXING = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN._index_put_impl_.default}
PRODUCTS = {ATEN.mm.default, ATEN.bmm.default, ATEN.addmm.default, ATEN.convolution.default}
# made of their device by kernels that resize, or called below what the fallback sees
DIRECT = ("_local_scalar_dense", "arange", "arange.start", "arange.start_step", "eye", "eye.m")
# what autocast computes in half precision and in float32, of what is used here
HALVES = (torch.float16, torch.bfloat16)
LOWER = ("conv2d", "linear", "matmul", "bmm", "baddbmm", "scaled_dot_product_attention")
UPPER = ("group_norm", "layer_norm", "softmax.int", "mse_loss", "rsqrt", "pow.Tensor_Scalar")


class Backend:
    """What torch asks of a device's module."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = empty_cache = staticmethod(lambda *_: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


class OnDevice(torch.Tensor):
    """A tensor of the device; ``value`` is on the CPU."""

    value: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=DEVICE,
        )
        made.value = value
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def tolist(self) -> list:
        return self.value.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.value.untyped_storage()

    def numpy(self, **_: Any) -> None:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu()")

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.value})"


class Facts(NamedTuple):
    """``written``: arguments that an operation writes to and returns."""

    copies: bool
    indexing: bool
    pointwise: bool
    product: bool
    written: list[tuple[int, str]]


@cache
def _facts(func) -> Facts:
    arguments, returns = func._schema.arguments, func._schema.returns
    written = [(i, a) for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    if not returns or returns[0].alias_info is None:
        written = []
    return Facts(
        func in COPIES,
        func in INDEXING,
        torch.Tag.pointwise in func.tags,
        func in PRODUCTS,
        [(i, a.name) for i, a in written[: len(returns)]],
    )


def _inner(given: Any, others: list[torch.Tensor]) -> Any:
    if isinstance(given, OnDevice):
        return given.value
    if isinstance(given, torch.Tensor):
        others.append(given)
    return [_inner(each, others) for each in given] if isinstance(given, list | tuple) else given


def _outer(made: Any) -> Any:
    if isinstance(made, torch.Tensor):
        return OnDevice(made)
    return type(made)(map(_outer, made)) if isinstance(made, list | tuple) else made


def _check_together(func, facts: Facts, args: tuple, others: list[torch.Tensor]) -> None:
    """What lies on the CPU may be numbers of pointwise operations, and indices."""
    indexed = facts.indexing and isinstance(args[0], OnDevice)
    if indexed:
        others = [other for other in args[2:] if type(other) is torch.Tensor]
    numbers = indexed or facts.pointwise
    if any(other.dim() or not numbers for other in others):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and cpu! (in {func})"
        )


def compute(func, args: tuple, kwargs: dict) -> Any:
    facts, others = _facts(func), []
    values = [_inner(given, others) for given in args]
    named = {name: _inner(given, others) for name, given in kwargs.items()}
    if others and not facts.copies:
        _check_together(func, facts, args, others)
    if facts.product and not values[1].is_floating_point():
        raise NotImplementedError(f"{func} is not implemented for integers")
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    target = kwargs.get("device")
    leaves = target is not None and torch.device(target).type != NAME
    if target is not None and torch.device(target).index:
        raise RuntimeError(f"invalid device {target}")
    if leaves and kwargs.get("non_blocking"):
        raise RuntimeError("the host reads a copy that it has not waited for")
    if target is not None and not leaves:
        named["device"] = "cpu"
        named.pop("pin_memory", None)
    if func is ATEN.histc.default:  # CUDA counts integers, too
        made = func(values[0].double(), *values[1:], **named).to(values[0].dtype)
    else:
        made = func(*values, **named)
    if leaves:
        return made
    written = [args[i] if i < len(args) else kwargs[name] for i, name in facts.written]
    if any(isinstance(t, OnDevice) and t.shape != t.value.shape for t in written):
        raise NotImplementedError(f"{func} resized what it wrote to")
    if written:
        return written[0] if len(written) == 1 else tuple(written)
    return _outer(made)


def _cast(func, dtype: torch.dtype | None):
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def call(*args, **kwargs):
        to = dtype or torch.get_autocast_dtype(NAME)
        cast = [
            a.to(to) if isinstance(a, OnDevice) and a.dtype in (torch.float32, *HALVES) else a
            for a in args
        ]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return func(*cast, **kwargs)

    return call


def overload(name: str):
    packet, _, which = name.partition(".")
    return getattr(getattr(ATEN, packet), which or "default")


def install() -> list[torch.library.Library]:
    """Make the device one that torch and accelerate know, as long as the result lives."""
    _setup_privateuseone_for_python_backend(NAME, Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) copies as others do
    every, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(lambda func, *args, **kwargs: compute(func, args, kwargs), "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in DIRECT:
        func = overload(name)
        some.impl(name, lambda *args, f=func, **kwargs: compute(f, args, kwargs), "PrivateUse1")
    for names, dtype in ((LOWER, None), (UPPER, torch.float32)):
        for name in names:
            some.impl(name, _cast(overload(name), dtype), "AutocastPrivateUse1")
    # as on a machine whose first GPU is not the one that was asked for
    PartialState.default_device = property(lambda _: torch.device(NAME, 1))
    accelerate.accelerator.get_grad_scaler = lambda *_, **options: torch.amp.GradScaler(
        NAME, **options
    )
    return [every, some]


def forget() -> None:
    """Let the next Accelerator have settings of its own."""
    AcceleratorState._reset_state(True)
