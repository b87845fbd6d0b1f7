"""The knobs of RTPrune and of the peers that it is compared with."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.common.settings import Fraction
from compress.eval.metrics import Metric
from compress.methods.base import Handle, RuntimeMethod, Section, Shown

if TYPE_CHECKING:
    from compress.bench.suite import Benchmark


# OmniDocBench overall of DeepSeek-OCR, dense and pruned by the dynamic ratio, by the sides of the
# grids of its modes below Large; as transcribed from version 2 of the paper
BELOW_LARGE = {
    8: ("Tiny", 68.59, 52.09),
    10: ("Small", 79.61, 64.91),
    16: ("Base", 84.83, 81.48),
}


class RTPrune(RuntimeMethod):
    """Prune the visual tokens of a page between projector and decoder.

    Wan et al., "RTPrune: Reading-Twice Inspired Token Pruning for Efficient DeepSeek-OCR Inference"
    (ICML 2026, arXiv 2605.00392), for DeepSeek-OCR, Unlimited-OCR and DeepSeek-OCR-2. Tokens with
    large norms stay; the others are merged into them by optimal transport. Tokens of all views of a
    page are ranked together; its newlines and separator are neither ranked nor merged, but of
    newlines that become neighbours only the first stays. Tokens that stay keep their position ids.

    Our own choice: batches (pages that keep different numbers are padded on the left),
    Unlimited-OCR, DeepSeek-OCR-2, the peers, and that at least one token of a page stays.
    """

    paper: ClassVar[str] = (
        "RTPrune: Reading-Twice Inspired Token Pruning for Efficient DeepSeek-OCR Inference, "
        "2605.00392"
    )
    serves: ClassVar[str] = "DeepSeek-OCR, DeepSeek-OCR-2, Unlimited-OCR (transformers)"
    keeps: ClassVar[str] = "visual tokens that the decoder reads"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "tokens_kept": Metric(
            "Visual tokens kept",
            unit="share",
            group="size",
            how="share of the visual tokens that reach the decoder, over all pages, counted",
        )
    }
    used: ClassVar[str] = "tokens_kept"

    name: Literal["rtprune"] = "rtprune"
    keep_tokens: Literal["dynamic"] | Fraction = "dynamic"
    """Fraction of a page's prunable tokens to keep; "dynamic" decides for each page, more for a
    fuller one."""
    merge: float = Field(0.1, ge=0)
    """Weight of the pruned tokens that are moved onto the kept ones; 0 drops them."""
    select: Literal["rtprune", "norm", "random", "visionzip", "divprune", "cdpruner"] = "rtprune"
    """"rtprune", or a peer: "norm" (no merging), "random", "visionzip", "divprune" or "cdpruner".
    ``merge`` and ``transport`` have no effect on peers."""
    transport: Literal["optimal", "nearest"] = "optimal"
    """"optimal", or "nearest": all of a pruned token goes to the kept one most similar to it."""
    seed: int = Field(0, ge=0, lt=1 << 31)
    """Seed of "random", which selects other tokens on each page."""

    def label(self) -> str:
        """The selection, and the knobs of merging that are not the paper's."""
        parts: list[str] = [self.select]
        if self.merge != 0.1:
            parts.append(f"merge {self.merge}")
        if self.transport == "nearest":
            parts.append("nearest")
        return ", ".join(parts)

    def kept(self) -> str:
        """The fraction of a page's prunable tokens, or "dynamic"."""
        if self.keep_tokens == "dynamic":
            return "dynamic"
        return f"{self.keep_tokens:.2%}".replace(".00%", "%")

    def count(self, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``tokens_kept``: the share of the visual tokens, newlines included, that were kept.

        ``below_large``: the sides of the grids of DeepSeek-OCR's modes below Large that pages were
        read in. The other families have no newlines.
        """
        totals = [batch["total"] for batch in facts]
        before, after = (sum(t[key] for t in totals) for key in ("visual_tokens", "visual_kept"))
        pages = [page for batch in facts for page in batch["pages"]]
        sizes = {(page["prunable"], page["visual_tokens"]) for page in pages}
        # a row ends in a newline, the page in a separator
        small = [side for side in BELOW_LARGE if (side**2, side**2 + side + 1) in sizes]
        return {
            **({"tokens_kept": after / before} if before else {}),
            **({"below_large": small} if small else {}),
        }

    def warnings(self, counts: Mapping[str, Any]) -> list[str]:
        """What the paper lost in the modes below Large, if pages were read in one."""
        if not (sides := counts.get("below_large")):
            return []
        lost = [
            f"{dense} to {pruned} in {mode} ({side**2} tokens)"
            for side in sides
            for mode, dense, pruned in [BELOW_LARGE[side]]
        ]
        return [
            "below the mode Large rtprune costs DeepSeek-OCR more: published OmniDocBench overall "
            f"falls from {', from '.join(lost)}; in Large (400 tokens) from 85.55 to 85.10"
        ]

    def attach(self, model: Any) -> AbstractContextManager[Handle]:
        """Prune the prompts of ``model`` until the context is left, which restores everything.

        Parameters
        ----------
        model : of one of the three families. One thread at a time may run it.

        Returns
        -------
        Context whose value has ``facts()``, ``pages`` and ``reset()``.

        Raises
        ------
        ValueError : for another family, or a model that is being pruned already.
        """
        from compress.methods.rtprune.hooks import attached

        return attached(self, model)

    def sections(self, shown: Shown) -> list[Section]:
        """What stays of the page, and of every page where the ratio is dynamic."""
        from compress.methods.rtprune.figures import sections

        return sections(self, shown)

    @classmethod
    def benchmark(cls) -> "Benchmark":
        """What ``compress bench rtprune`` times."""
        from compress.methods.rtprune.bench import benchmark

        return benchmark(cls)
