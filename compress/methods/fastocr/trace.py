"""Record what a model attended to while it wrote a page: for figures, not for speed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from compress.methods.fastocr.choosing import SummaryPolicy
from compress.methods.fastocr.fixation import Fixation
from compress.methods.fastocr.hooks import attached
from compress.methods.fastocr.policy import AttentionPolicy, make_policy
from compress.methods.fastocr.visual_tokens import VisualTokens
from compress.models.visual import VisualLayout

if TYPE_CHECKING:
    from compress.methods.fastocr.method import FastOCR


class _RecordedPolicy:
    """A policy that also keeps what the last layer attends to in each step."""

    def __init__(self, policy: AttentionPolicy, layers: int) -> None:
        self.policy = policy
        self.periphery, self.head_reduce = policy.periphery, policy.head_reduce
        self.start_step, self.needs_scores = policy.start_step, policy.needs_scores
        self.observe = policy.observe
        self.settled = False  # a step that is replayed would not be seen
        self.last = layers - 1
        self.steps: list[torch.Tensor | None] = []

    def fixation(self, layer: int) -> Fixation | None:
        """The fixation of the policy."""
        fixation = self.policy.fixation(layer)
        if layer == self.last:
            self.steps.append(None if fixation is None else _tokens(fixation))
        return fixation


class _RecordedSummaries:
    """What summaries open in the last layer in each step."""

    def __init__(self, policy: SummaryPolicy, layers: int) -> None:
        self.rows = policy.tokens.rows[0]
        self.last = layers - 1
        self.steps: list[torch.Tensor | None] = []
        policy.watch = self.watch

    def watch(self, layer: int, rows: torch.Tensor) -> None:
        """Keep the tokens of these rows of the cache, of the only sequence."""
        if layer == self.last:
            self.steps.append(torch.searchsorted(self.rows, rows[0].long().unique()).cpu())


def _tokens(fixation: Fixation) -> torch.Tensor:
    """Of the only sequence; a copy, since the policy writes the next choice into its place."""
    index = fixation.index[0]
    kept = index.clone() if fixation.valid is None else index[fixation.valid[0]]
    return kept.cpu()


def trace(
    method: "FastOCR", model: Any, inputs: Mapping[str, Any], max_new_tokens: int
) -> tuple[torch.Tensor, VisualLayout, list[torch.Tensor | None]]:
    """Transcribe one page, and record what was attended to.

    Parameters
    ----------
    method, model : the model must not have the method applied; another one may be.
    inputs : of one sequence, of :func:`compress.models.visual.build_prompt`.
    max_new_tokens : of the answer.

    Returns
    -------
    ids : of the answer, ``(tokens,)``.
    layout : of the prompt as the decoder read it.
    steps : for each of the answer's tokens but the first, which the prompt gives, the visual tokens
        that the last layer attended to, ``(kept,)``, as places in that layout; None for all. Where
        summaries choose, those that any of its key heads opened.
    """
    policies: list[_RecordedPolicy | _RecordedSummaries] = []
    layouts: list[VisualLayout] = []

    def make_recorded(tokens: VisualTokens, layers: int) -> AttentionPolicy | SummaryPolicy:
        layouts.append(tokens.layouts[0])
        policy = make_policy(method, tokens, layers)
        if isinstance(policy, SummaryPolicy):
            policies.append(_RecordedSummaries(policy, layers))
            return policy
        recorded = _RecordedPolicy(policy, layers)
        policies.append(recorded)
        return recorded

    with attached(model, make_recorded):
        whole = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return whole[0, inputs["input_ids"].shape[1] :], layouts[0], policies[0].steps
