"""What is known about one batch of prompts while its answers are decoded."""

from collections.abc import Sequence
from typing import Any

import torch

from compress.methods.fastocr.attention import focal_decode, peripheral_decode, sparse_decode
from compress.methods.fastocr.fixation import Fixation, visual_scores
from compress.methods.fastocr.periphery import Periphery
from compress.methods.fastocr.policy import AttentionPolicy
from compress.methods.fastocr.visual_tokens import VisualTokens

SUMMED = 64  # counts of a layer that are kept before they are summed
Read = tuple[torch.Tensor, torch.Tensor, tuple[int, int], torch.Tensor | None]


class Counts:
    """What the attention function did, over all batches since the last reset.

    Attributes
    ----------
    steps : decode steps, summed over the sequences.
    offered : visual tokens in the cache, summed over these steps.
    attended : per layer, visual tokens and summaries attended to; their sum is over these steps.
    refreshes : those of these steps in which the guard opened the fixation.
    dense : visual tokens that every layer attended to in steps of batches that were switched off.
    switched_off : sequences that attended to all for they have few visual tokens.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.steps = 0
        self.offered = 0
        self.attended: list[list[int | torch.Tensor]] = [[] for _ in range(self.layers)]
        self.refreshes: int | torch.Tensor = 0
        self.dense = 0
        self.switched_off = 0

    def attend(self, layer: int, tokens: int | torch.Tensor) -> None:
        """Add what a layer attends to in a step.

        Numbers on the device stay there until :meth:`facts`, since reading one would wait for the
        device. They are summed some at a time, since a sum at every layer would cost as much as the
        layer.
        """
        numbers = self.attended[layer]
        numbers.append(tokens)
        if len(numbers) >= SUMMED:
            numbers[:] = [_sum(numbers)]

    def facts(self) -> dict[str, Any]:
        """The counts as JSON; shares are None before the first decode step."""
        shares = None
        if self.offered:
            shares = [(int(_sum(n)) + self.dense) / self.offered for n in self.attended]
        return {
            "steps": self.steps,
            "visual_tokens": self.offered / self.steps if self.steps else None,
            "attended_by_layer": shares,
            "attended": sum(shares) / len(shares) if shares else None,
            "refreshes": int(self.refreshes) / self.steps if self.steps else None,
            "switched_off": self.switched_off,
        }


class DecodeState:
    """One batch of prompts from its prefill to its last token.

    Parameters
    ----------
    tokens : where its visual tokens are.
    policy : decides what each layer attends to.
    counts : where this batch's steps are added.

    Attributes
    ----------
    off : whether no sequence has enough visual tokens: its steps are dense, and only counted.
    """

    def __init__(self, tokens: VisualTokens, policy: AttentionPolicy, counts: Counts) -> None:
        self.tokens = tokens
        self.policy = policy
        self.counts = counts
        self.off = max(tokens.counts) < max(tokens.min_visual, 1)
        self.counts.switched_off += sum(tokens.small)
        self.length = tokens.length  # of the sequences in the cache
        self._last: tuple[Any, ...] = ()
        self._periphery: dict[int, Periphery] = {}  # by layer, from its first sparse step

    def start_step(self) -> None:
        """Begin a step, which reads one new token of each sequence."""
        self.length += 1
        if not (visual := sum(self.tokens.counts)):
            return
        self.counts.steps += len(self.tokens.counts)
        self.counts.offered += visual
        if self.off:
            self.counts.dense += visual
            return
        self.policy.start_step()

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Attention of a decode step; shapes as in :mod:`compress.methods.fastocr.attention`."""
        fixation = self.policy.fixation(layer)
        needs_scores = self.policy.needs_scores(layer)
        if fixation is None or needs_scores:
            # a dense layer is computed in the same way whether or not its scores are needed
            output, weights = focal_decode(query, key, value, mask, scaling)
        if needs_scores:
            scores = visual_scores(weights, self.tokens.rows, self.tokens.valid)
            self.counts.refreshes += self.policy.observe(layer, scores)
        if fixation is None:
            self.counts.attend(layer, self._all(mask))
            return output
        read, attended = self._read(fixation, key.shape[2], mask)
        self.counts.attend(layer, attended)
        if not self.policy.periphery:
            return sparse_decode(query, key, value, *read, scaling)
        if layer not in self._periphery:
            self._periphery[layer] = self._group(key, value)
        output, summaries = peripheral_decode(
            query, key, value, *read, scaling, self._periphery[layer], fixation
        )
        self.counts.attend(layer, summaries)
        return output

    def _all(self, mask: torch.Tensor | None) -> int | torch.Tensor:
        """Number of visual tokens that a dense layer attends to."""
        if mask is None:
            return sum(self.tokens.counts)
        return _number(_allowed(self.tokens.rows, self.tokens.valid, mask))

    def _group(self, key: torch.Tensor, value: torch.Tensor) -> Periphery:
        """The visual tokens of a layer in groups of similar ones."""
        rows = self.tokens.rows[:, None, :, None]
        keys, values = (
            part.gather(2, rows.expand(-1, part.shape[1], -1, part.shape[3]))
            for part in (key, value)
        )
        return Periphery.of(keys, values, self.tokens.valid, self.policy.periphery)

    def _read(
        self, fixation: Fixation, stored: int, mask: torch.Tensor | None
    ) -> tuple[Read, torch.Tensor]:
        """The rows to read of the prompt and of the answer, each with its mask.

        Returns
        -------
        Rows of the prompt, their mask, the range of the answer and its mask; and the number of
        visual tokens among them. The same for many layers.
        """
        key = id(fixation), id(mask), stored, self.length
        if self._last and self._last[0] == key:
            return self._last[1]
        tokens = self.tokens
        rows = torch.cat([tokens.rows.gather(1, fixation.index), tokens.text], 1)
        valid = torch.cat([fixation.valid, tokens.text_valid], 1)
        allowed = _allowed(rows, valid, mask)
        # a static cache has more rows than tokens, a sliding one fewer
        dense = tokens.length, min(stored, self.length)
        dense_allowed = None if mask is None else _row_mask(mask, len(rows))[:, slice(*dense)]
        attended = _number(allowed[:, : fixation.index.shape[1]])
        read = (rows, allowed, dense, dense_allowed), attended
        self._last = key, read, fixation, mask  # both are held so that their ids stay theirs
        return read


def _row_mask(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """That of the cache's rows, ``(batch, length)``, from transformers' (batch, 1, 1, length)."""
    return mask[:, 0, 0].expand(batch, -1)


def _allowed(rows: torch.Tensor, valid: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mask of some rows, ``(batch, read)``, from that of the cache, (batch, 1, 1, length)."""
    if mask is None:
        return valid
    picked = _row_mask(mask, len(rows)).gather(1, rows)
    return picked & valid if mask.dtype == torch.bool else picked.masked_fill(~valid, -torch.inf)


def _sum(numbers: Sequence[int | torch.Tensor]) -> int | torch.Tensor:
    """The sum of all, with one sum on the device."""
    tensors = [number for number in numbers if isinstance(number, torch.Tensor)]
    known = sum(number for number in numbers if not isinstance(number, torch.Tensor))
    return torch.stack(tensors).sum() + known if tensors else known


def _number(allowed: torch.Tensor) -> torch.Tensor:
    """How many entries a mask allows."""
    if allowed.dtype == torch.bool:
        return allowed.sum()
    return (allowed > torch.finfo(allowed.dtype).min / 2).sum()
