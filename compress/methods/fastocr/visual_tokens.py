"""Where the visual tokens of a batch of prompts are in its cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from compress.methods.fastocr.fixation import visual_scores
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

    def scores(self, weights: torch.Tensor) -> torch.Tensor:
        """Attention over the visual tokens, ``(batch, visual)``, of that over the cache."""
        return visual_scores(weights, self.rows, None if self.even else self.valid)

    def joined(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of visual tokens, and behind them all others of the prompt, int32.

        The rows are those of all key heads, ``(batch, kept)``, or of each one, ``(batch, kv_heads,
        kept)``.
        """
        text = self.text if rows.ndim == 2 else self.text[:, None].expand(-1, rows.shape[1], -1)
        return torch.cat([rows, text], -1)

    def gathered(self, part: torch.Tensor) -> torch.Tensor:
        """Keys or values of the visual tokens, ``(batch, kv_heads, visual, dim)``, of a cache."""
        rows = self.rows[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])
        return part.gather(2, rows)

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
        visual = np.zeros((len(counts), max(counts)), np.int64)
        others = np.zeros((len(counts), length - min(counts)), np.int32)
        for row, layout in enumerate(layouts):
            positions = layout.positions.numpy()
            visual[row, : len(positions)] = positions
            others[row, : length - len(positions)] = np.delete(np.arange(length), positions)
        size = np.array(counts)[:, None]
        real = [np.arange(visual.shape[1]) < size, np.arange(others.shape[1]) < length - size]
        rows, listed, text, valid, text_valid = _moved(
            [visual, visual.astype(np.int32), others, *real], device
        )
        return cls(layouts, length, counts, rows, valid, listed, text, text_valid, min_visual)


def _moved(parts: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Arrays as tensors on a device, by one copy, which is not waited for.

    The widest numbers come first, so that all are aligned.
    """
    packed = np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])
    memory = torch.from_numpy(packed).to(device, non_blocking=True)
    pieces = memory.split([part.nbytes for part in parts])
    return [
        piece.view(torch.from_numpy(part).dtype).view(part.shape)
        for piece, part in zip(pieces, parts, strict=True)
    ]
