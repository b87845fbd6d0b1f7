"""Moves a mask: estimates scores, takes flow steps, binarises, and keeps what must survive."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import DDPMScheduler

from compress.data.batches import Batch
from compress.methods.gradflow import criterion as scoring
from compress.methods.gradflow import flow
from compress.methods.gradflow.allocation import Allocator
from compress.methods.gradflow.coarse import COARSE_REFRESH
from compress.methods.gradflow.layout import Layout
from compress.methods.gradflow.masks import SoftUNet
from compress.methods.training import Training
from compress.parallel import sharding

if TYPE_CHECKING:
    from compress.methods.gradflow.method import ChannelPruning

TRACED_UNITS = 400
# share of the flow after which free inner widths stay as they are
LAST_REALLOCATION = 0.5
Tensors = dict[str, torch.Tensor]


@dataclass
class MaskState:
    """What survives between steps; saved and restored with the run.

    Attributes
    ----------
    scores : ``(units,)`` running mean, in which units of one layer compare.
    shared_scores : ``(units,)`` running mean, in which units of all layers compare.
    last_scores : ``(units,)`` of the last estimate.
    low : ``(units,)`` whether a mask is below one half.
    keep_counts : ``(blocks,)`` units that each block keeps in the end.
    returned : how often a mask rose above one half again.
    binary : whether the mask is.
    estimates, seconds : number of estimates so far, and the time that they took.
    trace, trace_steps : masks of some units after each update, and the optimiser steps.
    """

    scores: torch.Tensor
    shared_scores: torch.Tensor
    last_scores: torch.Tensor
    low: torch.Tensor
    keep_counts: torch.Tensor
    returned: int = 0
    binary: bool = False
    estimates: int = 0
    seconds: float = 0.0
    trace: list[torch.Tensor] = field(default_factory=list)
    trace_steps: list[int] = field(default_factory=list)

    def tensors(self) -> Tensors:
        """The state's tensors, by name."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return tensors | ({"trace": torch.stack(self.trace)} if self.trace else {})

    def facts(self) -> dict[str, Any]:
        """The rest of the state, as JSON values."""
        return {k: v for k, v in vars(self).items() if k not in {*self.tensors(), "trace"}}

    @classmethod
    def restored(cls, tensors: Tensors, facts: dict[str, Any]) -> Self:
        """The state of ``tensors`` (others among them are ignored) and ``facts``."""
        own: dict[str, Any] = {f.name: tensors[f.name] for f in fields(cls) if f.name in tensors}
        if "trace" in own:
            own["trace"] = list(own["trace"].cpu().unbind())
        return cls(**own, **facts)


