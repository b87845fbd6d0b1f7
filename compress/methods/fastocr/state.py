"""What is known about one batch of prompts while its answers are decoded."""

from typing import Any

import torch

from compress.methods.fastocr.attention import (
    choose_rows,
    focal_decode,
    peripheral_decode,
    sparse_decode,
)
from compress.methods.fastocr.choosing import SummaryPolicy
from compress.methods.fastocr.fixation import Fixation
from compress.methods.fastocr.periphery import Periphery
from compress.methods.fastocr.policy import AttentionPolicy
from compress.methods.fastocr.visual_tokens import VisualTokens
from compress.models.captured_call import CapturedCall

Read = tuple[torch.Tensor, torch.Tensor | None, tuple[int, int], torch.Tensor | None]
Number = int | torch.Tensor
PIECE = 512  # rows of an answer in a static cache that are read at a time, written or not


class Counts:
    """What the attention function did, over all batches since the last reset.

    The numbers of a step are added up on the device, in the same memory: reading one would wait for
    it, and a step that is replayed as a graph counts too.

    Attributes
    ----------
    dense : visual tokens that every layer attended to in steps of batches that were switched off.
    dense_steps : these steps, summed over the sequences.
    switched_off : sequences that attended to all for they have few visual tokens.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        # of the step: sequences, visual tokens in the cache, sequences for which the guard opened
        # the fixation, and, layer by layer, visual tokens and summaries attended to
        self._step: list[Number] = []
        self._totals: torch.Tensor | None = None
        self._known: dict[tuple[Number, ...], torch.Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self._step.clear()
        if self._totals is not None:
            self._totals.zero_()
        self.dense = 0
        self.dense_steps = 0
        self.switched_off = 0

    def start_step(self, sequences: int, visual: int, device: torch.device) -> None:
        """Begin a step of so many sequences with so many visual tokens."""
        if self._totals is None:
            self._totals = torch.zeros(3 + self.layers, dtype=torch.long, device=device)
        self.settle()
        self._step[:] = [sequences, visual, 0, *[0] * self.layers]

    def refresh(self, sequences: Number) -> None:
        """Add sequences for which the guard opened the fixation."""
        self._put(2, sequences)

    def attend(self, layer: int, tokens: Number) -> None:
        """Add what a layer attends to in this step."""
        self._put(3 + layer, tokens)

    def _put(self, place: int, number: Number) -> None:
        before = self._step[place]  # a sum on the device is left out where there is nothing yet
        self._step[place] = number if isinstance(before, int) and not before else before + number

    def settle(self) -> None:
        """Add up the step, of which all is counted: with one kernel where all is known.

        Part of the step, as a graph of the next one must not read what this one has given back.
        """
        if self._totals is None or not self._step:
            return
        step, device = tuple(self._step), self._totals.device
        self._step.clear()
        if any(isinstance(number, torch.Tensor) for number in step):
            numbers = [self._constant(number, device) for number in step]
            self._totals.add_(torch.stack(numbers))
        else:
            self._totals.add_(self._constant(step, device))

    def _constant(self, value: Any, device: torch.device) -> torch.Tensor:
        """On the device, where a number that is known is copied to once."""
        if isinstance(value, torch.Tensor):
            return value
        if value not in self._known:
            self._known[value] = torch.tensor(value, device=device)
        return self._known[value]

    def forget(self) -> None:
        """Leave out the step, which failed."""
        self._step.clear()

    def facts(self) -> dict[str, Any]:
        """The counts as JSON; shares are None before the first decode step."""
        self.settle()
        totals = [0] * (3 + self.layers) if self._totals is None else self._totals.tolist()
        steps, offered = totals[0] + self.dense_steps, totals[1] + self.dense
        shares = [(n + self.dense) / offered for n in totals[3:]] if offered else None
        return {
            "steps": steps,
            "visual_tokens": offered / steps if steps else None,
            "attended_by_layer": shares,
            "attended": sum(shares) / len(shares) if shares else None,
            "refreshes": totals[2] / steps if steps else None,
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
    off : whether no sequence has enough visual tokens, or any at all, or summaries would open all
        of them: its steps are dense, and only counted.
    repeated : steps up to the last one that did the same, but for values on the device. The first
        makes what the others only use.
    kinds : of the inputs of the last step that may be captured.
    captured : a step that is replayed where the cache allows it.
    """

    def __init__(
        self, tokens: VisualTokens, policy: AttentionPolicy | SummaryPolicy, counts: Counts
    ) -> None:
        self.tokens = tokens
        self.policy = policy
        self.counts = counts
        self.off = max(tokens.counts) < max(tokens.min_visual, 1)
        if isinstance(policy, SummaryPolicy):
            self.off = self.off or policy.whole
        self.counts.switched_off += sum(tokens.small)
        self.length = tokens.length  # of the sequences in the cache
        self._last: tuple[Any, ...] = ()  # what the last sparse layer of the step read
        self._periphery: dict[int, Periphery] = {}  # by layer, from its first sparse step
        self.repeated = 0
        self.kinds: Any = None
        self.captured: CapturedCall | None = None

    def start_step(self) -> None:
        """Begin a step, which reads one new token of each sequence."""
        if self.begins_piece:
            self.repeated, self.captured = 0, None
        self.length += 1
        self.repeated += 1
        if self.off:
            return
        visual = sum(self.tokens.counts)
        self.counts.start_step(len(self.tokens.counts), visual, self.tokens.rows.device)
        self._last = ()
        self.policy.start_step()
        if not self.policy.settled:
            self.repeated = 0

    def follow(self, tokens: int) -> None:
        """Count a later turn of so many tokens, which a step captured before it may not read."""
        self.length += tokens
        self.repeated, self.captured = 0, None

    @property
    def begins_piece(self) -> bool:
        """Whether the next step over a static cache reads more rows than the last one."""
        return (self.length - self.tokens.length) % PIECE == 0

    def count_dense(self) -> None:
        """Count a step that has succeeded, where it was dense; a replay counts the others."""
        visual = sum(self.tokens.counts)
        if self.off and visual:
            self.counts.dense_steps += len(self.tokens.counts)
            self.counts.dense += visual

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
        if isinstance(self.policy, SummaryPolicy):
            return self._choose(self.policy, layer, query, key, value, mask, scaling)
        dense = None
        if self.policy.needs_scores(layer):
            reduce = self.policy.head_reduce
            dense, weights = focal_decode(query, key, value, mask, scaling, reduce)
            self.counts.refresh(self.policy.observe(layer, weights))
            self._last = ()
        fixation = self.policy.fixation(layer)
        if fixation is None:
            self.counts.attend(layer, sum(self.tokens.counts))
            if dense is None:
                # computed in the same way whether or not the scores are needed
                dense, _ = focal_decode(query, key, value, mask, scaling)
            return dense
        read, attended = self._read(fixation, key.shape[2], mask)
        self.counts.attend(layer, attended)
        if not self.policy.periphery:
            return sparse_decode(query, key, value, *read, scaling)
        if layer not in self._periphery:
            keys, values = self.tokens.gathered(key), self.tokens.gathered(value)
            self._periphery[layer] = Periphery.of(
                keys, values, self.tokens.valid, self.policy.periphery
            )
        output, summaries = peripheral_decode(
            query, key, value, *read, scaling, self._periphery[layer], fixation
        )
        self.counts.attend(layer, summaries)
        return output

    def _choose(
        self,
        policy: SummaryPolicy,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Attention to the groups that the query opens, and to the means of the rest."""
        index = policy.index(layer, key, value)
        rows, bias = choose_rows(query, index, policy.budgets, max(policy.kept), scaling)
        if policy.watch:
            policy.watch(layer, rows)
        self.counts.attend(layer, index.read)
        read = self._masked(self.tokens.joined(rows), policy.valid, key.shape[2], mask)
        return sparse_decode(query, key, value, *read, scaling, (index.keys, index.values, bias))

    def _read(
        self, fixation: Fixation, stored: int, mask: torch.Tensor | None
    ) -> tuple[Read, Number]:
        """The rows to read of the prompt and of the answer, each with its mask.

        Returns
        -------
        Rows of the prompt, their mask, the range of the answer and its mask; and the number of
        visual tokens among them. The same for many layers.
        """
        last = self._last
        if last and last[0] is fixation and last[1] is mask and last[2] == stored:
            return last[3]
        listed = fixation.listed
        if listed is None:
            listed = self.tokens.joined(self.tokens.listed.gather(1, fixation.index))
        read = self._masked(listed, fixation.valid, stored, mask), fixation.size()
        self._last = fixation, mask, stored, read
        return read

    def _masked(
        self,
        listed: torch.Tensor,
        valid: torch.Tensor | None,
        stored: int,
        mask: torch.Tensor | None,
    ) -> Read:
        """What a layer reads, as in :meth:`_read`, with this list of the prompt's rows.

        Parameters
        ----------
        listed : of :meth:`VisualTokens.joined`.
        valid : which of its visual tokens are not padding, ``(batch, kept)``; None is all.
        """
        tokens = self.tokens

        def of_heads(part: torch.Tensor) -> torch.Tensor:
            return part if listed.ndim == 2 else part[:, None].expand(-1, listed.shape[1], -1)

        allowed = None
        if valid is not None or not tokens.even:
            if valid is None:
                kept = listed.shape[-1] - tokens.text.shape[1]
                valid = torch.ones(len(listed), kept, dtype=torch.bool, device=listed.device)
            allowed = of_heads(torch.cat([valid, tokens.text_valid], 1))
        dense, dense_allowed = (tokens.length, min(stored, self.length)), None
        if mask is not None:
            seen = mask[:, 0, 0].expand(len(listed), -1)
            # padding of the list is any number on a GPU
            places = listed.long() if allowed is None else listed.long() * allowed
            allowed = _and(of_heads(seen).gather(-1, places), allowed)
            # of a static cache as many as the next steps read: the mask hides those that are not
            # written yet
            pieces = -(-(self.length - tokens.length) // PIECE)
            dense = tokens.length, min(stored, tokens.length + pieces * PIECE)
            dense_allowed = seen[:, slice(*dense)]
        return listed, allowed, dense, dense_allowed


def _and(seen: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """A mask of either kind, of what is not padding alone; None is all."""
    if valid is None:
        return seen
    return seen & valid if seen.dtype == torch.bool else seen.masked_fill(~valid, -torch.inf)
