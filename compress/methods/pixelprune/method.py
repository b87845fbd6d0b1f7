"""The knobs of PixelPrune."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.common.settings import Positive
from compress.eval.metrics import Metric
from compress.methods.base import Handle, RuntimeMethod, Section, Shown

if TYPE_CHECKING:
    from compress.bench.suite import Benchmark


class PixelPrune(RuntimeMethod):
    """Drop the patches of a page that a neighbour predicts, before the vision encoder.

    Wang, Jin, Chen, Lu, "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive
    Coding" (arXiv 2604.00886). A unit is the patches of one visual token. It is predicted by the
    unit to its left or above it, as in JPEG-LS, and dropped where its pixels are similar to those;
    then it takes part neither in the encoder nor in the decoder. Units that stay keep their
    positions, and the text goes on from where it was.

    Our own choice: batches of pages with different counts, GLM-OCR, ``min_keep``, and that it can
    be taken off again.
    """

    paper: ClassVar[str] = (
        "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding, 2604.00886"
    )
    serves: ClassVar[str] = "Qwen2.5-VL, Qwen3-VL, GLM-OCR (transformers)"
    keeps: ClassVar[str] = "patches that the vision encoder reads"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "units_kept": Metric(
            "Patches kept",
            unit="share",
            group="size",
            how="share of the patches that the vision encoder reads, over all pages, counted",
        )
    }
    used: ClassVar[str] = "units_kept"

    name: Literal["pixelprune"] = "pixelprune"
    threshold: float = Field(0.0, ge=0, lt=1)
    """Distance up to which a unit is dropped, of pixels between 0 and 1; at 0 it equals what
    predicts it."""
    distance: Literal["max", "mae", "rmse"] = "max"
    """Of two units: the largest absolute difference ("max"), the mean one ("mae"), or the root mean
    square ("rmse")."""
    min_keep: float = Field(0.0, ge=0, le=1)
    """Least fraction of a page's units. Where fewer would stay, others, spread evenly over those
    that would go, stay with them. Our own choice; 0 is the paper."""
    image_std: Literal["auto"] | tuple[Positive, Positive, Positive] = "auto"
    """What the processor divides each channel by, needed above a threshold of 0; "auto" reads it in
    the model's folder."""

    def label(self) -> str:
        """The distance where it is not the default; thresholds differ in what they keep alone."""
        return self.name if self.distance == "max" else f"{self.name}, {self.distance}"

    def kept(self) -> str:
        """The threshold, and the least fraction where there is one."""
        least = f", at least {self.min_keep:.0%}" if self.min_keep else ""
        return f"threshold {self.threshold:g}{least}"

    def count(self, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``units_kept``: the share of the units of all pages that were kept."""
        units, kept = (sum(batch["total"][key] for batch in facts) for key in ("units", "kept"))
        return {"units_kept": kept / units} if units else {}

    def attach(self, model: Any) -> AbstractContextManager[Handle]:
        """Prune the pages of ``model`` until the context is left, which restores everything.

        Parameters
        ----------
        model : of one of the families. One thread at a time may run it.

        Returns
        -------
        Context whose value has ``facts()``, ``pages`` and ``reset()``.

        Raises
        ------
        ValueError : for another family, with the reason; for a model whose prompts are being pruned
            already; above threshold 0 for one that does not say how its pixels are normalised.
        """
        from compress.methods.pixelprune.hooks import attached

        return attached(self, model)

    def sections(self, shown: Shown) -> list[Section]:
        """The page with what is dropped of it greyed, and how much stays of every page."""
        from compress.methods.pixelprune.figures import sections

        return sections(self, shown)

    @classmethod
    def benchmark(cls) -> "Benchmark":
        """What ``compress bench pixelprune`` times."""
        from compress.methods.pixelprune.bench import benchmark

        return benchmark(cls)
