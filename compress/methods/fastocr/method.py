"""The knobs of FastOCR and of the static fixations that it is compared with."""

from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from compress.methods.fastocr.calibration import default_count
from compress.methods.fastocr.fixation import (
    Fixation,
    last_fixation,
    random_fixation,
    same_mean_budget,
    top_k,
)
from compress.methods.fastocr.gaze import FixedGaze, MovingGaze
from compress.methods.fastocr.patch import Handle, attached, decoder
from compress.methods.fastocr.preflight import preflight
from compress.methods.fastocr.state import Gaze, Pages
from compress.models.visual import ADAPTERS

Layer = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FastOCR:
    """Each decode step attends to the few visual tokens on which the eye rests now.

    Tang et al., "FastOCR: Dynamic Visual Fixation via KV Cache Pruning for Efficient Document
    Parsing" (arXiv 2605.17447). A few focal layers attend to the whole page; the visual tokens
    with the highest head-mean attention there are what the layers below attend to, and, in the next
    step, the layers above. Nothing is evicted; the prompt is read densely, and so is the first
    step. No code is public: the formulation is ours, after the abstract.

    Parameters
    ----------
    keep_visual : fraction of a sequence's visual tokens that a layer that is not focal attends to,
        in (0, 1]; rounded up.
    focal_layers : layers that attend to all, as calibration found them; "auto" finds a seventh of
        the layers in the first ``warmup`` steps of each request, for its batch as a whole.
    dilate : rows and columns around the best tokens that take the place of the last ones; the
        number of tokens stays.
    min_mass : when less than this share of a focal layer's attention over visual tokens lies on the
        fixation in force, the eye has jumped, and the rest of the step is dense. 0 is the paper.
    reuse : False lets layers above the first focal one attend to all, instead of to the fixation of
        the step before.
    periphery : summary tokens per key head by which a layer sees what it does not attend to, each
        the mean of visual tokens that are alike and weighted by their number; see
        :mod:`compress.methods.fastocr.periphery`. Counted as attended. Ours; 0 is the paper.
    min_visual : a batch none of whose sequences has as many visual tokens is decoded densely: few
        tokens cost less than choosing among them. "auto" is what ``compress bench fastocr``
        measured on the device, 0 where nobody did; 0 never switches off. Ours.
    warmup : dense first steps where ``focal_layers`` is "auto".
    fixation : "dynamic" is the method. The others fix what a layer attends to for the whole
        answer, at the same mean number of attended tokens, without focal layers: "static" is each
        layer's own top-k of the last dense step, "random" a draw per layer, "window" the last
        ones in reading order.
    seed : of the random fixation.
    """

    name: Literal["fastocr"] = "fastocr"
    keep_visual: Annotated[float, Field(gt=0, le=1)] = 0.05
    focal_layers: Literal["auto"] | Annotated[tuple[Layer, ...], Field(min_length=1)] = "auto"
    dilate: Annotated[int, Field(ge=0)] = 0
    min_mass: Annotated[float, Field(ge=0, lt=1)] = 0.0
    reuse: bool = True
    periphery: Annotated[int, Field(ge=0)] = 0
    min_visual: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    warmup: Annotated[int, Field(ge=2)] = 8
    fixation: Literal["dynamic", "static", "random", "window"] = "dynamic"
    seed: int = 0

    @model_validator(mode="after")
    def _fixed_ones_have_no_eye(self) -> "FastOCR":
        if self.fixation != "dynamic" and (self.dilate or self.min_mass or not self.reuse):
            raise ValueError(
                f"dilate, min_mass and reuse belong to the dynamic fixation; got fixation="
                f"{self.fixation!r} with dilate={self.dilate}, min_mass={self.min_mass}, "
                f"reuse={self.reuse}; leave them out"
            )
        return self

    def attach(self, model: Any) -> AbstractContextManager[Handle]:
        """Let ``model`` decode so until the context is left, which restores everything.

        Greedy search and sampling, any batch; see ``patch.Handle`` for what the context gives. A
        model of a family without an adapter passes a preflight when it first generates from a prompt
        with an image: two steps, dense and with all visual tokens; where

        Raises
        ------
        ValueError : when the model cannot be served, or has no such focal layer.
        """
        layers = len(decoder(model).layers)
        if self.focal_layers != "auto" and max(self.focal_layers) >= layers:
            raise ValueError(
                f"focal_layers should be among the model's {layers}, counted from 0; got "
                f"{list(self.focal_layers)}; calibrate on this model"
            )
        tried = model.config.model_type in ADAPTERS
        return attached(model, self.open_gaze, None if tried else preflight, self.min_visual)

    def open_gaze(self, pages: Pages, layers: int) -> Gaze:
        """The gaze of a new request, on a model of so many layers."""
        focal = None if self.focal_layers == "auto" else sorted(set(self.focal_layers))
        if self.fixation == "dynamic":
            return MovingGaze(
                pages,
                layers,
                keep=self.keep_visual,
                focal=focal,
                warmup=self.warmup,
                dilate=self.dilate,
                min_mass=self.min_mass,
                reuse=self.reuse,
                periphery=self.periphery,
            )
        dense = default_count(layers) if focal is None else len(focal)
        budgets = [
            same_mean_budget(self.keep_visual, count, layers, dense, self.periphery)
            for count in pages.counts
        ]
        device = pages.rows.device

        def choose(layer: int, scores: torch.Tensor) -> Fixation:
            if self.fixation == "static":
                return top_k(scores, torch.tensor(budgets, device=device), max(budgets))
            if self.fixation == "random":
                return random_fixation(pages.counts, budgets, self.seed + layer).to(device)
            return last_fixation(pages.counts, budgets).to(device)

        return FixedGaze(choose, 1 if focal else self.warmup, self.periphery)
