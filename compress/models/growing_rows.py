"""Rows of a cache at the beginning of a longer tensor, with room for more behind them."""

import torch

LEAST = 256  # rows that a layer takes in reserve
SHARE = 16  # and at least this part of its length, so that a long cache is not copied more often


class Rows:
    """The longer tensor of a layer's keys, or of its values."""

    def __init__(self) -> None:
        self._room: torch.Tensor | None = None

    def behind(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """``held`` and, behind it, ``new``: ``(batch, heads, rows, dim)`` each.

        Only ``new`` is written where ``held`` is what an earlier call returned, or its beginning;
        anything else (another order of the sequences, a copy) is copied first. Where a gradient is
        required the two are concatenated, since autograd needs the tensors of earlier steps.
        """
        before = held.shape[2] if held.numel() else 0
        unlike = (held.dtype, held.shape[:2]) != (new.dtype, new.shape[:2])
        if (before and unlike) or (new.requires_grad and torch.is_grad_enabled()):
            return torch.cat([held, new], 2)
        rows = before + new.shape[2]
        room = self._room
        if room is None or rows > room.shape[2] or not _begins(room, held):
            reserve = max(LEAST, rows // SHARE)
            room = new.new_empty(*new.shape[:2], rows + reserve, new.shape[3])
            if before:
                room[:, :, :before] = held
            self._room = room
        room[:, :, before:rows] = new
        return room[:, :, :rows]


def _begins(room: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether ``held`` is the first rows of ``room``, which may be written here."""
    return (
        held.data_ptr() == room.data_ptr()
        and held.shape[:2] == room.shape[:2]
        and held.stride() == room.stride()
        and room.is_inference() <= torch.is_inference_mode_enabled()
    )
