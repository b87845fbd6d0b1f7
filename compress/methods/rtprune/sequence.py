"""Where the pages of a batch are in its prompts, and how these get shorter, padded on the left.

All of it is indices, and computed on the CPU.
"""

from collections.abc import Sequence
from typing import Any

import torch

from compress.models.visual import VisualLayout


def attended_tokens(mask: Any, batch: int, length: int) -> torch.Tensor:
    """Which tokens of a prompt are not padding, ``(batch, length)`` bool, on the CPU.

    Parameters
    ----------
    mask : of a call of the decoder: None, ``(batch, length)``, or, from ``generate`` with a static
        cache, ``(batch, 1, length, cache)`` in a dict by layer type.
    batch, length : of the prompt.
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool)
    if mask.ndim == 4:  # of the last token; added to the scores unless it is boolean
        mask = mask[:, 0, -1, :length]
        mask = mask if mask.dtype == torch.bool else mask == 0
    return mask.bool().cpu()


def pages_in(layouts: Sequence[VisualLayout]) -> list[tuple[int, torch.Tensor]]:
    """Sequence and positions of each page of a batch."""
    return [
        (row, layout.positions[layout.image_of == number])
        for row, layout in enumerate(layouts)
        for number in layout.image_of.unique()
    ]


def shortened(stays: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """What to gather so that the tokens that stay are at the right, in their order.

    Parameters
    ----------
    stays : ``(batch, length)`` bool.
    attended : which tokens were not padding, ``(batch, length)`` bool.

    Returns
    -------
    Position of each token of the new sequence in the old one, -1 for padding, ``(batch, shorter)``:
    as long as the longest sequence needs.

    Raises
    ------
    ValueError : when padding is not on the left.
    """
    if bool((attended[:, :-1] & ~attended[:, 1:]).any()):
        raise ValueError(
            "RTPrune expects padding on the left, where it pads a pruned prompt; got an "
            "attention_mask with padding behind tokens; pad on the left"
        )
    longest = int(stays.sum(1).max())
    # False sorts first, and the sort is stable
    source = stays.int().argsort(dim=1, stable=True)[:, stays.shape[1] - longest :]
    return source.masked_fill(~stays.gather(1, source), -1)
