"""Attention policies: which visual tokens each layer attends to in a decode step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from compress.methods.fastocr.attention import top_rows
from compress.methods.fastocr.choosing import SummaryPolicy
from compress.methods.fastocr.fixation import (
    Fixation,
    HeadReduce,
    budget,
    filled,
    kept_mass,
    last_fixation,
    neighbours,
    opened,
    random_fixation,
    same_mean_budget,
    shares,
    top_k,
)
from compress.methods.fastocr.recall import (
    Recorder,
    choose_focal_layers,
    default_count,
    means,
)
from compress.methods.fastocr.visual_tokens import VisualTokens

if TYPE_CHECKING:
    from compress.methods.fastocr.method import FastOCR


class AttentionPolicy(Protocol):
    """Decides what each layer attends to while one batch of prompts is answered.

    Attributes
    ----------
    periphery : summaries per key head of what a layer does not attend to; 0 is none.
    head_reduce : of the heads' attention, where scores are needed.
    """

    periphery: int
    head_reduce: HeadReduce

    @property
    def settled(self) -> bool:
        """Whether this step and the next ones do the same, but for values on the device."""

    def start_step(self) -> None:
        """Begin a decode step."""

    def needs_scores(self, layer: int) -> bool:
        """Whether :meth:`observe` is to be called with the layer's scores, before it attends."""

    def fixation(self, layer: int) -> Fixation | None:
        """The visual tokens that a layer attends to; None is all."""

    def observe(self, layer: int, weights: torch.Tensor) -> int | torch.Tensor:
        """Take a layer's attention over the cache, ``(batch, length)``.

        Returns
        -------
        Number of sequences for which the rest of the step became dense just now.
        """


