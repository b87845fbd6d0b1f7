"""The knobs of RTPrune and of the peers that it is compared with."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from compress.methods.rtprune.pages import Handle

Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class RTPrune:
    """Prune the visual tokens of a page between projector and decoder.

    Wan et al., "RTPrune: Reading-Twice Inspired Token Pruning for Efficient DeepSeek-OCR Inference"
    (ICML 2026, arXiv 2605.00392), for DeepSeek-OCR, Unlimited-OCR and DeepSeek-OCR-2. Tokens with
    large norms stay; the others are moved onto them by optimal transport. Tokens of all views of a
    page are ranked together; its newlines and separator are neither ranked nor merged, but of
    newlines that become neighbours only the first stays. Tokens that stay keep their position ids.

    Batches (pages that keep different numbers are padded on the left), Unlimited-OCR,
    DeepSeek-OCR-2 and the peers are ours. So is that at least one token of a page stays.

    Parameters
    ----------
    keep_tokens : fraction of a page's prunable tokens to keep, in (0, 1]; "dynamic" decides for
        each page, more for a fuller one.
    merge : strength of what is moved onto the kept tokens; 0 drops it.
    select : "rtprune", or a peer: "norm" (no merging), "random", "visionzip", "divprune" or
        "cdpruner"; see :mod:`compress.methods.rtprune.baselines`. ``merge`` and ``transport`` are
        RTPrune's alone.
    transport : "optimal", or "nearest": all of a pruned token to the kept one most like it.
    seed : of "random", which chooses other tokens on each page.
    """

    name: Literal["rtprune"] = "rtprune"
    keep_tokens: Literal["dynamic"] | Fraction = "dynamic"
    merge: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    select: Literal["rtprune", "norm", "random", "visionzip", "divprune", "cdpruner"] = "rtprune"
    transport: Literal["optimal", "nearest"] = "optimal"
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0

    def attach(self, model: Any) -> AbstractContextManager["Handle"]:
        """Prune what ``model`` reads until the context is left, which restores everything.

        Parameters
        ----------
        model : of one of the three families. One thread at a time may run it.

        Returns
        -------
        Context whose value counts: ``facts()``, ``pages`` and ``reset()``.

        Raises
        ------
        ValueError : for another family, or a model that is being pruned already.
        """
        from compress.methods.rtprune.patch import attached

        return attached(self, model)
