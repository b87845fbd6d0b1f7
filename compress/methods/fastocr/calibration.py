"""Which layers are focal: those whose choice of visual tokens serves the others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compress.methods.fastocr.fixation import Fixation, budget, top_k
from compress.methods.fastocr.patch import attached, decoder
from compress.methods.fastocr.state import Pages

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Calibration:
    """What was seen in dense decoding, and the focal layers that follow from it.

    Parameters
    ----------
    keep_visual : size of the fixations that were compared, as a fraction.
    focal_layers : the choice, in ascending order.
    order : layers in the order of the greedy choice.
    curve : mean recall with the first one, the first two, ... of ``order``.
    recall : ``recall[i][j]`` is the share of layer j's attention over visual tokens that lies on
        the top-k of layer i, in the mean over steps.
    previous : the same with the top-k that layer i had in the step before.
    steps : decode steps seen, summed over pages.
    """

    keep_visual: float
    focal_layers: tuple[int, ...]
    order: tuple[int, ...]
    curve: tuple[float, ...]
    recall: Matrix
    previous: Matrix
    steps: int

    def facts(self) -> dict[str, Any]:
        """The calibration as JSON."""
        return asdict(self)


def default_count(layers: int) -> int:
    """Focal layers where nobody says how many: a seventh, so 4 of 28, 1 of 8 or 12.

    Each one is dense, so they are most of what is attended to: a seventh of the layers at 5%.
    """
    return max(1, layers // 7)


def recalls(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """How much of each layer's attention lies on each layer's choice.

    Parameters
    ----------
    scores : attention over visual tokens, ``(batch, layers, visual)``.
    chosen : 1 for a layer's choice and 0 elsewhere, ``(batch, layers, visual)``.

    Returns
    -------
    ``(batch, layers, layers)``; ``[b, i, j]`` is the attention of layer j on the choice of i.
    """
    return chosen @ scores.transpose(1, 2)


def mean_recall(focal: Sequence[int], recall: Matrix, previous: Matrix) -> float:
    """Mean over the layers of the attention that is kept.

    A focal layer keeps all. Another one keeps what the nearest focal layer above it chose, or the
    last focal layer in the step before where there is none above. Matrices as in
    :class:`Calibration`.
    """
    total = 0.0
    for layer in range(len(recall)):
        above = [other for other in focal if other < layer]
        if layer in focal:
            total += 1
        else:
            total += recall[max(above)][layer] if above else previous[max(focal)][layer]
    return total / len(recall)


def choose_focal_layers(
    recall: Matrix, previous: Matrix, count: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Add layer after layer, each time the one with which the mean recall is highest.

    Returns
    -------
    The layers in the order of the choice, and the mean recall after each.
    """
    order: tuple[int, ...] = ()
    curve: tuple[float, ...] = ()
    for _ in range(count):
        value, layer = max(
            (mean_recall((*order, layer), recall, previous), -layer)
            for layer in range(len(recall))
            if layer not in order
        )
        order, curve = (*order, -layer), (*curve, value)
    return order, curve


