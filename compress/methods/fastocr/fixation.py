"""Pure functions from attention scores to the visual tokens that a layer attends to.

``batch`` sequences have at most ``visual`` visual tokens and at most ``kept`` of them in the
fixation; shorter ones are padded, and a mask marks what is not padding. Scores are float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

HeadReduce = Literal["mean", "max"]


@dataclass(frozen=True)
class Fixation:
    """The visual tokens that a layer attends to.

    Parameters
    ----------
    index : which of a sequence's visual tokens, ``(batch, kept)``.
    valid : False where ``index`` is padding, ``(batch, kept)``; None where nothing is.
    listed : the same tokens as rows of the cache, and behind them the prompt's rows that are not
        visual, int32, ``(batch, kept + others)``; None where they are still to be looked up.
    """

    index: torch.Tensor
    valid: torch.Tensor | None
    listed: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Fixation":
        """The same on a device."""
        return Fixation(
            self.index.to(device), None if self.valid is None else self.valid.to(device)
        )

    def size(self) -> int | torch.Tensor:
        """Tokens without padding, of all sequences."""
        return self.index.numel() if self.valid is None else self.valid.sum()


def budget(keep: float, tokens: int, least: int = 0) -> int:
    """Number of visual tokens in a fixation: the smallest integer not below ``keep * tokens``.

    Parameters
    ----------
    keep, tokens : the share, and of how many.
    least : the floor; all tokens where there are no more.

    >>> budget(0.05, 300), budget(0.05, 301), budget(0.07, 100)
    (15, 16, 7)
    >>> budget(0.05, 300, 128), budget(0.05, 100, 128)
    (128, 100)
    """
    # 0.07 * 100 is a little more than 7
    return min(tokens, max(math.ceil(keep * tokens - 1e-9), least))


def same_mean_budget(kept: int, tokens: int, layers: int, dense: int, periphery: int = 0) -> int:
    """Tokens per layer of a baseline without dense layers that attends to as many on average.

    Parameters
    ----------
    kept, tokens : how many of the tokens a layer that is not dense attends to.
    layers, dense : of the text model; how many of them attend to all tokens.
    periphery : summaries that every layer which is not dense reads as well, in both methods.
    """
    around = min(periphery, tokens - kept)
    mean = math.ceil((dense * tokens + (layers - dense) * (kept + around)) / layers)
    return max(mean - around, 1) if tokens else 0


def visual_scores(
    weights: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """Attention over the visual tokens, ``(batch, visual)``.

    Parameters
    ----------
    weights : head-mean attention over the cache, ``(batch, length)``.
    rows : where the visual tokens are in the cache, ``(batch, visual)``.
    valid : which of them are not padding, whose scores are 0; None where nothing is padding.
    """
    scores = weights.gather(1, rows)
    return scores if valid is None else scores * valid


def shares(scores: torch.Tensor) -> torch.Tensor:
    """Attention over the visual tokens, renormalised to sum to 1 over them, ``(batch, visual)``.

    All 0 for a sequence whose visual tokens have no weight.
    """
    return scores / scores.sum(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def filled(budgets: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """Which places of a fixation are not padding, ``(batch, largest)``; None where none is."""
    if len(set(budgets)) == 1:
        return None
    places = np.arange(max(budgets, default=0)) < np.array(budgets)[:, None]
    return torch.from_numpy(places).to(device, non_blocking=True)


def top_k(
    scores: torch.Tensor,
    width: int,
    valid: torch.Tensor | None = None,
    near: torch.Tensor | None = None,
) -> Fixation:
    """The tokens with the highest scores, the best first, and of equal ones the first.

    Parameters
    ----------
    scores : ``(batch, visual)``, not negative; 0 for padding.
    width : how many to choose, at most.
    valid : of the sequence's own number, as in :func:`filled`.
    near : neighbours of each token on its page, itself included, ``(batch, visual, around)``. A
        token then ranks by the best score around it, and among equals by its own: the
        neighbours of the best tokens replace the last ones, and the number stays.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    if near is not None:
        around = scores.gather(1, near.flatten(1)).view(near.shape).amax(2)
        ranks = around.gather(1, order).argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, ranks)
    return Fixation(order[:, :width], valid)


