"""The mask scheduler: estimates scores, takes flow steps, binarises; its state is resumable."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import SchedulerMixin

from compress.data.batches import Batch
from compress.methods.gradflow import criterion as scoring
from compress.methods.gradflow import depth, flow, obs
from compress.methods.gradflow.allocation import Allocator
from compress.methods.gradflow.coarse import COARSE_REFRESH
from compress.methods.gradflow.layout import Layout
from compress.methods.gradflow.masks import SoftUNet
from compress.methods.gradflow.schedule import removed_share
from compress.parallel import distributed, sharding

if TYPE_CHECKING:
    from compress.methods.gradflow.method import ChannelPruning

TRACED_UNITS = 400
# free inner widths are chosen anew so many times over a flow, and stay as they are in its second
# half, so that the masks can reach them
REALLOCATIONS = 12
LAST_REALLOCATION = 0.5
Tensors = dict[str, torch.Tensor]


@dataclass
class MaskState:
    """The scheduler's state between steps; saved and restored with the run.

    ``scores`` compare units of one layer, ``shared_scores`` those of all layers; ``squares`` sum
    those of the mask's gradients over the ``learnt`` optimiser steps since the last mask update.
    """

    _TENSORS: ClassVar = ("scores", "last_scores", "low", "keep_counts", "shared_scores", "squares")

    scores: torch.Tensor
    last_scores: torch.Tensor
    low: torch.Tensor
    keep_counts: torch.Tensor
    shared_scores: torch.Tensor
    squares: torch.Tensor
    learnt: int = 0
    returned: int = 0
    binary: bool = False
    estimates: int = 0
    seconds: float = 0.0
    trace: list[torch.Tensor] = field(default_factory=list)
    trace_steps: list[int] = field(default_factory=list)

    def tensors(self) -> Tensors:
        """The state's tensors, by name."""
        tensors = {name: getattr(self, name) for name in self._TENSORS}
        return tensors | ({"trace": torch.stack(self.trace)} if self.trace else {})

    def facts(self) -> dict[str, Any]:
        """The rest of the state, as JSON values."""
        names = ("learnt", "returned", "binary", "estimates", "seconds", "trace_steps")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def restored(cls, tensors: Tensors, facts: dict[str, Any]) -> "MaskState":
        """Rebuild a state from its :meth:`tensors` and :meth:`facts`."""
        if missing := [name for name in cls._TENSORS if name not in tensors]:
            raise ValueError(
                f"a saved state should hold the masks' {', '.join(cls._TENSORS)}; this one, "
                f"without {', '.join(missing)}, was begun by an earlier version; start again with "
                "--overwrite"
            )
        named: dict[str, Any] = {name: tensors[name] for name in cls._TENSORS}
        trace = list(tensors["trace"].cpu().unbind()) if "trace" in tensors else []
        return cls(**named, trace=trace, **facts)


