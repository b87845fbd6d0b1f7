"""The knobs of gradflow and of the one-shot baselines."""

import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from compress.common.settings import Batch, Count, NonNegative, Positive
from compress.methods.base import Event, Pruned, PruneJob, RunRecord, Section, WeightMethod
from compress.methods.gradflow.schedule import steepest_fall

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compress.bench.suite import Benchmark
    from compress.methods.training import Training

# of a criterion that takes passes of its own, over a soft stage, unless it is told otherwise
ESTIMATES = 9


class ChannelPruning(WeightMethod):
    """Knobs that gradflow and one-shot pruning share: scoring and allocation."""

    serves: ClassVar[str] = "diffusion UNets and DiT (diffusers)"
    keeps: ClassVar[str] = "channels or blocks, by MACs"

    criterion: str
    """What scores a channel or block."""
    granularity: str
    """What goes together."""
    criterion_batches: Count
    """Minibatches per estimate of the scores, with timesteps stratified over the schedule."""
    even_within: float = Field(0.01, ge=0, lt=1)
    """Fraction of the MACs, below the largest that fit in `keep_macs`, that an even choice over the
    levels may cost: of the widths in that range the most even are taken."""
    reduction: Literal["absolute", "signed"] = "absolute"
    """"absolute" sums |.| over a channel's weights, "signed" is the first-order change."""
    hvp: Literal["finite", "exact"] = "finite"
    """Hessian-vector products by "finite" difference, or "exact" double backward (slower)."""
    horizon: Positive | None = None
    """Horizon of the lookahead criterion, in learning rate x SGD steps; null is the learning rate
    times the optimiser steps between two estimates."""
    allocation: Literal["uniform", "global"] = "uniform"
    """"uniform" keeps one ratio per level, so that the result is a plain diffusers model, and as
    many units in each layer of a transformer; "global" lets each resnet and attention have an inner
    width of its own, chosen by score per MAC under the same budget. In a flow they move with the
    scores during its first half, at every twelfth of its mask updates. Units of a transformer's
    layers of one shape, which have one price, simply compete."""

    @property
    def flow(self) -> "GradFlow | None":
        """The knobs of the soft stage; None where the mask is chosen at once."""
        return None

    @property
    def unused(self) -> frozenset[str]:
        """What chooses between levels or kinds of blocks, where units alone go."""
        return frozenset({"even_within"} if self.granularity == "unit" else ())

    @property
    def score_threshold(self) -> float:
        """Timesteps with a smaller relative loss are left out by diff_pruning."""
        return 0.0

    def prune(self, job: PruneJob) -> Generator[Event, None, Pruned]:
        """Score, cut and train the denoiser; see `WeightMethod`."""
        from compress.methods.gradflow.train import prune

        return (yield from prune(self, job))

    def forecast(self, pipeline: "DiffusionPipeline", training: "Training") -> dict[str, Any]:
        """Parameters, MACs, widths and groups; see `WeightMethod`."""
        from compress.methods.gradflow.forecast import forecast

        return forecast(pipeline, self, training)

    def sections(self, run: RunRecord) -> list[Section]:
        """What was removed and how, and the training."""
        from compress.methods.gradflow.figures import sections

        return sections(run)