class MaskScheduler:
    """Drives the mask of a soft network as the knobs of a method say.

    Parameters
    ----------
    method : the knobs.
    layout : where each unit acts.
    allocator : chooses the inner widths where they are free.
    noise_scheduler : for the criterion's loss.
    batches : gives the minibatches of estimate number k, each whole or in equally many parts.
    training : its learning rate is the unit of ``lookahead``'s horizon, its seed that of the random
        criterion.
    device : where the mask lives.
    """

    def __init__(
        self,
        method: "ChannelPruning",
        layout: Layout,
        allocator: Allocator | None,
        noise_scheduler: DDPMScheduler,
        batches: Callable[[int], list[Batch]],
        training: Training,
        device: torch.device,
    ) -> None:
        self.method, self.allocator, self._layout = method, allocator, layout
        self.noise_scheduler, self.batches, self.seed = noise_scheduler, batches, training.seed
        self.horizon = method.horizon or training.lr * (
            method.flow.update_every if method.flow else 1
        )
        self.block = layout.block.to(device)
        self.sizes = layout.sizes().to(device).float()
        zeros = torch.zeros(layout.units, device=device)
        self.state = MaskState(
            zeros, zeros.clone(), zeros.clone(), zeros.bool(), layout.keep_counts.to(device)
        )
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(layout.units, generator=generator)[:TRACED_UNITS]
        self._traced = order.sort().values.to(device)

    @property
    def layout(self) -> Layout:
        """The layout with the keep counts as they are now."""
        if self.allocator is None:
            return self._layout
        return self.allocator.layout_of(self.state.keep_counts)

    def move(self, soft: SoftUNet, step: int) -> dict[str, Any] | None:
        """Move the mask when it is due before optimiser step ``step``; returns the log row."""
        knobs = self.method.flow
        if knobs is None or step >= knobs.binarised_at or step % knobs.update_every:
            return None
        update = step // knobs.update_every
        progress = (update + 1) / knobs.updates
        every = knobs.criterion_every * (COARSE_REFRESH if knobs.granularity == "coarse" else 1)
        rank = None
        if update % every == 0:
            # keep counts rest in the second half, so that the masks can follow them to the end
            rank = self.estimate(soft, reallocate=progress <= LAST_REALLOCATION or update == 0)
        removed = flow.removed_share(progress, knobs.budget)
        budget = self.sizes - removed * (self.sizes - self.state.keep_counts)
        if self.allocator is not None:
            # counts that have just changed are followed as fast as the continuity bound allows
            low, high = (soft.mask - knobs.max_move), (soft.mask + knobs.max_move)
            budget = budget.clamp(
                flow.block_sums(low.clamp(min=0), self.block, len(budget)),
                flow.block_sums(high.clamp(max=1), self.block, len(budget)),
            )
        before, gamma = soft.mask.clone(), knobs.gamma * progress
        soft.sinusoid_scale.fill_(1 - removed)
        if knobs.process == "hard":
            kept = budget.ceil().long()
            soft.mask.copy_(flow.binarise(before, self.state.scores, self.block, kept))
        else:
            soft.mask.copy_(
                flow.flow_step(
                    before,
                    self.state.scores,
                    gamma=gamma,
                    rate=knobs.flow_rate,
                    max_move=knobs.max_move,
                    budget=budget,
                    block=self.block,
                )
            )
        self._follow(soft.mask, step)
        undecided = (soft.mask > 0.05) & (soft.mask < 0.95)
        return {
            "budget": (budget.sum() / self.sizes.sum()).item(),
            "sinusoid_scale": 1 - removed,
            "gamma": gamma,
            "max_move": (soft.mask - before).abs().max().item(),
            "undecided": undecided.float().mean().item(),
            "returned": self.state.returned,
            "spearman": rank,
        }

    def estimate(self, soft: SoftUNet, *, reallocate: bool = True) -> float | None:
        """Refresh the scores; returns the rank correlation with the estimate before.

        Parameters
        ----------
        soft : the masked network.
        reallocate : whether free inner widths are chosen anew.
        """
        started = time.perf_counter()
        state, method = self.state, self.method
        batches = self.batches(state.estimates)
        with sharding.whole(soft):
            if method.criterion == "diff_pruning":
                raw = scoring.diff_pruning_scores(
                    soft,
                    self.noise_scheduler,
                    batches,
                    threshold=method.score_threshold,
                    parts=len(batches) // method.criterion_batches,
                )
            else:
                raw = scoring.raw_scores(
                    soft,
                    self.noise_scheduler,
                    batches,
                    criterion=method.criterion,
                    reduction=method.reduction,
                    hvp=method.hvp,
                    horizon=self.horizon,
                    seed=self.seed,
                )
        scores = scoring.normalise(raw, self._layout, method.criterion)
        shared = scoring.normalise(raw, self._layout, "lookahead")
        rank = None
        state.last_scores, last = scores, state.last_scores
        if state.estimates and method.flow:
            alive = soft.mask > 0.05
            rank = flow.spearman(last[alive], scores[alive])
            decay = method.flow.score_ema
            scores = decay * state.scores + (1 - decay) * scores
            shared = decay * state.shared_scores + (1 - decay) * shared
        state.scores, state.shared_scores = scores, shared
        if self.allocator is not None and reallocate:
            counts = self.allocator.layout(shared).keep_counts
            state.keep_counts = counts.to(self.block.device)
        state.estimates += 1
        state.seconds += time.perf_counter() - started
        return None if rank is None or math.isnan(rank) else rank

    def binarise(self, soft: SoftUNet, step: int) -> int:
        """Set every mask to 0 or 1 and let unaligned norms take the slim net's membership.

        Returns the number of norms that changed their membership.
        """
        state = self.state
        soft.mask.copy_(flow.binarise(soft.mask, state.scores, self.block, state.keep_counts))
        soft.sinusoid_scale.zero_()
        state.binary = True
        self._follow(soft.mask, step)
        return soft.adopt_slim_membership()

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