class FocalPolicy:
    """Focal-guided pruning with cross-step reuse (arXiv 2605.17447).

    Parameters
    ----------
    tokens, layers : of the batch; layers of its model.
    keep, least : fraction of a sequence's visual tokens in the fixation, and its floor in tokens.
    focal : layers that are dense and choose the fixation of those below; None finds those of each
        sequence in its first ``warmup`` steps, which are dense.
    dense : other layers that attend to all; None finds them in these steps, too.
    min_focus : share of a layer's attention that its own choice must hold where ``dense`` is None.
    head_reduce : of the attention of a focal layer's heads.
    warmup : at least 2.
    dilate : rows and columns around the best tokens that replace the last ones.
    min_mass : the guard: below it the rest of a step is dense.
    reuse : whether layers above the first focal one use the fixation of the step before.
    periphery : summaries per key head of what a layer does not attend to.
    """

    def __init__(
        self,
        tokens: VisualTokens,
        layers: int,
        *,
        keep: float,
        focal: Sequence[int] | None,
        least: int = 0,
        dense: Sequence[int] | None = (),
        min_focus: float = 0.0,
        head_reduce: HeadReduce = "mean",
        warmup: int = 2,
        dilate: int = 0,
        min_mass: float = 0.0,
        reuse: bool = True,
        periphery: int = 0,
    ) -> None:
        self.tokens = tokens
        self.periphery = periphery
        self.head_reduce = head_reduce
        self.given = focal, dense
        self.min_focus = min_focus
        self.warmup = warmup
        self.min_mass = min_mass
        self.reuse = reuse
        self.step = -1
        size = partial(budget, keep, least=least)
        self.budgets = tokens.budgets(size)
        device = tokens.rows.device
        self.valid = filled(self.budgets, device)
        self.near = _padded_neighbours(tokens, dilate) if dilate else None
        self.layers = layers
        self.recorder = None
        if focal is None or dense is None:
            self.recorder = Recorder(tokens, layers, size, head_reduce)
        else:
            self._set_layers([(focal, dense)] * len(tokens.counts))
        # by the last focal layer; always in the same memory, as a graph that is replayed wants it
        self.chosen: Fixation | None = None
        self._lists: tuple[torch.Tensor, torch.Tensor]  # its memory
        self._sizes: dict[tuple[bool, ...], torch.Tensor] = {}  # budgets on the device
        self._flags: dict[tuple[bool, ...], torch.Tensor] = {}  # sequences on the device
        self.current: Fixation | None = None  # the same, with all tokens of refreshed sequences
        # sequences for which the rest of this step is dense
        self.refreshed = torch.zeros(len(tokens.counts), dtype=torch.bool, device=device)

    def start_step(self) -> None:
        """Begin with the last step's fixation."""
        self.step += 1
        if self.recorder is not None and self.step < self.warmup:
            self.recorder.start_step()
        elif self.recorder is not None:
            self._set_layers(
                [self._found(self.recorder, row) for row in range(len(self.tokens.counts))]
            )
            last = [self.recorder.scores[max(own)][row] for row, own in enumerate(self.focal)]
            self._make_room()
            self._put(torch.stack(last), [True] * len(last))
            self.recorder = None
        self.current = self.chosen
        if self.min_mass:
            self.refreshed = torch.zeros_like(self.refreshed)

    @property
    def settled(self) -> bool:
        """From the first sparse step on; never under the guard, which waits for the device."""
        return self.recorder is None and self.step > 0 and not self.min_mass

    def fixation(self, layer: int) -> Fixation | None:
        """None in the first step, while focal layers are being found, and at focal layers.

        Where a layer is focal for some sequences only, the fixation of these is all they have.
        """
        if self.recorder is not None or self.step == 0:
            return None
        dense = self.is_dense[layer]
        if all(dense) or self.current is None:
            return None
        if not any(dense):
            return self.current
        return opened(self.current, self._rows(dense), self.tokens.valid)

    def needs_scores(self, layer: int) -> bool:
        """True of focal layers, and of all while focal layers are being found."""
        return self.recorder is not None or any(self.is_focal[layer])

    def observe(self, layer: int, weights: torch.Tensor) -> int | torch.Tensor:
        """Choose the fixation of the layers below; see `AttentionPolicy`."""
        if self.recorder is not None:
            return self.recorder.observe(layer, weights)
        self.current = chosen = self.chosen or self._make_room()
        is_focal = self.is_focal[layer]
        if self.min_mass and self.step:
            mass = kept_mass(shares(self.tokens.scores(weights)), chosen)
        self._choose(weights, is_focal)
        if not self.min_mass or not self.step:
            return 0
        below = (mass < self.min_mass) & self._rows(is_focal)
        refreshes = below & self.tokens.valid.any(1) & ~self.refreshed
        self.refreshed = self.refreshed | refreshes
        # The one place where a step waits for the device, and only under the guard: a fixation with
        # room for every token would not wait, but make every step go through a list of all.
        if self.refreshed.any():
            self.current = opened(chosen, self.refreshed, self.tokens.valid)
        return refreshes.sum()

    def _set_layers(self, sets: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """The focal layers of each sequence, and the others that are dense for it."""
        self.focal = [focal for focal, _ in sets]
        self.is_focal = [[layer in focal for focal, _ in sets] for layer in range(self.layers)]
        self.is_dense = [
            [
                layer in focal or layer in dense or not (self.reuse or layer > min(focal))
                for focal, dense in sets
            ]
            for layer in range(self.layers)
        ]

    def _found(self, recorder: Recorder, row: int) -> tuple[Sequence[int], Sequence[int]]:
        """The focal and dense layers of one sequence; without visual tokens any would do."""
        focal, dense = self.given
        count = default_count(self.layers)
        if not self.tokens.counts[row]:
            return focal or range(count), dense or ()
        steps = [self.warmup * (row == other) for other in range(len(self.tokens.counts))]
        found = means([recorder.sums(steps)])
        if dense is None:
            dense = found.unfocused(self.min_focus)
        if focal is None:
            focal = sorted(choose_focal_layers(found, count, dense)[0])
        return focal, dense

    def _rows(self, flags: Sequence[bool]) -> torch.Tensor:
        """On the device, where flags are copied to once: later steps do not wait for it."""
        key = tuple(flags)
        if key not in self._flags:
            self._flags[key] = torch.tensor(flags, device=self.tokens.rows.device)
        return self._flags[key]

    def _make_room(self) -> Fixation:
        tokens = self.tokens
        index = tokens.rows.new_zeros(len(tokens.counts), max(self.budgets))
        self._lists = index, tokens.joined(index.int())
        self.chosen = Fixation(index, self.valid, self._lists[1])
        return self.chosen

    def _choose(self, weights: torch.Tensor, chosen: Sequence[bool]) -> None:
        """Write the choice of some sequences; the others keep theirs."""
        tokens = self.tokens
        if self.near is not None:
            self._put(tokens.scores(weights), chosen)
            return
        key = tuple(chosen)
        if key not in self._sizes:
            sizes = [size * now for size, now in zip(self.budgets, chosen, strict=True)]
            own = torch.tensor(sizes, dtype=torch.int32)
            self._sizes[key] = own.to(weights.device, non_blocking=True)
        valid = None if tokens.even else tokens.valid
        top_rows(weights, tokens.listed, valid, self._sizes[key], *self._lists)

    def _put(self, scores: torch.Tensor, chosen: Sequence[bool]) -> None:
        """The same from attention over visual tokens, with their neighbours."""
        index = top_k(scores, max(self.budgets), self.valid, self.near).index
        if not all(chosen):
            index = torch.where(self._rows(chosen)[:, None], index, self._lists[0])
        self._lists[0].copy_(index)
        self._lists[1][:, : index.shape[1]].copy_(self.tokens.listed.gather(1, index))


def _padded_neighbours(tokens: VisualTokens, radius: int) -> torch.Tensor:
    """:func:`neighbours` of every sequence, ``(batch, visual, around)``; padding's are itself."""
    near = [neighbours(layout.grid, layout.image_of, radius) for layout in tokens.layouts]
    alone = torch.arange(tokens.rows.shape[1])[:, None]
    padded = alone.expand(len(near), -1, (2 * radius + 1) ** 2).clone()
    for row, own in zip(padded, near, strict=True):
        row[: len(own)] = own
    return padded.to(tokens.rows.device, non_blocking=True)


class FixedPolicy:
    """The baselines: a fixation per layer that stays the same for the whole answer.

    Parameters
    ----------
    choose : a layer's fixation from its attention over the cache in the last dense step.
    dense_steps : first steps that are dense, as many as the method has.
    periphery : summaries per key head of what a layer does not attend to.
    head_reduce : of the attention of a layer's heads.
    """

    def __init__(
        self,
        choose: Callable[[int, torch.Tensor], Fixation],
        dense_steps: int,
        periphery: int,
        head_reduce: HeadReduce = "mean",
    ) -> None:
        self.periphery = periphery
        self.head_reduce = head_reduce
        self.choose = choose
        self.dense_steps = dense_steps
        self.step = -1
        self.chosen: dict[int, Fixation] = {}

    def start_step(self) -> None:
        """Count the step."""
        self.step += 1

    @property
    def settled(self) -> bool:
        """After the dense steps."""
        return self.step >= self.dense_steps

    def fixation(self, layer: int) -> Fixation | None:
        """The layer's own, after the dense steps."""
        return None if self.step < self.dense_steps else self.chosen[layer]

    def needs_scores(self, layer: int) -> bool:
        """True in the last dense step."""
        return self.step == self.dense_steps - 1

    def observe(self, layer: int, weights: torch.Tensor) -> int:
        """Fix what this layer attends to from now on."""
        self.chosen[layer] = self.choose(layer, weights)
        return 0


class OraclePolicy(FixedPolicy):
    """The bound: every layer attends to its own choice of the same step, for which it reads all."""

    def needs_scores(self, layer: int) -> bool:
        """True: a choice is made in every layer and step."""
        return True


def listed(layers: Literal["auto", "none"] | Sequence[int]) -> list[int] | None:
    """A setting of layers as a list in order; None where it is to be found."""
    if layers == "auto":
        return None
    return [] if layers == "none" else sorted({*map(int, layers)})


def make_policy(
    method: "FastOCR", tokens: VisualTokens, layers: int
) -> AttentionPolicy | SummaryPolicy:
    """The policy for a new batch of prompts, of a model with so many layers.

    Raises
    ------
    ValueError : for a fixed fixation that does not know how many layers of the method are dense.
    """
    if method.choose != "focal":
        return SummaryPolicy(
            tokens,
            keep=method.keep_visual,
            groups=method.periphery,
            grouping=method.groups,
            by_signs=method.choose == "signs",
        )
    periphery = 0 if method.periphery == "auto" else method.periphery
    focal, dense = listed(method.focal_layers), listed(method.dense_layers)
    size = partial(budget, method.keep_visual, least=method.min_fixation)
    if method.fixation == "dynamic":
        return FocalPolicy(
            tokens,
            layers,
            keep=method.keep_visual,
            focal=focal,
            least=method.min_fixation,
            dense=dense,
            min_focus=method.min_focus,
            head_reduce=method.head_reduce,
            warmup=method.warmup,
            dilate=method.dilate,
            min_mass=method.min_mass,
            reuse=method.reuse,
            periphery=periphery,
        )
    if dense is None and method.fixation != "oracle":
        raise ValueError(
            f"fixation: {method.fixation} reads as much as the method, whose dense layers it has "
            "to know for that; got dense_layers='auto'; give them, or calibrate"
        )
    unlimited = {*(focal or range(default_count(layers))), *(dense or ())}

    def mean_size(count: int) -> int:
        return same_mean_budget(size(count), count, layers, len(unlimited), periphery)

    budgets = tokens.budgets(size if method.fixation == "oracle" else mean_size)
    device = tokens.rows.device
    valid = filled(budgets, device)

    def choose(layer: int, weights: torch.Tensor) -> Fixation:
        if method.fixation == "random":
            return random_fixation(tokens.counts, budgets, method.seed + layer).to(device)
        if method.fixation == "window":
            return last_fixation(tokens.counts, budgets).to(device)
        return top_k(tokens.scores(weights), max(budgets), valid)

    kind = OraclePolicy if method.fixation == "oracle" else FixedPolicy
    open_steps = 1 if focal and dense is not None else method.warmup
    return kind(choose, open_steps, periphery, method.head_reduce)