class Recorder:
    """A gaze that reads everything and compares the layers (a ``Gaze``).

    Parameters
    ----------
    pages, layers : of the request; layers of its model.
    keep : size of the choices that are compared, as a fraction of a sequence's visual tokens.
    """

    periphery = 0

    def __init__(self, pages: Pages, layers: int, keep: float) -> None:
        self.layers = layers
        self.visual = pages.valid.shape[1]
        self.counts = pages.counts
        self.budgets = [budget(keep, count) for count in pages.counts]
        self.limits = torch.tensor(self.budgets, device=pages.rows.device)
        self.recall: list[torch.Tensor] = []  # a step each, (batch, layers, layers)
        self.previous: list[torch.Tensor] = []  # one fewer
        self.scores: list[torch.Tensor] = []  # a layer each, of the present step
        self.chosen: torch.Tensor | None = None

    def start_step(self) -> None:
        """Forget the scores of the step before."""
        self.scores = []

    def fixation(self, layer: int) -> Fixation | None:
        """Everything."""
        return None

    def wants_scores(self, layer: int) -> bool:
        """Of all layers."""
        return True

    def see(self, layer: int, scores: torch.Tensor) -> int:
        """Compare when the last layer has been seen."""
        self.scores.append(scores)
        if len(self.scores) < self.layers:
            return 0
        step = torch.stack(self.scores, 1)
        if self.chosen is not None:
            self.previous.append(recalls(step, self.chosen))
        flat = top_k(
            step.flatten(0, 1), self.limits.repeat_interleave(self.layers), max(self.budgets)
        )
        self.chosen = torch.zeros_like(step.flatten(0, 1))
        self.chosen.scatter_(1, flat.index, flat.valid.to(step.dtype))
        self.chosen = self.chosen.view_as(step)
        self.recall.append(recalls(step, self.chosen))
        return 0

    def sums(self, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Both matrices summed over the first steps of each sequence, and the numbers of steps.

        Parameters
        ----------
        lengths : how many steps count in each sequence; those without visual tokens do not.
        """
        used = [
            min(length, len(self.recall)) if count else 0
            for length, count in zip(lengths, self.counts, strict=True)
        ]
        zero = torch.zeros(self.layers, self.layers)
        recall: Any = sum((_first(self.recall, row, n) for row, n in enumerate(used)), zero)
        previous: Any = sum((_first(self.previous, row, n - 1) for row, n in enumerate(used)), zero)
        return recall, previous, sum(used), sum(max(n - 1, 0) for n in used)


def _first(matrices: Sequence[torch.Tensor], row: int, steps: int) -> torch.Tensor | int:
    return sum((matrix[row].cpu() for matrix in matrices[: max(steps, 0)]), 0)


def summary(
    sums: Iterable[tuple[torch.Tensor, torch.Tensor, int, int]],
    keep_visual: float,
    count: int,
    curve: int,
) -> Calibration:
    """The calibration from what recorders saw.

    Parameters
    ----------
    sums : of :meth:`Recorder.sums`.
    keep_visual : as the recorders had it.
    count, curve : focal layers to choose, and how far the greedy order is followed.

    Raises
    ------
    ValueError : when no sequence had two decode steps.
    """
    totals = [sum(parts) for parts in zip(*sums, strict=True)]
    if not totals or not totals[3]:
        raise ValueError(
            "calibration needs a page whose answer has at least two decode steps; got "
            f"{totals[2] if totals else 0} steps in all; give pages with text, or more new tokens"
        )
    recall = (totals[0] / totals[2]).tolist()
    previous = (totals[1] / totals[3]).tolist()
    order, values = choose_focal_layers(recall, previous, curve)
    return Calibration(
        keep_visual, tuple(sorted(order[:count])), order, values, recall, previous, totals[2]
    )


def calibrate(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    keep_visual: float = 0.05,
    count: int | None = None,
    max_new_tokens: int = 128,
) -> Calibration:
    """Write a handful of pages densely, and find the focal layers of a model.

    Parameters
    ----------
    model : a vision-language model.
    batches : model inputs, of :func:`compress.models.visual.build_prompt`.
    keep_visual : fraction of the visual tokens that will be kept.
    count : focal layers to choose; None is :func:`default_count`.
    max_new_tokens : per page; steps after its end do not count.

    Raises
    ------
    ValueError : when ``count`` is not one of the model's numbers of layers, or no answer has two
        decode steps.
    """
    layers = len(decoder(model).layers)
    count = default_count(layers) if count is None else count
    if not 1 <= count <= layers:
        raise ValueError(
            f"count should be between 1 and the model's {layers} layers; got {count}; correct it"
        )
    opened: list[Recorder] = []

    def open_recorder(pages: Pages, layers: int) -> Recorder:
        opened.append(Recorder(pages, layers, keep_visual))
        return opened[-1]

    sums = []
    with attached(model, open_recorder):
        for inputs in batches:
            output = model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens
            )
            answers = output[:, inputs["input_ids"].shape[1] :]
            sums += [recorder.sums(_lengths(model, answers)) for recorder in opened]
            opened.clear()
    return summary(sums, keep_visual, count, layers)


def _lengths(model: Any, answers: torch.Tensor) -> list[int]:
    """Tokens ahead of the end of each answer: its decode steps that read a token of the text."""
    end = model.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else end, device=answers.device).flatten()
    before = torch.isin(answers, ends).int().cumsum(1) == 0
    return before.sum(1).tolist()
