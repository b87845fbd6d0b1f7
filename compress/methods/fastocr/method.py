"""The knobs of FastOCR."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.common.settings import Fraction, NonNegative
from compress.methods.base import Handle, RuntimeMethod

if TYPE_CHECKING:
    from compress.bench.suite import Benchmark

Layers = Annotated[tuple[NonNegative, ...], Field(min_length=1)]


class FastOCR(RuntimeMethod):
    """Each decode step attends to the few visual tokens that a focal layer chose.

    Tang et al., "FastOCR: Dynamic Visual Fixation via KV Cache Pruning for Efficient Document
    Parsing" (arXiv 2605.17447). A few focal layers attend to the whole page; the visual tokens
    with the highest head-mean attention there are what the layers below attend to, and, in the next
    step, the layers above. Nothing is evicted; the prompt is read densely, and so is the first
    step. No code is public: the formulation is ours, after the abstract.
    """

    paper: ClassVar[str] = (
        "FastOCR: Dynamic Visual Fixation via KV Cache Pruning for Efficient Document Parsing, "
        "2605.17447"
    )
    serves: ClassVar[str] = "vision-language models (transformers)"
    keeps: ClassVar[str] = "visual tokens that a decode step attends to"

    name: Literal["fastocr"] = "fastocr"
    keep_visual: Fraction = 0.05
    """Fraction of a sequence's visual tokens that a layer that is not focal attends to; rounded up.
    """
    focal_layers: Literal["auto"] | Layers = "auto"
    """Layers that attend to all, as calibration found them; "auto" finds a seventh of the layers in
    the first ``warmup`` steps of each request, for its batch as a whole."""
    dilate: NonNegative = 0
    """Rows and columns around the best tokens that take the place of the last ones; the number of
    tokens stays."""
    min_mass: float = Field(0.0, ge=0, lt=1)
    """When less than this share of a focal layer's attention over visual tokens lies on the
    fixation in force, the rest of the step is dense. 0 is the paper."""
    reuse: bool = True
    """False lets layers before the first focal one attend to all, instead of to the fixation of the
    step before."""
    periphery: NonNegative = 0
    """Summary tokens per key head by which a layer attends to what is not in its fixation, each the
    mean of visual tokens that are alike and weighted by their number. Counted as attended. Ours; 0
    is the paper."""
    min_visual: Literal["auto"] | NonNegative = "auto"
    """A batch none of whose sequences has as many visual tokens is decoded densely: few tokens cost
    less than choosing among them. "auto" is what the benchmark measured on the device, 0 where it
    was not measured; 0 never switches off. Ours."""
    warmup: int = Field(8, ge=2)
    """Dense first steps where ``focal_layers`` is "auto"."""
    fixation: Literal["dynamic", "static", "random", "window"] = "dynamic"
    """"dynamic" is the method. The others fix what a layer attends to for the whole answer, at the
    same mean number of attended tokens, without focal layers: "static" is each layer's own top-k of
    the last dense step, "random" a draw per layer, "window" the last ones in reading order."""
    seed: int = 0
    """Seed of the random fixation."""

    @model_validator(mode="after")
    def _only_the_dynamic_fixation_moves(self) -> "FastOCR":
        if self.fixation != "dynamic" and (self.dilate or self.min_mass or not self.reuse):
            raise ValueError(
                f"dilate, min_mass and reuse belong to the dynamic fixation; got fixation="
                f"{self.fixation!r} with dilate={self.dilate}, min_mass={self.min_mass}, "
                f"reuse={self.reuse}; leave them out"
            )
        return self

    def attach(self, model: Any) -> AbstractContextManager[Handle]:
        """Let ``model`` decode so until the context is left, which restores everything.

        Greedy search and sampling, any batch. A model of a family without an adapter passes a
        preflight when it first generates from a prompt with an image: two steps, dense and with all
        visual tokens; where these differ, that call says what is missing.

        Raises
        ------
        ValueError : when the model cannot be served, or has no such focal layer.
        """
        from compress.methods.fastocr.attaching import attach

        return attach(self, model)

    @classmethod
    def benchmark(cls) -> "Benchmark":
        """What ``compress bench fastocr`` times."""
        from compress.methods.fastocr.bench import BENCHMARK

        return BENCHMARK
