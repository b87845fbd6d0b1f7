"""Shorten the sequences of a batch: what is left stands at the right, padding at the left."""

from typing import Any

import torch


def attended_tokens(mask: Any, batch: int, length: int, device: torch.device | str) -> torch.Tensor:
    """Which tokens of a prompt are no padding, ``(batch, length)`` bool.

    Parameters
    ----------
    mask : as a decoder is given it: None, ``(batch, length)``, or what ``generate`` makes of it for
        a static cache, ``(batch, 1, length, cache)``, in a dict by layer type.
    batch, length : of the prompt.
    device : of the result.
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.ndim == 4:  # what the last token sees
        mask = mask[:, 0, -1, :length]
        mask = mask if mask.dtype == torch.bool else mask == 0
    return mask.to(device).bool()


def check_padding(attended: torch.Tensor) -> None:
    """Raise ValueError unless padding stands at the left only, in ``(batch, length)``."""
    if bool((attended[:, :-1] & ~attended[:, 1:]).any()):
        raise ValueError(
            "padding on the left is expected, as a pruned prompt is padded there; got an "
            "attention_mask with padding behind tokens; pad on the left"
        )


def shortened(stays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What to gather so that the tokens that stay stand at the right, in their order.

    Parameters
    ----------
    stays : ``(batch, length)`` bool.

    Returns
    -------
    Indices ``(batch, shorter)``, as many as the longest sequence needs, and which of them are
    tokens ``(batch, shorter)``; the others are padding.
    """
    longest = int(stays.sum(1).max())
    indices = stays.int().argsort(dim=1, stable=True)[:, stays.shape[1] - longest :]
    return indices, stays.gather(1, indices)
