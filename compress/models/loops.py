"""Find answers that repeat themselves without end, and stop them. Our own choice throughout."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import StoppingCriteria

COPIES = 5
LONGEST = 256  # tokens of a copy
EVERY = 16  # steps between two looks


def ends_in_loop(tokens: torch.Tensor, least: int) -> torch.Tensor:
    """Whether answers end in ``COPIES`` exact copies or more of at most ``LONGEST`` tokens.

    A copy that is cut off counts by its length, since the piece may begin anywhere.

    Parameters
    ----------
    tokens : of the answers alone, ``(batch, new tokens)``.
    least : tokens that the copies cover together, at least 2.

    Returns
    -------
    Booleans, ``(batch,)``, on the device of ``tokens``.
    """
    count = tokens.shape[1]
    longest = min(LONGEST, count // COPIES)
    if count < least or not longest:
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    periods = torch.arange(longest, 0, -1, device=tokens.device)
    covered = (periods * COPIES).clamp(min=least)
    last = tokens[:, -max(least, longest * COPIES) :]
    width = last.shape[1]
    # (batch, period, width): the last tokens, and those a period before each, without copies
    before = F.pad(tokens, (longest, 0), value=-1)[:, -width - longest : -1].unfold(1, width, 1)
    repeats = last[:, None] == before
    compared = torch.arange(width, 0, -1, device=tokens.device) <= (covered - periods)[:, None]
    return ((repeats | ~compared).all(2) & (covered <= count)).any(1)


class LoopStopper(StoppingCriteria):
    """Ends the answers of ``generate`` that end in a loop, each by itself.

    Parameters
    ----------
    batch, prompt : number of sequences, and of tokens of the prompt.
    least : as in :func:`ends_in_loop`.

    Attributes
    ----------
    stopped : length of each answer when it was stopped, ``(batch,)``; -1 of one that was not.
    """

    def __init__(self, batch: int, prompt: int, least: int) -> None:
        self.prompt = prompt
        self.least = least
        self.stopped = torch.full((batch,), -1)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which answers have ended in a loop by now, ``(batch,)``."""
        new = input_ids[:, self.prompt :]
        self.stopped = self.stopped.to(new.device)
        if new.shape[1] >= self.least and new.shape[1] % EVERY == 0:
            looping = ends_in_loop(new, self.least) & (self.stopped < 0)
            self.stopped = self.stopped.masked_fill(looping, new.shape[1])
        return self.stopped >= 0