def kept_mass(scores: torch.Tensor, fixation: Fixation) -> torch.Tensor:
    """Share of the attention over visual tokens that lies on a fixation, ``(batch,)``."""
    kept = scores.gather(1, fixation.index)
    return (kept if fixation.valid is None else kept * fixation.valid).sum(1)


def opened(fixation: Fixation, everything: torch.Tensor, valid: torch.Tensor) -> Fixation:
    """A fixation with all visual tokens of some sequences.

    Parameters
    ----------
    fixation : of the other sequences.
    everything : the sequences that get all of theirs, ``(batch,)`` bool.
    valid : which visual tokens are not padding, ``(batch, visual)``.
    """
    tokens = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    missing = valid.shape[1] - fixation.index.shape[1]
    index = torch.nn.functional.pad(fixation.index, (0, missing))
    chosen = fixation.valid
    if chosen is None:
        chosen = torch.ones_like(fixation.index, dtype=torch.bool)
    chosen = torch.nn.functional.pad(chosen, (0, missing))
    return Fixation(
        torch.where(everything[:, None], tokens, index),
        torch.where(everything[:, None], valid, chosen),
    )


def neighbours(grid: torch.Tensor, image_of: torch.Tensor, radius: int) -> torch.Tensor:
    """The tokens at most ``radius`` rows and columns away in the same view of the same image.

    Parameters
    ----------
    grid, image_of : of :class:`compress.models.visual.VisualLayout`. Newlines and separators
        (column -1) have no neighbours.
    radius : in rows and columns of the grid.

    Returns
    -------
    ``(tokens, (2 radius + 1)²)``; where there is no neighbour, the token itself.
    """
    tokens = torch.arange(len(grid), device=grid.device)
    # a margin on all sides keeps the end of a row apart from the beginning of the next one
    sizes = torch.cat([grid, grid.new_zeros(1, 3)]).amax(0) + 1 + 2 * radius
    place = torch.stack([image_of, *grid.T]) + grid.new_tensor([0, 0, radius, radius])[:, None]
    keys = ((place[0] * sizes[0] + place[1]) * sizes[1] + place[2]) * sizes[2] + place[3]
    keys = torch.where(grid[:, 2] >= 0, keys, -1 - tokens)  # apart from all others
    ordered, order = keys.sort()
    columns = []
    for down in range(-radius, radius + 1):
        for right in range(-radius, radius + 1):
            key = keys + down * sizes[2] + right
            slot = torch.searchsorted(ordered, key).clamp(max=len(grid) - 1)
            exists = (ordered[slot] == key) & (keys >= 0)
            columns.append(torch.where(exists, order[slot], tokens))
    return torch.stack(columns, 1)


def random_fixation(counts: Sequence[int], budgets: Sequence[int], seed: int) -> Fixation:
    """Tokens drawn without replacement; a sequence's do not depend on the rest of its batch.

    Parameters
    ----------
    counts, budgets : visual tokens of each sequence, and how many to draw of them.
    seed : of the draw.
    """
    width = max(budgets, default=0)
    index = torch.zeros(len(counts), width, dtype=torch.long)
    for row, (count, kept) in enumerate(zip(counts, budgets, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        index[row, :kept] = torch.randperm(count, generator=generator)[:kept]
    return Fixation(index, filled(budgets, index.device))


def last_fixation(counts: Sequence[int], budgets: Sequence[int]) -> Fixation:
    """The last tokens in reading order: what a sliding window over the prompt keeps."""
    width = max(budgets, default=0)
    kept = torch.tensor(budgets)[:, None]
    index = torch.tensor(counts)[:, None] - kept + torch.arange(width)
    inside = index < torch.tensor(counts)[:, None]
    return Fixation(index.where(inside, 0), filled(budgets, index.device))
