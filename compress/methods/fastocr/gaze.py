"""Which visual tokens each layer reads: the moving fixation of the method, and fixed ones."""

from collections.abc import Callable, Sequence

import torch

from compress.methods.fastocr.calibration import Recorder, default_count, summary
from compress.methods.fastocr.fixation import (
    Fixation,
    budget,
    kept_mass,
    neighbours,
    opened,
    top_k,
)
from compress.methods.fastocr.state import Pages


class MovingGaze:
    """Focal-guided pruning with cross-step reuse (arXiv 2605.17447).

    Parameters
    ----------
    pages, layers : of the request; layers of its model.
    keep : fraction of a sequence's visual tokens in the fixation.
    focal : layers that attend densely and choose the fixation of those below; None finds them in
        the first ``warmup`` steps, which are dense, for the batch as a whole.
    dilate : rows and columns around the best tokens that take the place of the last ones.
    min_mass : the guard; below it the rest of a step reads everything.
    reuse : whether layers above the first focal one use the fixation of the step before.
    periphery : summaries per key head of what a layer does not read.
    """

    def __init__(
        self,
        pages: Pages,
        layers: int,
        keep: float,
        focal: Sequence[int] | None,
        warmup: int,
        dilate: int,
        min_mass: float,
        reuse: bool,
        periphery: int,
    ) -> None:
        self.pages = pages
        self.periphery = periphery
        self.focal = focal
        self.keep = keep
        self.warmup = warmup
        self.min_mass = min_mass
        self.reuse = reuse
        self.step = -1
        self.budgets = [budget(keep, count) for count in pages.counts]
        self.limits = torch.tensor(self.budgets, device=pages.rows.device)
        self.near = None
        if dilate:
            self.near = _padded_neighbours(pages, dilate)
        self.recorder = Recorder(pages, layers, keep) if focal is None else None
        self.current: Fixation | None = None  # chosen by the last focal layer
        self.shown: Fixation | None = None  # the same, opened where the eye jumped in this step
        self.jumped = torch.zeros(len(pages.counts), dtype=torch.bool, device=pages.rows.device)

    def start_step(self) -> None:
        """Begin with the last step's fixation."""
        self.step += 1
        if self.recorder is not None and self.step < self.warmup:
            self.recorder.start_step()
        elif self.recorder is not None:
            sums = self.recorder.sums([self.warmup] * len(self.pages.counts))
            count = default_count(self.recorder.layers)
            self.focal = summary([sums], self.keep, count, count).focal_layers
            self.current = self._chosen(self.recorder.scores[max(self.focal)])
            self.recorder = None
        self.shown = self.current
        self.jumped = torch.zeros_like(self.jumped)

    def fixation(self, layer: int) -> Fixation | None:
        """None in the first step, while focal layers are looked for, and at these."""
        if self.focal is None or self.step == 0 or layer in self.focal:
            return None
        return self.shown if self.reuse or layer > min(self.focal) else None

    def wants_scores(self, layer: int) -> bool:
        """Focal layers' scores, or all while focal layers are looked for."""
        return self.focal is None or layer in self.focal

    def see(self, layer: int, scores: torch.Tensor) -> int | torch.Tensor:
        """Choose the fixation of the layers below; see ``Gaze``."""
        if self.recorder is not None:
            return self.recorder.see(layer, scores)
        before, self.current = self.current, self._chosen(scores)
        self.shown = self.current
        if not self.min_mass or before is None or self.step == 0:
            return 0
        jumps = (kept_mass(scores, before) < self.min_mass) & self.pages.valid.any(1) & ~self.jumped
        self.jumped = self.jumped | jumps
        # Here a step waits for the device, and only under the guard: a fixation with room for every
        # token, so that nobody need ask, would make every step go through a list of all.
        if self.jumped.any():
            self.shown = opened(self.current, self.jumped, self.pages.valid)
        return jumps.sum()

    def _chosen(self, scores: torch.Tensor) -> Fixation:
        return top_k(scores, self.limits, max(self.budgets), self.near)


def _padded_neighbours(pages: Pages, radius: int) -> torch.Tensor:
    """:func:`neighbours` of every sequence, ``(batch, visual, around)``; padding's are itself."""
    near = [neighbours(layout.grid, layout.image_of, radius) for layout in pages.layouts]
    alone = torch.arange(pages.rows.shape[1], device=pages.rows.device)[:, None]
    padded = alone.expand(len(near), -1, (2 * radius + 1) ** 2).clone()
    for row, mine in zip(padded, near, strict=True):
        row[: len(mine)] = mine.to(row.device)
    return padded


class FixedGaze:
    """A fixation per layer that does not move: the baselines.

    Parameters
    ----------
    choose : a layer's fixation from its scores in the last dense step.
    dense_steps : first steps in which everything is read, as by the method.
    periphery : summaries per key head of what a layer does not read.
    """

    def __init__(
        self, choose: Callable[[int, torch.Tensor], Fixation], dense_steps: int, periphery: int
    ) -> None:
        self.periphery = periphery
        self.choose = choose
        self.dense_steps = dense_steps
        self.step = -1
        self.chosen: dict[int, Fixation] = {}

    def start_step(self) -> None:
        """Count."""
        self.step += 1

    def fixation(self, layer: int) -> Fixation | None:
        """The layer's own, after the dense steps."""
        return None if self.step < self.dense_steps else self.chosen[layer]

    def wants_scores(self, layer: int) -> bool:
        """In the last dense step."""
        return self.step == self.dense_steps - 1

    def see(self, layer: int, scores: torch.Tensor) -> int:
        """Fix what this layer reads from now on."""
        self.chosen[layer] = self.choose(layer, scores)
        return 0
