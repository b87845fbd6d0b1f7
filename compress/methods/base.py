"""What a method is: its knobs, what it does with a model, and what it says about the result.

A new method subclasses `WeightMethod` or `RuntimeMethod`; `compress.methods.registry` lists it.
Nothing here imports torch: recipes and the command line read knobs without it.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from compress.common.settings import Fraction, NonNegative, Settings
from compress.eval.metrics import Metric
from compress.methods.training import Training

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from compress.bench.suite import Benchmark
    from compress.common.journal import Journal
    from compress.data.sources import ImageData


@dataclass(frozen=True)
class Event:
    """One sign of progress. The caller owns the loop and shows, logs or ignores it.

    Attributes
    ----------
    stage : what is being done, such as "prepare", "flow", "recover", "evaluate" or "report"; of a
        reader also the name of the variant that reads.
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
class Figure:
    """A figure of a report.

    Attributes
    ----------
    name : of the PNG file that is written into ``figures/`` beside the report.
    image : a PNG, or an animated GIF, which stands in the report alone.
    caption : one line.
    kind : "wide" takes the whole width, "pixels" is enlarged without smoothing.
    """

    name: str
    image: bytes
    caption: str
    kind: Literal["", "wide", "pixels"] = ""


@dataclass(frozen=True)
class Section:
    """A part of a report, in plain text: a title, paragraphs and figures."""

    title: str
    notes: Sequence[str] = ()
    figures: Sequence[Figure] = ()


class Method(Settings):
    """The knobs of a compression method, and what reports and tables say of it.

    Attributes
    ----------
    paper : title and arXiv id, or "our own choice".
    serves : the models that it compresses, in words.
    keeps : what it keeps fewer of, in words.
    """

    paper: ClassVar[str]
    serves: ClassVar[str]
    keeps: ClassVar[str]

    # each method narrows it to its own key in recipes and checkpoints: ``Literal["NAME"] = "NAME"``
    name: str

    @property
    def unused(self) -> frozenset[str]:
        """Knobs that decide nothing beside the values of the others."""
        return frozenset()

    def label(self) -> str:
        """Name in tables and plots; methods that differ in what they keep alone share it."""
        return self.name

    def kept(self) -> str:
        """What it was told to keep, for a table's cell."""
        raise NotImplementedError

    @classmethod
    def benchmark(cls) -> "Benchmark | None":
        """What ``compress bench NAME`` times; None for nothing."""
        return None


# ---- methods that make new weights ---------------------------------------------------------------


@dataclass(frozen=True)
class PruneJob:
    """What a weight method works on.

    Attributes
    ----------
    pipeline : the dense one; never changed.
    data : training images and held-out images, with captions or labels where the model takes them.
    training : how weights are trained.
    device : such as "cpu" or "cuda:1".
    journal : where log and states go; in memory where it has no folder.
    resume : go on from the journal's state, if it has one.
    """

    pipeline: "DiffusionPipeline"
    data: "ImageData"
    training: Training
    device: str
    journal: "Journal"
    resume: bool = False


@dataclass(frozen=True)
class Pruned:
    """A compressed denoiser and the facts of its making.

    Attributes
    ----------
    model : takes the place of the pipeline's denoiser.
    widths : JSON rows ``{level, dense, compressed}``: what got smaller.
    report : JSON facts, such as ``train_seconds`` and ``optimiser_steps``.
    trace : tensors for the report's figures.
    """

    model: "nn.Module"
    widths: list[dict[str, Any]]
    report: dict[str, Any]
    trace: dict[str, "Tensor"] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """What a finished run left of its work, for a method's part of the report.

    Attributes
    ----------
    metrics : what metrics.json holds.
    log : rows of log.jsonl by stage.
    trace : arrays of trace.safetensors by name; empty where there are none.
    """

    metrics: Mapping[str, Any]
    log: Mapping[str, Sequence[Mapping[str, Any]]]
    trace: Mapping[str, Any]


