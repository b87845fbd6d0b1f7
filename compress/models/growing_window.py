"""Unlimited-OCR's cache: the whole prompt, and a window over the answer, in one tensor."""

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.models.unlimited_ocr import modeling_unlimited_ocr

from compress.models.growing_rows import Rows

_Layer = modeling_unlimited_ocr.UnlimitedOcrDynamicReferenceSlidingWindowLayer


class GrowingWindowLayer(_Layer):  # type: ignore[misc,valid-type]
    """A step writes the window, which slides, behind the prompt, and does not copy the prompt."""

    prefill_keys: torch.Tensor
    prefill_values: torch.Tensor
    _layer_type = None  # a class that has one takes the place of its parent in every cache

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self._layer_type = _Layer._layer_type
        self._rows = Rows(), Rows()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens; keys and values of the prompt, then of the window and the new ones."""
        if self.prefill_length is None or self.prefill_cumulative_length < self.prefill_length:
            return super().update(key_states, value_states)
        window = DynamicSlidingWindowLayer.update(self, key_states, value_states)
        prompt = self.prefill_keys, self.prefill_values
        both = [r.behind(p, w) for r, p, w in zip(self._rows, prompt, window, strict=True)]
        self.prefill_keys, self.prefill_values = (
            part[:, :, : p.shape[2]] for part, p in zip(both, prompt, strict=True)
        )
        return both[0], both[1]
