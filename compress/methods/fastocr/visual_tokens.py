"""Where the visual tokens of a batch of prompts are in its cache."""

from collections.abc import Callable, Sequence
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
    listed : the rows as int32, as a kernel is given them.
    text, text_valid : the same of all other rows of the prompt, ``(batch, others)``.
    min_visual : a sequence with fewer visual tokens attends to all of them.
    """

    layouts: Sequence[VisualLayout]
    length: int
    counts: list[int]
    rows: torch.Tensor
    valid: torch.Tensor
    listed: torch.Tensor
    text: torch.Tensor
    text_valid: torch.Tensor
    min_visual: int = 0

    @property
    def even(self) -> bool:
        """Whether all sequences have as many visual tokens, so that nothing is padding."""
        return len(set(self.counts)) == 1

    @property
    def small(self) -> list[bool]:
        """Which sequences have visual tokens, but fewer than ``min_visual``."""
        return [0 < count < self.min_visual for count in self.counts]

    def budgets(self, size: Callable[[int], int]) -> list[int]:
        """How many visual tokens each sequence attends to, where ``size`` says it of their number.

        It depends on the sequence alone: what a page is read as does not depend on its batch.
        """
        return [
            count if small else size(count)
            for count, small in zip(self.counts, self.small, strict=True)
        ]

    @classmethod
    def of(
        cls,
        layouts: Sequence[VisualLayout],
        length: int,
        device: torch.device,
        min_visual: int = 0,
    ) -> Self:
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
        text = visual.int().argsort(dim=1, stable=True)[:, : length - min(counts)].int()
        text_valid = torch.arange(text.shape[1], device=device) < length - size
        return cls(layouts, length, counts, rows, valid, rows.int(), text, text_valid, min_visual)
