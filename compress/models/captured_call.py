"""A call that is captured once as a CUDA graph, and replayed: launched as one, on new inputs."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any, Self

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten


class CudaGraph:
    """Captures what is launched while it is entered, and launches it when it is left.

    Parameters
    ----------
    device : that it is launched on, be it the current one or not.

    Raises
    ------
    ValueError : for what cannot be captured, such as a wait for the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream = _stream(device)
        self._capture = ExitStack()

    def __enter__(self) -> Self:
        # torch's own stream is on the first device, and stays the current one after a failure
        with ExitStack() as stack:
            stack.enter_context(torch.cuda.stream(self._stream))
            # other threads may allocate meanwhile
            stack.enter_context(
                torch.cuda.graph(
                    self._graph, stream=self._stream, capture_error_mode="thread_local"
                )
            )
            self._capture = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._capture.__exit__(kind, error, trace)
        except RuntimeError as ended:  # the capture fails to end, too, where something failed
            error = error or ended
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        if isinstance(error, RuntimeError):
            raise ValueError(
                "decode steps over a static cache are captured as a CUDA graph, for which nothing "
                f"may wait for the GPU; got: {str(error).splitlines()[0]}; pass "
                "disable_compile=True to generate"
            ) from error
        if error is None:
            self.replay()

    def replay(self) -> None:
        """Launch it again: on the same memory, and with the same numbers of the host."""
        self._graph.replay()


class CapturedCall:
    """A call whose first run is captured, and whose next ones are replays.

    Parameters
    ----------
    call : called once, with ``inputs``; returns any structure that holds tensors.
    inputs : a replay may be given other values of their tensors. Other tensors that the call reads
        must stay where they are; what it changes in place moves on.
    device : that it runs on.
    """

    def __init__(
        self, call: Callable[..., Any], inputs: dict[str, Any], device: torch.device
    ) -> None:
        self._kinds = kinds_of(inputs)
        leaves, structure = tree_flatten(inputs)
        self._inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        self._graph = CudaGraph(device)
        with self._graph:
            self._output = call(tree_unflatten(self._inputs, structure))

    def fits(self, inputs: dict[str, Any]) -> bool:
        """Whether these inputs differ from the first ones in values of tensors alone."""
        return kinds_of(inputs) == self._kinds

    def replay(self, inputs: dict[str, Any]) -> None:
        """Run it again, on inputs that fit."""
        for own, new in zip(self._inputs, tree_flatten(inputs)[0], strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(new)
        self._graph.replay()

    @property
    def output(self) -> Any:
        """What the last run returned: a copy, since the next one writes into the same memory."""
        return tree_map_only(torch.Tensor, torch.clone, self._output)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """That of all captures on a device: torch keeps memory for products on each stream."""
    return torch.cuda.Stream(device)


def kinds_of(inputs: dict[str, Any]) -> Any:
    """What calls must have in common so that one is a replay of the other; it holds no tensor."""
    leaves, structure = tree_flatten(inputs)
    kinds = [(x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in leaves]
    return structure, kinds
