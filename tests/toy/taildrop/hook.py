"""Hide visual tokens from a running model."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Counter:
    """How many visual tokens there were, and how many were kept."""

    def __init__(self) -> None:
        self.reset()

    def facts(self) -> dict[str, Any]:
        """Both counts."""
        return {"total": self.total, "kept": self.kept}

    def reset(self) -> None:
        """Count from zero."""
        self.total = self.kept = 0


@contextmanager
def attached(keep: float, model: Any) -> Iterator[Counter]:
    """Mask the last visual tokens of each prompt, in the prompt and in the steps behind it."""
    counter = Counter()
    hidden = torch.empty(0)

    def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal hidden
        ids, given = kwargs.get("input_ids"), kwargs.get("attention_mask")
        visual = ids == model.config.image_token_id if ids is not None else None
        if visual is not None and visual.any():
            hidden = torch.zeros_like(visual)
            for row, places in zip(hidden, visual, strict=True):
                positions = places.nonzero()[:, 0]
                kept = math.ceil(keep * len(positions))
                row[positions[kept:]] = True
                counter.total += len(positions)
                counter.kept += kept
        if hidden.any() and given is not None and given.ndim == 2:
            given = given.clone()
            given[:, : hidden.shape[1]][hidden] = 0
            return args, kwargs | {"attention_mask": given}
        return None

    hook = model.register_forward_pre_hook(mask, with_kwargs=True)
    try:
        yield counter
    finally:
        hook.remove()
