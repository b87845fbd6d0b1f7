"""How weights are trained: the knobs that recipes, Python and every weight method share."""

from typing import Literal

from pydantic import Field

from compress.common.settings import (
    MOST_PROCESSES,
    Batch,
    Count,
    NonNegative,
    Positive,
    Seed,
    Settings,
)


class Recover(Settings):
    """Training of the slim net after surgery."""

    steps: NonNegative = 400
    """Optimiser steps; 0 leaves the net as surgery made it."""
    batch: Batch = 32
    """Images per optimiser step, over all processes, in the soft stage as well."""
    lr: Positive = 5e-4
    """Peak learning rate of AdamW: 20 steps of warm-up, constant until surgery, then a cosine to 0
    (one rule for soft, hard and one-shot pruning)."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay of the averaged weights that are exported; larger averages over more steps."""
    distill: float = Field(0.5, ge=0)
    """Weight of the squared distance to the dense net's prediction in the loss; 0 is none."""
    distill_features: float = Field(0.0, ge=0)
    """Weight of the relative squared distance to the dense net's block outputs; 0 is none."""


class Train(Settings):
    """How optimiser steps are executed, whatever they optimise."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Number format of the training passes; criterion passes stay in float32."""
    gradient_accumulation: Batch = 1
    """Micro-batches that one optimiser step is split into."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers of accelerate, such as tensorboard or wandb."""
    save_every: Count = 100
    """Optimiser steps between two resumable states."""
    keep_states: int = Field(2, ge=1, le=99)
    """Number of states that are kept; a run resumes from the newest intact one."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a
    third more time."""
    flip: bool = False
    """Mirror half of the training images, chosen by (seed, step, sample)."""
    condition_dropout: float = Field(0.1, ge=0, le=1)
    """Share of the captions that training replaces by the pipeline's own empty one, which
    classifier-free guidance needs; labels only where the model has one that means none."""
    workers: int = Field(0, ge=0, le=MOST_PROCESSES)
    """Processes that read images for each training process; 0 reads in the process itself."""
    prefetch: int = Field(2, ge=1, le=MOST_PROCESSES)
    """Batches that each worker reads ahead."""


class Training(Recover, Train):
    """How the weights are trained, in the soft stage and in recovery alike."""

    seed: Seed = 0
    """Seed of batches, noise, timesteps, flips and the random criterion."""

    def check_batch(self, processes: int) -> None:
        """Raise ValueError unless the batch divides by what it is cut into."""
        parts = processes * self.gradient_accumulation
        if self.batch % parts:
            raise ValueError(
                f"batch must divide by processes x gradient_accumulation = {parts}; got "
                f"batch={self.batch}; change one of them"
            )