class WeightMethod(Method):
    """A method whose result is new weights, saved as a slim checkpoint."""

    keep_macs: Fraction = 0.5
    """Fraction of the multiply-accumulate operations to keep."""
    steps: NonNegative
    """Optimiser steps before recovery."""

    def kept(self) -> str:
        """The fraction of the MACs."""
        return f"{self.keep_macs:.0%} of the MACs"

    def prune(self, job: PruneJob) -> Generator[Event, None, Pruned]:
        """Compress the denoiser of ``job.pipeline``, which stays as it is.

        The first event is of the stage "prepare": by then everything that a user can have got wrong
        was refused, and nothing was written.

        Yields
        ------
        Event : one for each optimiser step.

        Raises
        ------
        ValueError : for a model or data that cannot be used, or settings that cannot be met.
        """
        raise NotImplementedError

    def forecast(self, pipeline: "DiffusionPipeline", training: Training) -> dict[str, Any]:
        """Predict the result without training: JSON facts in the order in which they are shown.

        ``params`` and ``macs`` are ``(dense, least, most)``, where least and most are equal unless
        they depend on the scores.
        """
        raise NotImplementedError

    def sections(self, run: RunRecord) -> list[Section]:
        """The method's part of the report; none for a run without what it would show."""
        return []


# ---- methods that change how a model runs --------------------------------------------------------


class Handle(Protocol):
    """What a run-time method counts while it is applied."""

    def facts(self) -> dict[str, Any]:
        """JSON facts since the start or the last reset."""
        ...

    def reset(self) -> None:
        """Count from zero."""
        ...


@dataclass(frozen=True)
class Shown:
    """What a run-time method's part of the report is drawn from.

    Attributes
    ----------
    model, processor : without methods; they may be run.
    image : one page.
    prompt : that the pages were read with; the family's own for plain text when None.
    others : the other methods of the run.
    facts : what this method counted, batch by batch.
    """

    model: Any
    processor: Any
    image: Any
    prompt: str | None
    others: Sequence["RuntimeMethod"]
    facts: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Calibrated:
    """What a calibration found.

    Attributes
    ----------
    settings : knobs of the method, by name.
    facts : JSON, for the checkpoint and the report.
    lines : what was found, for people.
    """

    settings: dict[str, Any]
    facts: dict[str, Any]
    lines: list[str] = field(default_factory=list)


class RuntimeMethod(Method):
    """A method that changes how a model runs, not its weights.

    It is saved as its settings, and applied again when a checkpoint is loaded.

    Attributes
    ----------
    metrics : of what :meth:`count` returns, the numbers that are metrics.
    used : the one among them that is a share of the visual tokens that the model used.
    calibrated : settings that may be left open, to be measured on pages.
    """

    metrics: ClassVar[Mapping[str, Metric]] = {}
    used: ClassVar[str]
    calibrated: ClassVar[tuple[str, ...]] = ()

    def attach(self, model: Any) -> AbstractContextManager[Handle]:
        """Apply the method to ``model`` until the context is left, which restores everything.

        Raises
        ------
        ValueError : for a model that cannot be served.
        """
        raise NotImplementedError

    def count(self, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Put together what the handle counted in several batches: JSON, shares by name."""
        raise NotImplementedError

    def warnings(self, counts: Mapping[str, Any]) -> list[str]:
        """What a reader of the metrics should know; ``counts`` are those of :meth:`count`."""
        return []

    def sections(self, shown: Shown) -> list[Section]:
        """The method's part of the report."""
        return []

    def calibration_sections(self, facts: Mapping[str, Any]) -> list[Section]:
        """The part of the report that shows a calibration; ``facts`` are those of `Calibrated`."""
        return []

    def needs_calibration(self) -> bool:
        """Whether a setting is left open that is measured on pages."""
        return False

    def calibrated_as(self) -> Self:
        """The method that is calibrated for this one, without what makes no difference to that."""
        return self

    def calibrate(
        self, model: Any, batches: Sequence[Mapping[str, Any]], max_new_tokens: int
    ) -> Calibrated:
        """Measure the settings that are left open, on prompts that the model answers densely.

        Parameters
        ----------
        model : without methods.
        batches : inputs of ``model.generate``, on the model's device.
        max_new_tokens : of an answer.
        """
        raise NotImplementedError
