"""The knobs of FastOCR."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.common.settings import MOST_TOGETHER, Fraction, NonNegative, Seed
from compress.eval.metrics import Metric
from compress.methods.base import Calibrated, Handle, RuntimeMethod, Section, Shown

if TYPE_CHECKING:
    from compress.bench.suite import Benchmark

Layers = Annotated[tuple[NonNegative, ...], Field(min_length=1)]


class FastOCR(RuntimeMethod):
    """Each decode step attends to the few visual tokens that a focal layer chose.

    Tang et al., "FastOCR: Dynamic Visual Fixation via KV Cache Pruning for Efficient Document
    Parsing" (arXiv 2605.17447). A few focal layers attend to the whole page; the visual tokens
    with the highest head-mean attention there are what the layers below attend to, and, in the next
    step, the layers above. Nothing is evicted; the prompt is read densely, and so is the first
    step. The paper's code is not public: the formulation is ours, after the abstract.
    """

    paper: ClassVar[str] = (
        "FastOCR: Dynamic Visual Fixation via KV Cache Pruning for Efficient Document Parsing, "
        "2605.17447"
    )
    serves: ClassVar[str] = "vision-language models (transformers)"
    keeps: ClassVar[str] = "visual tokens that a decode step attends to"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "attended": Metric(
            "Visual tokens attended",
            unit="share",
            group="size",
            how="share of the visual tokens that a layer attends to in a decode step, mean over "
            "layers and steps, counted in the attention function",
        ),
        "refreshes": Metric(
            "Refreshed steps",
            unit="share",
            how="share of the decode steps that the guard opened, counted",
        ),
    }
    used: ClassVar[str] = "attended"
    calibrated: ClassVar[tuple[str, ...]] = ("focal_layers",)

    name: Literal["fastocr"] = "fastocr"
    choose: Literal["focal", "summaries", "signs"] = "focal"
    """What chooses the tokens that a layer attends to: focal layers, which is the paper, or the
    layer's own query, which is our own choice, and leaves no layer dense and nothing to calibrate.
    It asks "summaries" of all visual tokens, opens the best ones, and reads the others as they are;
    or it asks the "signs" of the keys, one bit for each number, which find the best tokens one by
    one, and reads the others as summaries."""
    keep_visual: Fraction = 0.05
    """Fraction of a sequence's visual tokens that a layer that is not focal attends to, or that
    every layer opens; rounded up."""
    min_fixation: NonNegative = 128
    """Visual tokens that such a layer attends to at least, or all where there are fewer. Our own
    choice, after TidalDecode and Kascade; 0 is the paper."""
    focal_layers: Literal["auto"] | Layers = "auto"
    """Layers that attend to all and choose for those below, as calibration measured them; "auto"
    chooses a seventh of the layers for each page, in its first ``warmup`` steps."""
    focal_by: Literal["loss", "recall"] = "loss"
    """How calibration chooses ``focal_layers``: "loss" adds those with which the dense model's
    answers stay the likeliest under these settings, our own choice, after IndexCache; "recall",
    which is cheaper, those on whose choice the other layers' attention lies."""
    dense_layers: Literal["auto", "none"] | Layers = "auto"
    """Layers that attend to all and choose for none: "auto" takes those without a focus, see
    ``min_focus``, by calibration or in a page's first ``warmup`` steps. Our own choice, after
    TidalDecode, OmniKV and Kascade; "none" is the paper."""
    min_focus: float = Field(0.3, ge=0, le=1)
    """Where ``dense_layers`` is "auto": a layer is dense when less than this share of its attention
    over visual tokens lies on its own choice."""
    head_reduce: Literal["mean", "max"] = "mean"
    """How the attention of a focal layer's heads to a token becomes one score. "max" is our own
    choice, after DELTA, and has no kernel."""
    dilate: int = Field(0, ge=0, le=1_000)
    """Rows and columns around the best tokens that replace the last ones; the number of tokens
    stays. Our own choice."""
    min_mass: float = Field(0.0, ge=0, lt=1)
    """When less than this share of a focal layer's attention over visual tokens lies on the
    fixation in force, the rest of the step is dense. Our own choice; 0 is the paper."""
    reuse: bool = True
    """False lets layers before the first focal one attend to all, instead of to the fixation of the
    step before."""
    periphery: Literal["auto"] | Annotated[int, Field(ge=0, le=MOST_TOGETHER)] = 0
    """Summary tokens per key head by which a layer attends to what is not in its fixation, each the
    mean of similar visual tokens, weighted by their number. Counted as attended. Our own choice; 0
    is the paper. "auto", which summaries that choose have by default, is the square root of the
    number of visual tokens."""
    groups: Literal["kmeans", "runs"] = "kmeans"
    """What becomes one summary: similar visual tokens, or "runs" of neighbouring ones, which cost
    nothing to find."""
    min_visual: Literal["auto"] | NonNegative = "auto"
    """A sequence with fewer visual tokens attends to all of them, which costs less than choosing
    among so few. "auto" is what the benchmark measured on the device for focal layers, 0 where it
    was not measured, and for summaries and signs; 0 never switches off. Our own choice."""
    warmup: int = Field(8, ge=2, le=131_072)
    """Dense first steps where ``focal_layers`` or ``dense_layers`` is "auto"."""
    fixation: Literal["dynamic", "static", "random", "window", "oracle"] = "dynamic"
    """"dynamic" is the method. Three fix what a layer attends to for the whole answer, at the same
    mean number of attended tokens, without focal and dense layers (``dense_layers`` have to be
    given or calibrated, since they count): "static" is each layer's own
    top-k of the last dense step, "random" a draw per layer, "window" the last ones in reading
    order. "oracle" is a bound: each layer's own top-k of the step itself. It reads all tokens to
    find them, and counts what it then attends to."""
    seed: Seed = 0
    """Seed of the random fixation."""

    @model_validator(mode="before")
    @classmethod
    def _summaries_that_choose_exist(cls, settings: Any) -> Any:
        if not isinstance(settings, Mapping):
            return settings
        # a recipe's lists are JSON's, which is not known any more after this
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        own = given.get("choose", "focal") != "focal"
        return {"periphery": "auto"} | given if own else given

    @model_validator(mode="after")
    def _only_focal_layers_have_their_settings(self) -> "FastOCR":
        if self.choose == "focal":
            if self.periphery == "auto":
                raise ValueError(
                    "periphery: auto belongs to choose: summaries or signs; got choose='focal'; "
                    "give a number"
                )
            return self
        if not self.periphery:
            raise ValueError(
                f"choose: {self.choose} needs summaries to read; got periphery=0; set it to their "
                "number per key head, or to auto"
            )
        shared = {"name", "choose", "keep_visual", "periphery", "groups", "min_visual"}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in shared and value != field.default:
                raise ValueError(
                    f"{name} belongs to choose: focal; got choose={self.choose!r} with {name}="
                    f"{value!r}; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _only_the_dynamic_fixation_moves(self) -> "FastOCR":
        if self.fixation != "dynamic" and (self.dilate or self.min_mass or not self.reuse):
            raise ValueError(
                f"dilate, min_mass and reuse belong to the dynamic fixation; got fixation="
                f"{self.fixation!r} with dilate={self.dilate}, min_mass={self.min_mass}, "
                f"reuse={self.reuse}; leave them out"
            )
        return self

    def label(self) -> str:
        """The fixation, and the other knobs that are not the paper's, but not its size."""
        if self.choose != "focal":
            return f"{self.choose} {self.periphery}" + ", runs" * (self.groups == "runs")
        parts: list[str] = [self.name if self.fixation == "dynamic" else self.fixation]
        if self.fixation == "dynamic" and self.dense_layers not in ("auto", "none"):
            parts.append(f"{', '.join(map(str, self.dense_layers))} dense")
        if self.head_reduce != "mean":
            parts.append(f"{self.head_reduce} over heads")
        if not self.reuse:
            parts.append("no reuse")
        for word, value in (
            ("guard", self.min_mass),
            ("dilate", self.dilate),
            ("periphery", self.periphery),
        ):
            if value:
                parts.append(f"{word} {value}")
        return ", ".join(parts)

    def kept(self) -> str:
        """The fraction of the visual tokens in the fixation, and its floor."""
        share = f"{self.keep_visual:.2%}".replace(".00%", "%")
        floor = self.min_fixation if self.choose == "focal" else 0
        return f"{share}, at least {floor}" if floor else share

    def count(self, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Put together the counts of several batches.

        Returns
        -------
        ``attended_by_layer`` : mean share of the visual tokens that each layer attended to.
        ``attended`` : the mean over the layers.
        ``switched_off`` : sequences that were decoded densely, if there were any.
        ``refreshes`` : share of the decode steps that the guard opened.

        Nothing without a decode step.
        """
        facts = [batch for batch in facts if batch["steps"]]
        if not facts:
            return {}
        steps = [batch["steps"] for batch in facts]
        offered = [batch["steps"] * batch["visual_tokens"] for batch in facts]
        layers = [
            sum(share * weight for share, weight in zip(layer, offered, strict=True)) / sum(offered)
            for layer in zip(*(batch["attended_by_layer"] for batch in facts), strict=True)
        ]
        refreshed = sum(batch["refreshes"] * n for batch, n in zip(facts, steps, strict=True))
        off = sum(batch["switched_off"] for batch in facts)
        return {
            "attended_by_layer": layers,
            "attended": sum(layers) / len(layers),
            **({"switched_off": off} if off else {}),
            "refreshes": refreshed / sum(steps),
        }

    def warnings(self, counts: Mapping[str, Any]) -> list[str]:
        """That pages were decoded densely, if any were."""
        if not (off := counts.get("switched_off")):
            return []
        return [
            f"fastocr switched itself off on {off} pages, which have too few visual tokens for "
            "it to be faster on this device; min_visual: 0 keeps it on"
        ]

    def needs_calibration(self) -> bool:
        """Whether the focal or the dense layers are left open."""
        return self.choose == "focal" and "auto" in (self.focal_layers, self.dense_layers)

    def calibrated_as(self) -> Self:
        """The moving fixation, always on: fixed ones are compared with it, at its mean share."""
        return self.model_copy(update={"fixation": "dynamic", "seed": 0, "min_visual": "auto"})

    def calibrate(
        self, model: Any, batches: Sequence[Mapping[str, Any]], max_new_tokens: int
    ) -> Calibrated:
        """Find the dense and focal layers of ``model`` while it answers.

        Raises
        ------
        ValueError : when no answer has two decode steps.
        """
        from compress.methods.fastocr.calibration import calibrate

        result = calibrate(self, model, batches, max_new_tokens)
        focal = ", ".join(map(str, result.focal_layers))
        lines = [
            f"focus        {_listed(result.focus)}: of each layer's attention on its own choice",
            f"dense        {', '.join(map(str, result.dense_layers)) or 'none'}",
            f"focal        {focal}{f', by {result.focal_by}' if result.focal_by else ''}",
            f"read         {_listed(result.attended_by_layer)}: {result.attended:.1%} in all",
        ]
        found = {
            "focal_layers": result.focal_layers,
            "dense_layers": result.dense_layers or "none",
        }
        settings = {knob: layers for knob, layers in found.items() if getattr(self, knob) == "auto"}
        return Calibrated(settings, asdict(result), lines)

    def attach(self, model: Any) -> AbstractContextManager[Handle]:
        """Let ``model`` decode so until the context is left, which restores everything.

        Greedy search and sampling, any batch. A model of a family without an adapter passes a
        preflight when it first generates from a prompt with an image: two steps, dense and with all
        visual tokens; where these differ, that call says what is missing.

        Raises
        ------
        ValueError : when the model cannot be served, or has no such focal layer.
        """
        from compress.methods.fastocr.hooks import attached, decoder
        from compress.methods.fastocr.policy import listed, make_policy
        from compress.methods.fastocr.preflight import preflight
        from compress.models.visual import ADAPTERS

        layers = len(decoder(model).layers)
        for name in ("focal_layers", "dense_layers"):
            chosen = listed(getattr(self, name)) or [0]
            if max(chosen) >= layers:
                raise ValueError(
                    f"{name} should be among the model's {layers}, counted from 0; got {chosen}; "
                    "calibrate on this model"
                )
        has_adapter = model.config.model_type in ADAPTERS
        unknown = self.min_visual == "auto" and self.choose != "focal"
        least = 0 if unknown else self.min_visual
        return attached(
            model, partial(make_policy, self), None if has_adapter else preflight, least
        )

    def sections(self, shown: Shown) -> list[Section]:
        """The fixation on the page while it is written."""
        from compress.methods.fastocr.figures import sections

        return sections(self, shown)

    def calibration_sections(self, facts: Mapping[str, Any]) -> list[Section]:
        """The recall that the focal layers were chosen by."""
        from compress.methods.fastocr.figures import calibration_sections

        return calibration_sections(facts)

    @classmethod
    def benchmark(cls) -> "Benchmark":
        """What ``compress bench fastocr`` times."""
        from compress.methods.fastocr.bench import BENCHMARK

        return BENCHMARK


def _listed(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.0%}" for share in shares)