class MaskScheduler:
    """Schedules the mask of a soft network for :class:`GradFlow` or :class:`OneShot`.

    Parameters
    ----------
    method : the knobs.
    layout : where each unit acts.
    scheduler : for the criterion's loss.
    batches : gives the minibatches of estimate number k, each whole or in equally many parts.
    step_rate : learning rate of the training, the unit of ``lookahead``'s horizon.
    seed : of the random criterion.
    device : where the mask lives.
    allocator : chooses the inner widths where they are free.
    """

    def __init__(
        self,
        method: "ChannelPruning",
        layout: Layout,
        scheduler: SchedulerMixin,
        batches: Callable[[int], list[Batch]],
        *,
        step_rate: float,
        seed: int,
        device: torch.device,
        allocator: Allocator | None = None,
    ) -> None:
        self.method, self.scheduler, self.batches = method, scheduler, batches
        self.seed, self.allocator, self._layout = seed, allocator, layout
        self.moments: Tensors = {}  # of "obs", between its scores and the cut
        self.block = layout.block.to(device)
        self.layers = None if layout.layers is None else layout.layers.to(device)
        self.sizes = layout.sizes().to(device).float()
        self.is_gate = torch.zeros(layout.units, dtype=torch.bool, device=device)
        self.is_gate[list(layout.gates.values())] = True
        flow_knobs = method.flow
        self.estimate_every = flow_knobs.criterion_every if flow_knobs else 1
        if method.granularity == "coarse":
            self.estimate_every *= COARSE_REFRESH
        if flow_knobs and method.criterion == obs.CRITERION:
            self.estimate_every = flow_knobs.updates  # of the dense model alone
        between = self.estimate_every * flow_knobs.update_every if flow_knobs else 1
        self.horizon = method.horizon or step_rate * between
        # the optimiser step before which the mask becomes binary
        self.binarised_at = flow_knobs.binarised_at if flow_knobs else 0
        zeros = torch.zeros(layout.units, device=device)
        self.state = MaskState(
            zeros,
            zeros.clone(),
            zeros.bool(),
            layout.keep_counts.to(device),
            zeros.clone(),
            zeros.double(),
        )
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(layout.units, generator=generator)[:TRACED_UNITS]
        self._traced = order.sort().values.to(device)

    @property
    def layout(self) -> Layout:
        """The layout with the current keep counts."""
        if self.allocator is None:
            return self._layout
        return self.allocator.layout_of(self.state.keep_counts)

    def move(self, soft: SoftUNet, step: int) -> dict[str, Any] | None:
        """Update the mask if it is due before optimiser step ``step``; returns the log row."""
        method = self.method.flow
        if method is None or step >= method.binarised_at or step % method.update_every:
            return None
        update = step // method.update_every
        progress = (update + 1) / method.updates
        rank = None
        if update and self.learns:
            rank = self._refresh(self._learnt_scores(), soft.mask)
        elif update % self.estimate_every == 0:
            rank = self.estimate(soft)
        due = update % max(1, method.updates // REALLOCATIONS) == 0
        if update == 0 or (due and progress <= LAST_REALLOCATION):
            self.allocate()
        removed = removed_share(progress, method.budget)
        budget = self.sizes - removed * (self.sizes - self.state.keep_counts)
        if self.allocator is not None:
            # masks follow changed keep counts as fast as the continuity bound allows
            low, high = (soft.mask - method.max_move), (soft.mask + method.max_move)
            blocks = len(budget)
            budget = budget.clamp(
                flow.block_sums(low.clamp(min=0), self.block, blocks),
                flow.block_sums(high.clamp(max=1), self.block, blocks),
            )
        before, gamma = soft.mask.clone(), method.gamma * progress**2
        if method.process == "hard":
            kept = budget.ceil().long()
            soft.mask.copy_(flow.binarise(before, self.state.scores, self.block, kept, self.layers))
        else:
            soft.mask.copy_(
                flow.flow_step(
                    before,
                    self.state.scores,
                    gamma=gamma,
                    rate=method.flow_rate,
                    max_move=method.max_move,
                    budget=budget,
                    block=self.block,
                )
            )
        self._follow(soft.mask, step)
        undecided = (soft.mask > 0.05) & (soft.mask < 0.95)
        return {
            "budget": (budget.sum() / self.sizes.sum()).item(),
            "gamma": gamma,
            "max_move": (soft.mask - before).abs().max().item(),
            "undecided": undecided.float().mean().item(),
            "returned": self.state.returned,
            "spearman": rank,
        }

    def estimate(self, soft: SoftUNet) -> float | None:
        """Refresh the scores; returns the rank correlation with the estimate before."""
        started = time.perf_counter()
        batches = self.batches(self.state.estimates)
        with sharding.whole(soft):
            raw = self._raw_scores(soft, batches)
        rank = self._refresh(raw, soft.mask)
        self.state.seconds += time.perf_counter() - started
        return rank

    def allocate(self) -> None:
        """Choose the inner widths anew from the scores, where they are free."""
        if self.allocator is not None:
            layout = self.allocator.layout(self.state.shared_scores)
            self.state.keep_counts = layout.keep_counts.to(self.block.device)

    @property
    def learns(self) -> bool:
        """Whether optimiser steps have something to :meth:`learn` from."""
        moves = self.method.flow is not None and not self.state.binary
        return moves and self.method.criterion == "fisher"

    def learn(self, gradient: torch.Tensor) -> None:
        """Take in the loss's gradient by the mask ``(units,)`` of a process's share of a step."""
        gradient = distributed.mean({"mask": gradient.double()})["mask"]
        # float16 overflows where the loss is scaled too high; such a step is not taken
        if bool(gradient.isfinite().all()):
            self.state.squares += gradient.square()
            self.state.learnt += 1

    def _learnt_scores(self) -> torch.Tensor:
        """The scores of the optimiser steps since the last update; those of before if none.

        A whole block keeps the scores of the dense model: what the others miss once some are
        half gone is no measure of what training makes up for.
        """
        state = self.state
        squares, state.squares = state.squares, torch.zeros_like(state.squares)
        count, state.learnt = state.learnt, 0
        if not count:
            return state.last_scores
        return torch.where(self.is_gate, state.last_scores, (squares / count).sqrt().float())

    def _refresh(self, raw: torch.Tensor, mask: torch.Tensor) -> float | None:
        state, method = self.state, self.method
        fresh = scoring.normalise(raw, self._layout, method.criterion)
        shared = scoring.normalise(raw, self._layout, "lookahead")
        rank = None
        if state.estimates and method.flow:
            alive = (mask > 0.05) & ~self.is_gate  # a block's score may be that of before
            if bool(alive.any()):
                rank = flow.spearman(state.last_scores[alive], fresh[alive])
            decay = method.flow.score_ema
            state.scores = decay * state.scores + (1 - decay) * fresh
            state.shared_scores = decay * state.shared_scores + (1 - decay) * shared
        else:
            state.scores, state.shared_scores = fresh, shared
        state.last_scores = fresh
        state.estimates += 1
        return None if rank is None or math.isnan(rank) else rank

    def _raw_scores(self, soft: SoftUNet, batches: list[Batch]) -> torch.Tensor:
        method = self.method
        if method.criterion == obs.CRITERION:
            return self._obs_scores(soft, batches)
        if method.criterion in depth.CRITERIA:
            return scoring.depth_scores(soft, self.scheduler, batches, method.criterion)
        parts = len(batches) // method.criterion_batches
        criterion = method.criterion
        if criterion == "fisher":
            if method.flow is None:
                return scoring.fisher_scores(soft, self.scheduler, batches, parts=parts)
            # a flow estimates it once, before the first step; taylor begins better (our choice)
            criterion = "taylor"
        if criterion == "diff_pruning":
            return scoring.diff_pruning_scores(
                soft, self.scheduler, batches, threshold=method.score_threshold, parts=parts
            )
        return scoring.raw_scores(
            soft,
            self.scheduler,
            batches,
            criterion=criterion,
            reduction=method.reduction,
            hvp=method.hvp,
            horizon=self.horizon,
            seed=self.seed,
        )

    def _obs_scores(self, soft: SoftUNet, batches: list[Batch]) -> torch.Tensor:
        moments = scoring.obs_moments(soft, self.scheduler, batches)
        if self.method.flow is None:
            self.moments = moments
            return obs.scores(soft, moments)
        scores = obs.greedy_scores(soft, moments)
        if not bool(self.is_gate.any()):
            return scores
        blocks = scoring.raw_scores(
            soft, self.scheduler, batches, criterion="taylor", reduction=self.method.reduction
        )
        return torch.where(self.is_gate, blocks, scores)

    def binarise(self, soft: SoftUNet, step: int) -> int:
        """Set every mask to 0 or 1 and give unaligned norms the slim network's membership.

        Returns the number of norms that changed their membership.
        """
        soft.mask.copy_(
            flow.binarise(
                soft.mask, self.state.scores, self.block, self.state.keep_counts, self.layers
            )
        )
        self.state.binary = True
        self._follow(soft.mask, step)
        return soft.adopt_slim_membership()

    def refit(self, soft: SoftUNet) -> None:
        """Fit what the binary mask keeps to the dense layers' outputs, where "obs" scored it."""
        obs.refit(soft, self.moments)
        self.moments = {}

    def trace(self) -> Tensors:
        """The traced units' masks ``(updates, units)`` and the steps ``(updates,)``."""
        if not self.state.trace:
            return {}
        steps = torch.tensor(self.state.trace_steps)
        return {"masks": torch.stack(self.state.trace), "steps": steps}

    def _follow(self, mask: torch.Tensor, step: int) -> None:
        """Count units that came back from under one half, and extend the trace."""
        low = mask < 0.5
        self.state.returned += int((self.state.low & ~low).sum())
        self.state.low = low
        self.state.trace.append(mask[self._traced].cpu().clone())
        self.state.trace_steps.append(step)
