"""The knobs of gradflow and of the one-shot baselines."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

KeepMacs = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GradFlow:
    """Gradient-flow iterative soft pruning of a diffusion UNet's channels.

    Wan et al., "Pruning for Sparse Diffusion Models based on Gradient Flow" (ICASSP 2025, arXiv
    2501.09464). A mask in [0, 1] per channel group moves along the gradient flow of
    ``E(m) = -<s, m> + gamma sum m (1 - m)`` inside the sparse space of a shrinking budget while
    all weights train on the masked loss; then the mask is binary and surgery removes what
    carries no signal. The formulation of energy, schedules and bounds is ours.

    Parameters
    ----------
    keep_macs : fraction of the MACs to keep, in (0, 1].
    criterion : what scores a channel; see ``compress.methods.gradflow.criterion.raw_scores``.
    process : "soft" moves the mask continuously; "hard" removes channels for good, a few at each
        mask update (the classical iterative baseline).
    steps : optimiser steps of the soft stage.
    update_every : optimiser steps between mask updates.
    criterion_every : mask updates between criterion estimates.
    criterion_batches : minibatches per estimate, with timesteps stratified over the schedule.
    reduction : "absolute" sums |.| over a channel's weights, "signed" is the first-order change.
    hvp : "finite" difference, or "exact" double backward (the reference; slower).
    score_ema : weight of the past in the scores' running mean, in [0, 1).
    horizon : of ``lookahead``, in learning rate x SGD steps; None is lr x update_every.
    flow_rate : step size of the flow, in masks per unit of normalised score.
    gamma : final weight of the term that drives masks to 0 or 1; it grows from 0.
    budget : "s_shaped" or "cubic" fall of the budget. The timestep sinusoid's values that the slim
        model cannot have fade by the same schedule (our choice: cut at once, they alone make the
        loss jump as much as one-shot pruning does).
    max_move : continuity bound: no mask moves more than this in one update.
    settle : share of the soft stage after binarisation, when weights train on the binary mask.
    allocation : "uniform" keeps one ratio per level, so that the result is a plain diffusers
        model; "global" lets each resnet and attention have an inner width of its own, chosen by
        score per MAC under the same budget (see ``allocation``). They move with
        the scores in the first half of the flow.
    granularity : "fine" gives each channel a mask; "coarse" moves up to 4 neighbouring channels
        together and estimates the criterion a third as often (the journal extension's variant;
        both numbers are our choice).
    """

    name: Literal["gradflow"] = "gradflow"
    keep_macs: KeepMacs = 0.5
    criterion: Literal["gradient_flow", "lookahead", "taylor", "magnitude", "random"] = "taylor"
    process: Literal["soft", "hard"] = "soft"
    steps: Count = 300
    update_every: Count = 5
    criterion_every: Count = 6
    criterion_batches: Count = 2
    reduction: Literal["absolute", "signed"] = "absolute"
    hvp: Literal["finite", "exact"] = "finite"
    score_ema: Annotated[float, Field(ge=0, lt=1)] = 0.7
    horizon: Positive | None = None
    flow_rate: Positive = 0.1
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    budget: Literal["s_shaped", "cubic"] = "s_shaped"
    max_move: Annotated[float, Field(gt=0, le=1)] = 0.1
    settle: Annotated[float, Field(ge=0, lt=1)] = 0.1
    allocation: Literal["uniform", "global"] = "uniform"
    granularity: Literal["fine", "coarse"] = "fine"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OneShot:
    """One-shot pruning through the same pipeline: score once, cut, train.

    ``diff_pruning`` is Fang et al., "Structural Pruning for Diffusion Models" (NeurIPS 2023, arXiv
    2305.10924).

    Parameters
    ----------
    keep_macs : fraction of the MACs to keep, in (0, 1].
    criterion : what scores a channel.
    steps : optimiser steps that a soft stage would take; spent on recovery, so that methods are
        compared at equal total steps.
    criterion_batches : minibatches per estimate.
    reduction, hvp, horizon : as in :class:`GradFlow`.
    threshold : of ``diff_pruning``: timesteps with a smaller relative loss are left out.
    allocation : as in :class:`GradFlow`; the widths are chosen once, like the channels.
    """

    name: Literal["oneshot"] = "oneshot"
    keep_macs: KeepMacs = 0.5
    criterion: Literal[
        "diff_pruning", "taylor", "magnitude", "random", "gradient_flow", "lookahead"
    ] = "diff_pruning"
    steps: Annotated[int, Field(ge=0)] = 300
    criterion_batches: Count = 8
    reduction: Literal["absolute", "signed"] = "absolute"
    hvp: Literal["finite", "exact"] = "finite"
    horizon: Positive | None = None
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.05
    allocation: Literal["uniform", "global"] = "uniform"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Training:
    """How the weights are trained, in the soft stage and in recovery alike.

    Parameters
    ----------
    recover_steps : optimiser steps after surgery.
    batch : images per optimiser step, over all processes.
    lr : peak learning rate of AdamW: 20 steps of warm-up, constant until surgery, then a cosine
        to 0 (one rule for soft, hard and one-shot pruning).
    ema : decay of the averaged weights, which are what is exported.
    distill : weight of the squared distance to the dense model's prediction.
    distill_features : weight of the relative squared distance to its block outputs.
    mixed_precision, gradient_accumulation, trackers : handed to accelerate.
    save_every, keep_states : optimiser steps between saved states, and how many are kept.
    gradient_checkpointing : compute activations again in the backward pass, to save memory.
    flip : mirror half of the training images, chosen by (seed, step, sample).
    condition_dropout : share of the captions that training replaces by the pipeline's own empty
        one, which classifier-free guidance needs; 0.1 as Stable Diffusion 1.x was trained with.
    workers, prefetch : processes that read images, and batches that each reads ahead.
    seed : of batches, noise, timesteps, flips and the random criterion.
    """

    recover_steps: Annotated[int, Field(ge=0)] = 400
    batch: Count = 32
    lr: Positive = 5e-4
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    distill: Annotated[float, Field(ge=0)] = 0.5
    distill_features: Annotated[float, Field(ge=0)] = 0.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_accumulation: Count = 1
    trackers: tuple[str, ...] = ()
    save_every: Count = 100
    keep_states: Count = 2
    gradient_checkpointing: bool = False
    flip: bool = False
    condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    workers: Annotated[int, Field(ge=0)] = 0
    prefetch: Count = 2
    seed: int = 0

    def check_batch(self, processes: int) -> None:
        """Raise ValueError unless the batch divides by what it is cut into."""
        parts = processes * self.gradient_accumulation
        if self.batch % parts:
            raise ValueError(
                f"batch must divide by processes x gradient_accumulation = {parts}; got "
                f"batch={self.batch}; change one of them"
            )
