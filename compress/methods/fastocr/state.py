"""What is known about one prompt while its answer is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from compress.methods.fastocr.attention import focal_decode, peripheral_decode, sparse_decode
from compress.methods.fastocr.fixation import Fixation, visual_scores
from compress.methods.fastocr.periphery import Periphery
from compress.models.visual import VisualLayout

SUMMED = 64  # counts of a layer that wait to be summed
Read = tuple[torch.Tensor, torch.Tensor, tuple[int, int], torch.Tensor | None]


@dataclass(frozen=True)
class Pages:
    """Where the visual tokens of a batch of prompts are in its cache.

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
    def of(cls, layouts: Sequence[VisualLayout], length: int, device: torch.device) -> "Pages":
        """The pages of a prompt of that length; see the class."""
        counts = [len(layout.positions) for layout in layouts]
        rows = torch.nn.utils.rnn.pad_sequence(
            [layout.positions.to(device) for layout in layouts], batch_first=True
        )
        size = torch.tensor(counts, device=device)[:, None]
        valid = torch.arange(max(counts), device=device) < size
        visual = torch.zeros(len(counts), length, dtype=torch.bool, device=device)
        for row, layout in zip(visual, layouts, strict=True):
            row[layout.positions.to(device)] = True
        # False sorts first, and stably: the others in their order
        text = visual.int().argsort(dim=1, stable=True)[:, : length - min(counts)]
        text_valid = torch.arange(text.shape[1], device=device) < length - size
        return cls(layouts, length, counts, rows, valid, text, text_valid)


class Gaze(Protocol):
    """Decides what each layer reads, and learns from what it saw.

    Attributes
    ----------
    periphery : summaries per key head of what a layer does not read; 0 is none.
    """

    periphery: int

    def start_step(self) -> None:
        """A decode step begins."""

    def fixation(self, layer: int) -> Fixation | None:
        """What the layer reads of the visual tokens; None is all."""

    def wants_scores(self, layer: int) -> bool:
        """Whether a layer that reads all should say how the attention lies."""

    def see(self, layer: int, scores: torch.Tensor) -> int | torch.Tensor:
        """Take a layer's scores ``(batch, visual)``; how many sequences jumped just now."""


class Counts:
    """What the attention function did, over all requests since the last reset.

    Attributes
    ----------
    steps : decode steps, summed over the sequences.
    offered : visual tokens in the cache, summed over these.
    attended : per layer, visual tokens and summaries attended to; their sum is over these.
    refreshes : of these steps, those in which the guard opened the fixation.
    dense : visual tokens that every layer attended to in steps of requests that were switched off.
    switched_off : sequences of such requests.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.steps = 0
        self.offered = 0
        self.attended: list[list[int | torch.Tensor]] = [[] for _ in range(self.layers)]
        self.refreshes: int | torch.Tensor = 0
        self.dense = 0
        self.switched_off = 0

    def attend(self, layer: int, tokens: int | torch.Tensor) -> None:
        """Add what a layer reads in a step.

        Numbers on the device stay there until somebody asks, since reading one would stop it, and
        are summed some at a time, since a sum at every layer would cost as much as the layer.
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


class Request:
    """One batch of prompts from its prefill to its last token.

    Parameters
    ----------
    pages : where its visual tokens are.
    gaze : decides what each layer reads.
    counts : where this request's reads are added.
    off : leave its steps to dense attention, and only count them.
    """

    def __init__(self, pages: Pages, gaze: Gaze, counts: Counts, off: bool = False) -> None:
        self.pages = pages
        self.gaze = gaze
        self.counts = counts
        self.off = off
        self.counts.switched_off += off * len(pages.counts)
        self.length = pages.length  # of the sequences in the cache
        self._last: tuple[Any, ...] = ()
        self._around: dict[int, Periphery] = {}  # by layer, from its first sparse step

    def start_step(self) -> None:
        """One token of each sequence is about to be read."""
        self.length += 1
        self.counts.steps += len(self.pages.counts)
        self.counts.offered += sum(self.pages.counts)
        if self.off:
            self.counts.dense += sum(self.pages.counts)
            return
        self.gaze.start_step()

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
        fixation = self.gaze.fixation(layer)
        if fixation is not None:
            read, attended = self._read(fixation, key.shape[2], mask)
            self.counts.attend(layer, attended)
            if not self.gaze.periphery:
                return sparse_decode(query, key, value, *read, scaling)
            if layer not in self._around:
                self._around[layer] = self._grouped(key, value)
            output, summaries = peripheral_decode(
                query, key, value, *read, scaling, self._around[layer], fixation
            )
            self.counts.attend(layer, summaries)
            return output
        self.counts.attend(layer, self._all(mask))
        # a dense layer is computed in the same way whether or not somebody wants its scores
        output, weights = focal_decode(query, key, value, mask, scaling)
        if self.gaze.wants_scores(layer):
            scores = visual_scores(weights, self.pages.rows, self.pages.valid)
            self.counts.refreshes += self.gaze.see(layer, scores)
        return output

    def _all(self, mask: torch.Tensor | None) -> int | torch.Tensor:
        """Visual tokens that a layer attends to when it reads all."""
        if mask is None:
            return sum(self.pages.counts)
        return _number(_allowed(self.pages.rows, self.pages.valid, mask))

    def _grouped(self, key: torch.Tensor, value: torch.Tensor) -> Periphery:
        """The visual tokens of a layer in groups that are alike."""
        rows = self.pages.rows[:, None, :, None]
        keys, values = (
            part.gather(2, rows.expand(-1, part.shape[1], -1, part.shape[3]))
            for part in (key, value)
        )
        return Periphery.of(keys, values, self.pages.valid, self.gaze.periphery)

    def _read(
        self, fixation: Fixation, stored: int, mask: torch.Tensor | None
    ) -> tuple[Read, torch.Tensor]:
        """What to read of the prompt and of what was written since, each with its mask.

        The rows of the prompt, their mask, the range of what was written and its mask; and how many
        visual tokens are read. The same for many layers.
        """
        key = id(fixation), id(mask), stored, self.length
        if self._last and self._last[0] == key:
            return self._last[1]
        pages = self.pages
        rows = torch.cat([pages.rows.gather(1, fixation.index), pages.text], 1)
        valid = torch.cat([fixation.valid, pages.text_valid], 1)
        allowed = _allowed(rows, valid, mask)
        # a static cache has more rows than tokens, a sliding one fewer
        dense = pages.length, min(stored, self.length)
        dense_allowed = None if mask is None else _row_mask(mask, len(rows))[:, slice(*dense)]
        attended = _number(allowed[:, : fixation.index.shape[1]])
        read = (rows, allowed, dense, dense_allowed), attended
        self._last = key, read, fixation, mask  # both are held so that nothing takes their ids
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
    """Of all, with one sum on the device."""
    counted = [number for number in numbers if isinstance(number, torch.Tensor)]
    known = sum(number for number in numbers if not isinstance(number, torch.Tensor))
    return torch.stack(counted).sum() + known if counted else known


def _number(allowed: torch.Tensor) -> torch.Tensor:
    if allowed.dtype == torch.bool:
        return allowed.sum()
    return (allowed > torch.finfo(allowed.dtype).min / 2).sum()
