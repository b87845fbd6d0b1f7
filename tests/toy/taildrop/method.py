"""The knobs of taildrop."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

from compress.common.settings import Fraction
from compress.eval.metrics import Metric
from compress.methods.base import Handle, RuntimeMethod


class TailDrop(RuntimeMethod):
    """Hide the last visual tokens of each prompt from the decoder; our own choice, as a toy."""

    paper: ClassVar[str] = "our own choice"
    serves: ClassVar[str] = "vision-language models (transformers)"
    keeps: ClassVar[str] = "visual tokens, the first ones"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "tail_kept": Metric(
            "Visual tokens before the tail", unit="share", how="counted", group="size"
        )
    }
    used: ClassVar[str] = "tail_kept"

    name: Literal["taildrop"] = "taildrop"
    keep: Fraction = 0.9
    """Fraction of the visual tokens that are kept."""

    def kept(self) -> str:
        """The fraction."""
        return f"{self.keep:.0%}"

    def count(self, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The share over all batches."""
        total, kept = (sum(batch[name] for batch in facts) for name in ("total", "kept"))
        return {"tail_kept": kept / total} if total else {}

    def attach(self, model: Any) -> AbstractContextManager[Handle]:
        """Hide the tokens until the context is left."""
        from compress.methods.taildrop.hook import attached

        return attached(self.keep, model)
