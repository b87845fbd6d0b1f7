"""What a method is, and what it reports while it works."""

from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn


@dataclass(frozen=True)
class Event:
    """One sign of progress. The caller owns the loop and shows, logs or ignores it.

    Attributes
    ----------
    stage : "prepare", "flow", "recover", "evaluate", "report" or "done".
    step, total : position within the stage.
    values : figures worth showing, by name.
    message : one line for people, where there is something to say.
    """

    stage: str
    step: int
    total: int
    values: dict[str, float] = field(default_factory=dict)
    message: str = ""


@dataclass(frozen=True)
class Compressed:
    """What a method leaves: a model and the facts about how it came to be."""

    model: Any
    report: dict[str, Any]

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint folder that plain diffusers loads."""
        from compress.checkpoints.slim import save_slim

        return save_slim(self.model, Path(folder), self.report)


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, what metrics.json holds, and the checkpoint."""

    folder: Path
    metrics: dict[str, Any]
    checkpoint: Path


class WeightMethod(Protocol):
    """A method whose result is new weights (saved as a slim checkpoint).

    ``prune`` yields events and returns the compressed UNet with the report's facts. It never
    changes the model that it is given.
    """

    name: str
    keep_macs: float

    def prune(self, unet: nn.Module, job: Any) -> Generator[Event, None, Any]:
        """Compress ``unet``; ``job`` carries data, training settings and where to keep state."""
        ...


class Handle(Protocol):
    """What a run-time method counts while it is applied."""

    def facts(self) -> dict[str, Any]:
        """JSON facts since the start or the last reset."""
        ...

    def reset(self) -> None:
        """Count from zero."""
        ...


class RuntimeMethod(Protocol):
    """A method that changes how a model runs, not its weights.

    It is saved as its settings, and applied again when a checkpoint is loaded.
    """

    @property
    def name(self) -> str:
        """The method's key in recipes and checkpoints."""
        ...

    def attach(self, model: Any) -> AbstractContextManager[Handle]:
        """Patch ``model`` until the context is left, which restores everything."""
        ...