class GradFlow(ChannelPruning):
    """Gradient-flow iterative soft pruning of a UNet's channels or a transformer's blocks.

    Wan et al., "Pruning for Sparse Diffusion Models based on Gradient Flow" (ICASSP 2025, arXiv
    2501.09464). A mask in [0, 1] per channel group moves along the gradient flow of
    ``E(m) = -<s, m> + gamma sum m (1 - m)`` inside the sparse space of a shrinking budget while
    all weights train on the masked loss; then the mask is binarised and surgery removes the
    masked channels. The formulation of energy, schedules and bounds is ours.
    """

    paper: ClassVar[str] = "Pruning for Sparse Diffusion Models based on Gradient Flow, 2501.09464"

    name: Literal["gradflow"] = "gradflow"
    criterion: Literal[
        "fisher", "gradient_flow", "lookahead", "taylor", "magnitude", "random", "obs"
    ] = "fisher"
    """What scores a channel or block. "fisher" begins with the scores of "taylor" on the dense
    model, which whole blocks keep; from then on every optimiser step scores, whose backward pass
    gives the mask's gradient for nothing. "obs" scores units once, on the dense model: those go
    first whose layer can be refitted best without them, as they go one by one. The others take
    passes of their own."""
    process: Literal["soft", "hard"] = "soft"
    """"soft" moves the mask continuously; "hard" removes channels for good, a few at each mask
    update (the classical iterative baseline)."""
    steps: Count = 300
    """Optimiser steps of the soft stage."""
    update_every: Count = Field(None, validate_default=True)
    """Optimiser steps between mask updates, over which "fisher" averages. By default a hundredth of
    the soft stage."""
    criterion_batches: Batch = 16
    """Minibatches per estimate of the scores, with timesteps stratified over the schedule."""
    score_ema: float = Field(0.9, ge=0, lt=1)
    """Weight of the past in the scores' running mean."""
    flow_rate: Positive = 0.1
    """Step size of the flow, in masks per unit of normalised score."""
    gamma: float = Field(2.0, ge=0)
    """Final weight of the term that drives masks to 0 or 1; it grows as the square of the time, so
    that the masks are nearly binary long before they are made so."""
    budget: Literal["s_shaped", "cubic"] = "s_shaped"
    """Shape of the budget's fall."""
    settle: float = Field(0.1, ge=0, lt=1)
    """Share of the soft stage after binarisation, when weights train on the binary mask."""
    criterion_every: Count = Field(None, validate_default=True)
    """Mask updates between estimates of a criterion that takes passes of its own; of no effect on
    "fisher" and "obs". By default a ninth of all, which is 10 of 90."""
    max_move: float = Field(None, gt=0, le=1, validate_default=True)
    """Continuity bound: no mask moves more than this in one update. By default 0.1, or what the
    steepest fall of the budget needs where there are few updates."""
    granularity: Literal["fine", "coarse", "block", "unit", "both"] = "fine"
    """"fine" gives each channel a mask; "coarse" moves up to 4 neighbouring channels together and
    estimates a criterion that takes passes of its own a third as often (the journal extension's
    variant; both numbers are our choice). Of a transformer (ours), "block" gives each block a gate
    on what it adds to the residual stream, so that the result is a plain, shallower model; "unit"
    gives each attention head and feed-forward channel a mask; "both" does both, blocks until about
    the root of ``keep_macs`` is kept."""

    @field_validator("update_every", mode="before")
    @classmethod
    def _follow_steps(cls, value: Any, info: ValidationInfo) -> Any:
        return max(1, info.data.get("steps", 0) // 100) if value is None else value

    @field_validator("criterion_every", "max_move", mode="before")
    @classmethod
    def _follow_schedule(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        # a value that was refused is not among the data
        knobs = cls.model_construct(**{"update_every": 1} | info.data)
        if info.field_name == "criterion_every":
            return max(1, round(knobs.updates / ESTIMATES))
        return max(0.1, steepest_fall(knobs.updates, knobs.budget))

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        channels = self.granularity in ("fine", "coarse")
        if channels and self.allocation == "global" and self.process == "hard":
            raise ValueError(
                "allocation 'global' lets widths grow again, and process 'hard' removes channels "
                "for good; choose process 'soft' or allocation 'uniform'"
            )
        if self.criterion == "obs" and self.granularity not in ("unit", "both"):
            raise ValueError(
                "criterion 'obs' scores heads and feed-forward channels; got granularity "
                f"{self.granularity!r}; choose granularity 'unit' or 'both', or another criterion"
            )
        return self

    @property
    def flow(self) -> "GradFlow":
        """These knobs."""
        return self

    @property
    def unused(self) -> frozenset[str]:
        """How often passes are taken, where none are; and see the base class."""
        once = self.criterion in ("fisher", "obs")
        return super().unused | ({"criterion_every"} if once else set())

    @property
    def binarised_at(self) -> int:
        """The optimiser step before which the mask becomes binary."""
        return self.steps - int(self.settle * self.steps)

    @property
    def updates(self) -> int:
        """Mask updates until then."""
        return math.ceil(self.binarised_at / self.update_every)

    @classmethod
    def benchmark(cls) -> "Benchmark":
        """What ``compress bench gradflow`` times."""
        from compress.methods.gradflow.bench import BENCHMARK

        return BENCHMARK


class OneShot(ChannelPruning):
    """One-shot pruning through the same pipeline: score once, cut, train.

    The default criterion is Fang et al., "Structural Pruning for Diffusion Models" (NeurIPS 2023,
    arXiv 2305.10924).
    """

    paper: ClassVar[str] = "Structural Pruning for Diffusion Models, 2305.10924"

    name: Literal["oneshot"] = "oneshot"
    criterion: Literal[
        "diff_pruning",
        "taylor",
        "magnitude",
        "random",
        "gradient_flow",
        "lookahead",
        "fisher",
        "uniform_depth",
        "block_influence",
        "obs",
    ] = "diff_pruning"
    """What scores a channel or block; "uniform_depth" (evenly spaced blocks stay) and
    "block_influence" (what hardly turns the residual stream goes, ShortGPT, arXiv 2403.03853) are
    for whole blocks; "obs" is for units: what a least-squares refit of a layer cannot make up for,
    and that refit (after OBS-Diff, ICLR 2026)."""
    granularity: Literal["fine", "block", "unit", "both"] = "fine"
    """"fine" removes channels; of a transformer, "block" whole blocks, "unit" attention heads and
    feed-forward channels, "both" both."""
    steps: NonNegative = 300
    """Optimiser steps that a soft stage would take; spent on recovery, so that methods are compared
    at equal total steps."""
    criterion_batches: Batch = 8
    """Minibatches per estimate of the scores, with timesteps stratified over the schedule."""
    threshold: float = Field(0.05, ge=0, lt=1)
    """Timesteps with a smaller relative loss are left out by diff_pruning."""

    @model_validator(mode="after")
    def _check_depth(self) -> Self:
        if self.criterion in ("uniform_depth", "block_influence") and self.granularity != "block":
            raise ValueError(
                f"criterion {self.criterion!r} scores whole blocks; got granularity "
                f"{self.granularity!r}; choose granularity 'block' or another criterion"
            )
        if self.criterion == "obs" and self.granularity != "unit":
            raise ValueError(
                "criterion 'obs' scores heads and feed-forward channels; got granularity "
                f"{self.granularity!r}; choose granularity 'unit' or another criterion"
            )
        return self

    @property
    def score_threshold(self) -> float:
        """The knob."""
        return self.threshold

    def label(self) -> str:
        """One-shot pruning is known by its criterion."""
        return f"one-shot {self.criterion}"
