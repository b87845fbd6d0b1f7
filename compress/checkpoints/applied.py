"""Run-time methods on a model: applied until they are removed."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from compress.methods.base import Handle, RuntimeMethod

HOLDER = "_compress_applied"  # attribute of a model with methods on it


class Applied:
    """A model with run-time methods on it, from construction until :meth:`remove`.

    As a context manager it removes them when the block is left; without, they stay.

    Parameters
    ----------
    model : of a family that every method knows.
    methods : the first one is applied first.

    Raises
    ------
    ValueError : when a method cannot be applied, then none is; or when others are applied already.
    """

    def __init__(self, model: Any, methods: Sequence[RuntimeMethod]) -> None:
        if not methods:
            raise ValueError("at least one method expected; got none; give such as RTPrune()")
        if hasattr(model, HOLDER):
            present = ", ".join(method.name for method in getattr(model, HOLDER).methods)
            raise ValueError(
                f"this model has {present} on it already; call remove() on what applied them, and "
                "give all methods together"
            )
        names = [method.name for method in methods]
        if len(set(names)) < len(names):
            raise ValueError(
                f"each method can be applied once; got {', '.join(names)}; leave one of them out"
            )
        self.model = model
        self.methods = tuple(methods)
        self._stack = ExitStack()
        with ExitStack() as stack:
            self.handles: dict[str, Handle] = {
                method.name: stack.enter_context(method.attach(model)) for method in methods
            }
            self._stack = stack.pop_all()
        # contexts that nobody holds are left: the model holds what lasts as long as it does
        setattr(model, HOLDER, self)

    def facts(self) -> dict[str, dict[str, Any]]:
        """What each method counted since the start or the last reset, by its name."""
        return {name: handle.facts() for name, handle in self.handles.items()}

    def reset(self) -> None:
        """Let every method count from zero."""
        for handle in self.handles.values():
            handle.reset()

    def remove(self) -> None:
        """Restore the model; a second call does nothing."""
        self._stack.close()
        if vars(self.model).get(HOLDER) is self:
            delattr(self.model, HOLDER)

    def save(self, folder: str | Path, processor: Any) -> Path:
        """Write a checkpoint that :func:`compress.load` gives back with the methods applied.

        Plain transformers loads it as the dense model.

        Parameters
        ----------
        folder : where to; complete or untouched.
        processor : of the model, stored beside it.
        """
        from compress.checkpoints.runtime import save_patched

        return save_patched(self.model, processor, self.methods, Path(folder))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        raise ValueError(
            "a model with run-time methods on it cannot be copied; remove them first, or save it "
            "and load it again"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


@dataclass(frozen=True)
class Compressed:
    """What a weight method leaves: a pipeline and the facts of how it came to be."""

    model: Any
    report: dict[str, Any]

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint folder that plain diffusers loads."""
        from compress.checkpoints.slim import save_slim

        return save_slim(self.model, Path(folder), self.report)
