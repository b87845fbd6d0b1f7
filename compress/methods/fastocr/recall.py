"""Recall: how much of a layer's attention lies on the visual tokens that another layer chose.

It decides which layers are focal: those whose choice serves the others best.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.methods.fastocr.fixation import Fixation, HeadReduce, filled, shares, top_k
from compress.methods.fastocr.visual_tokens import VisualTokens

Matrix = Sequence[Sequence[float]]
Sums = tuple[torch.Tensor, torch.Tensor, int, int]


@dataclass(frozen=True)
class Recalls:
    """What dense decoding showed.

    Parameters
    ----------
    recall : ``recall[i][j]`` is the share of layer j's attention over visual tokens that lies on
        the top-k of layer i, mean over steps.
    previous : the same with the top-k that layer i had in the step before.
    steps : decode steps that were recorded, summed over pages.
    """

    recall: Matrix
    previous: Matrix
    steps: int

    def unfocused(self, least: float) -> tuple[int, ...]:
        """Layers whose own top-k holds less than this share of their attention."""
        return tuple(n for n, row in enumerate(self.recall) if row[n] < least)


def default_count(layers: int) -> int:
    """Number of focal layers of a model: a seventh of its layers, so 4 of 28 and 1 of 8 or 12.

    Each one is dense, so at 5% they are most of what is attended to.
    """
    return max(1, layers // 7)


def recalls(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Share of each layer's attention that lies on each layer's choice.

    Parameters
    ----------
    scores : attention over visual tokens, ``(batch, layers, visual)``.
    chosen : 1 for a layer's choice and 0 elsewhere, ``(batch, layers, visual)``.

    Returns
    -------
    ``(batch, layers, layers)``; ``[b, i, j]`` is the attention of layer j on the choice of i.
    """
    return chosen @ scores.transpose(1, 2)


def mean_recall(
    focal: Sequence[int], recall: Matrix, previous: Matrix, dense: Sequence[int] = ()
) -> float:
    """Mean over the layers of the attention that is kept.

    A focal or dense layer keeps all. Another one keeps what lies on the choice of the nearest focal
    layer above it, or, where there is none above, of the last focal layer in the step before.
    Matrices as in :class:`Recalls`.
    """
    total = 0.0
    for layer in range(len(recall)):
        above = [other for other in focal if other < layer]
        if layer in focal or layer in dense:
            total += 1
        else:
            total += recall[max(above)][layer] if above else previous[max(focal)][layer]
    return total / len(recall)


def candidates(layers: int, dense: Collection[int]) -> list[int]:
    """Layers that can be focal: those that are not dense anyway, or all where none is left."""
    return [n for n in range(layers) if n not in dense] or list(range(layers))


def greedy(
    layers: Sequence[int], count: int, worth: Callable[[tuple[int, ...]], float]
) -> tuple[tuple[int, ...], list[dict[int, float]]]:
    """Add layers one by one, each time the one with which ``worth`` is highest.

    Parameters
    ----------
    layers : to choose from.
    count : how many, at most.
    worth : of a set of layers; of equals the first layer is added.

    Returns
    -------
    The layers in the order of the choice, and in each round what every layer was worth.
    """
    order: tuple[int, ...] = ()
    rounds = []
    for _ in range(min(count, len(layers))):
        rounds.append({n: worth((*order, n)) for n in layers if n not in order})
        order = (*order, max(rounds[-1], key=rounds[-1].__getitem__))
    return order, rounds


def choose_focal_layers(
    found: Recalls, count: int, dense: Sequence[int] = ()
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Add layers greedily, each time the one with which the mean recall is highest.

    Returns
    -------
    The layers in the order of the choice, and the mean recall after each.
    """
    order, rounds = greedy(
        candidates(len(found.recall), dense),
        count,
        lambda focal: mean_recall(focal, found.recall, found.previous, dense),
    )
    return order, tuple(max(values.values()) for values in rounds)


class Recorder:
    """An attention policy that is dense, and compares the layers.

    Parameters
    ----------
    tokens, layers : of the batch; layers of its model.
    size : of the choices that are compared, where a sequence has so many visual tokens.
    head_reduce : of the attention of a layer's heads.
    """

    periphery = 0
    settled = False

    def __init__(
        self,
        tokens: VisualTokens,
        layers: int,
        size: Callable[[int], int],
        head_reduce: HeadReduce = "mean",
    ) -> None:
        self.head_reduce = head_reduce
        self.layers = layers
        self.tokens = tokens
        self.counts = tokens.counts
        self.budgets = tokens.budgets(size)
        valid = filled(self.budgets, tokens.rows.device)
        self.valid = None if valid is None else valid.repeat_interleave(layers, 0)
        self.recall: list[torch.Tensor] = []  # one per step, (batch, layers, layers)
        self.previous: list[torch.Tensor] = []  # one fewer
        self.scores: list[torch.Tensor] = []  # one per layer, of the present step
        self.chosen: torch.Tensor | None = None

    def start_step(self) -> None:
        """Forget the scores of the step before."""
        self.scores = []

    def fixation(self, layer: int) -> Fixation | None:
        """None: every layer is dense."""
        return None

    def needs_scores(self, layer: int) -> bool:
        """True for every layer."""
        return True

    def observe(self, layer: int, weights: torch.Tensor) -> int:
        """Compare the layers after the last one's scores."""
        self.scores.append(shares(self.tokens.scores(weights)))
        if len(self.scores) < self.layers:
            return 0
        step = torch.stack(self.scores, 1)
        if self.chosen is not None:
            self.previous.append(recalls(step, self.chosen))
        flat = top_k(step.flatten(0, 1), max(self.budgets), self.valid)
        self.chosen = torch.zeros_like(step.flatten(0, 1))
        kept = torch.ones_like(flat.index) if flat.valid is None else flat.valid
        self.chosen.scatter_(1, flat.index, kept.to(step.dtype))
        self.chosen = self.chosen.view_as(step)
        self.recall.append(recalls(step, self.chosen))
        return 0

    def sums(self, lengths: Sequence[int]) -> Sums:
        """Both matrices summed over the first steps of each sequence, and the numbers of steps.

        Parameters
        ----------
        lengths : how many steps count in each sequence; those without visual tokens do not count.
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


def means(sums: Iterable[Sums]) -> Recalls:
    """What was recorded, as means; of :meth:`Recorder.sums`.

    Raises
    ------
    ValueError : when no answer has two decode steps.
    """
    totals = [sum(parts) for parts in zip(*sums, strict=True)]
    if not totals or not totals[3]:
        raise ValueError(
            "calibration needs a page whose answer has at least two decode steps; got "
            f"{totals[2] if totals else 0} steps in all; give pages with text, or more new tokens"
        )
    return Recalls((totals[0] / totals[2]).tolist(), (totals[1] / totals[3]).tolist(), totals[2])
