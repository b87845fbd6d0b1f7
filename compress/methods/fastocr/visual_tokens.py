"""Where the visual tokens of a batch of prompts are in its cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from compress.models.visual import VisualLayout


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of a batch of prompts, and all its other tokens.

    Parameters
    ----------
    layouts : one per sequence, of the prompt as the text model read it.
    length : of the prompt, padding included.
    counts : visual tokens of each sequence.
    rows, valid : their rows in the cache, and which are not padding, ``(batch, visual)``.
    text, text_valid : the same of all other rows of the prompt, ``(batch, others)``.
    """

    layouts: Sequence[VisualLayout]
    length: int
    counts: list[int]
    rows: torch.Tensor
    valid: torch.Tensor
    text: torch.Tensor
    text_valid: torch.Tensor

    @classmethod
    def of(cls, layouts: Sequence[VisualLayout], length: int, device: torch.device) -> Self:
        """Those of a prompt with these layouts and this length; see the class."""
        counts = [len(layout.positions) for layout in layouts]
        rows = torch.nn.utils.rnn.pad_sequence(
            [layout.positions.to(device) for layout in layouts], batch_first=True
        )
        size = torch.tensor(counts, device=device)[:, None]
        valid = torch.arange(max(counts), device=device) < size
        visual = torch.zeros(len(counts), length, dtype=torch.bool, device=device)
        for row, layout in zip(visual, layouts, strict=True):
            row[layout.positions.to(device)] = True
        # False sorts first, and the sort is stable: the others in their order
        text = visual.int().argsort(dim=1, stable=True)[:, : length - min(counts)]
        text_valid = torch.arange(text.shape[1], device=device) < length - size
        return cls(layouts, length, counts, rows, valid, text, text_valid)
