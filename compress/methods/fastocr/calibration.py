"""Find the dense and the focal layers of a model while it answers prompts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor

from compress.methods.fastocr.fixation import budget
from compress.methods.fastocr.hooks import attached, decoder
from compress.methods.fastocr.policy import listed, make_policy
from compress.methods.fastocr.recall import (
    Matrix,
    Recorder,
    candidates,
    choose_focal_layers,
    default_count,
    greedy,
    means,
)
from compress.methods.fastocr.visual_tokens import VisualTokens

if TYPE_CHECKING:
    from compress.methods.fastocr.method import FastOCR

Answer = tuple[Mapping[str, Any], torch.Tensor, list[int]]  # to a batch of prompts


@dataclass(frozen=True)
class Calibration:
    """What answers to some prompts showed, and the layers that follow from it.

    Parameters
    ----------
    keep_visual, min_fixation : size of the fixations.
    focal_layers, dense_layers : the choice, in ascending order.
    focal_by : what the focal layers were chosen by; None where they were given.
    focus : share of each layer's attention over visual tokens that lies on its own top-k.
    min_focus : below which a layer is dense.
    loss : of the choice: mean over tokens of -log p of the dense model's answer.
    losses : of every layer in each round of the greedy choice by loss; None of those that are dense
        or chosen.
    attended_by_layer, attended : share of the visual tokens that each layer then attended to, and
        the mean over the layers.
    order, curve : layers in the order of a greedy choice by recall, and the mean recall with the
        first one, the first two, ... of them.
    recall, previous, steps : of :class:`compress.methods.fastocr.recall.Recalls`.
    """

    keep_visual: float
    min_fixation: int
    focal_layers: tuple[int, ...]
    dense_layers: tuple[int, ...]
    focal_by: str | None
    focus: tuple[float, ...]
    min_focus: float
    loss: float
    losses: Sequence[Sequence[float | None]]
    attended_by_layer: tuple[float, ...]
    attended: float
    order: tuple[int, ...]
    curve: tuple[float, ...]
    recall: Matrix
    previous: Matrix
    steps: int


def calibrate(
    method: "FastOCR",
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    max_new_tokens: int = 128,
) -> Calibration:
    """Let a model answer some prompts densely, and find the layers that a method leaves open.

    By loss, focal layers are added greedily, each time the one with which the dense model's answers
    stay the likeliest under the method (as IndexCache chooses layers): every layer is tried on all
    prompts in each round. By recall, the dense answers are enough.

    Parameters
    ----------
    method : with its other settings, which the choice is made under.
    model : a vision-language model.
    batches : model inputs, of :func:`compress.models.visual.build_prompt`.
    max_new_tokens : per page; steps after the end of its text do not count.

    Raises
    ------
    ValueError : when no answer has two decode steps.
    """
    method, layers = method.calibrated_as(), len(decoder(model).layers)
    size = partial(budget, method.keep_visual, least=method.min_fixation)
    recorders: list[Recorder] = []

    def make_recorder(tokens: VisualTokens, layers: int) -> Recorder:
        recorders.append(Recorder(tokens, layers, size, method.head_reduce))
        return recorders[-1]

    sums, answers = [], []
    with attached(model, make_recorder):
        for inputs in batches:
            tokens = _generate(model, inputs, max_new_tokens)
            lengths = _lengths(model, tokens)
            sums += [recorder.sums(lengths) for recorder in recorders]
            recorders.clear()
            answers.append((inputs, tokens, lengths))
    found = means(sums)

    dense, focal = listed(method.dense_layers), listed(method.focal_layers)
    if dense is None:
        dense = list(found.unfocused(method.min_focus))

    @cache
    def tried(focal: tuple[int, ...]) -> tuple[float, Mapping[str, Any]]:
        layers = {"focal_layers": focal, "dense_layers": tuple(dense) or "none"}
        return _loss(method.model_copy(update=layers), model, answers)

    order, curve = choose_focal_layers(found, layers, dense)
    count, by, losses = default_count(layers), None, []
    if focal is None and method.focal_by == "recall":
        focal, by = sorted(order[:count]), "recall"
    elif focal is None:
        chosen, rounds = greedy(candidates(layers, dense), count, lambda some: -tried(some)[0])
        focal, by = sorted(chosen), "loss"
        losses = [[-tries[n] if n in tries else None for n in range(layers)] for tries in rounds]
    loss, facts = tried(tuple(focal))
    return Calibration(
        method.keep_visual,
        method.min_fixation,
        tuple(focal),
        tuple(dense),
        by,
        tuple(row[n] for n, row in enumerate(found.recall)),
        method.min_focus,
        loss,
        losses,
        tuple(facts["attended_by_layer"]),
        facts["attended"],
        order,
        curve,
        found.recall,
        found.previous,
        found.steps,
    )


class _Forced(LogitsProcessor):
    """Makes a model write a given text, and keeps how unlikely it found each token."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        self.losses: list[torch.Tensor] = []  # one per token, (batch,)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.tokens[:, len(self.losses), None]
        self.losses.append(-scores.float().log_softmax(-1).gather(1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0)


def _loss(
    method: "FastOCR", model: Any, answers: Sequence[Answer]
) -> tuple[float, Mapping[str, Any]]:
    """How unlikely the dense model's answers are under a method, and what was attended to.

    Its mean is over the tokens that decode steps write.
    """
    total, count = 0.0, 0
    with attached(model, partial(make_policy, method)) as handle:
        for inputs, tokens, lengths in answers:
            forced = _Forced(tokens)
            _generate(model, inputs, tokens.shape[1], logits_processor=[forced])
            losses = torch.stack(forced.losses[1:], 1).cpu()
            for row, length in zip(losses, lengths, strict=True):
                total += row[:length].sum().item()
                count += len(row[:length])
        return total / count, handle.facts()


def _generate(
    model: Any, inputs: Mapping[str, Any], max_new_tokens: int, **settings: Any
) -> torch.Tensor:
    """The new tokens, ``(batch, tokens)``."""
    output = model.generate(
        **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, **settings
    )
    return output[:, inputs["input_ids"].shape[1] :]


def _lengths(model: Any, answers: torch.Tensor) -> list[int]:
    """Tokens before the end of each answer: its decode steps that read a token of the text."""
    end = model.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else end, device=answers.device).flatten()
    before = torch.isin(answers, ends).int().cumsum(1) == 0
    return before.sum(1).tolist()
