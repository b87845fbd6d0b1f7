"""Attach FastOCR with its knobs to a model."""

from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compress.methods.base import Handle
from compress.methods.fastocr.calibration import default_count
from compress.methods.fastocr.fixation import (
    Fixation,
    last_fixation,
    random_fixation,
    same_mean_budget,
    top_k,
)
from compress.methods.fastocr.gaze import FixedGaze, MovingGaze
from compress.methods.fastocr.patch import attached, decoder
from compress.methods.fastocr.preflight import preflight
from compress.methods.fastocr.state import Gaze, Pages
from compress.models.visual import ADAPTERS

if TYPE_CHECKING:
    from compress.methods.fastocr.method import FastOCR


def attach(method: "FastOCR", model: Any) -> AbstractContextManager[Handle]:
    """:meth:`FastOCR.attach`."""
    layers = len(decoder(model).layers)
    if method.focal_layers != "auto" and max(method.focal_layers) >= layers:
        raise ValueError(
            f"focal_layers should be among the model's {layers}, counted from 0; got "
            f"{list(method.focal_layers)}; calibrate on this model"
        )
    tried = model.config.model_type in ADAPTERS
    return attached(
        model, partial(open_gaze, method), None if tried else preflight, method.min_visual
    )


def open_gaze(method: "FastOCR", pages: Pages, layers: int) -> Gaze:
    """The gaze of a new request, on a model of so many layers."""
    focal = None if method.focal_layers == "auto" else sorted(set(method.focal_layers))
    if method.fixation == "dynamic":
        return MovingGaze(
            pages,
            layers,
            keep=method.keep_visual,
            focal=focal,
            warmup=method.warmup,
            dilate=method.dilate,
            min_mass=method.min_mass,
            reuse=method.reuse,
            periphery=method.periphery,
        )
    dense = default_count(layers) if focal is None else len(focal)
    budgets = [
        same_mean_budget(method.keep_visual, count, layers, dense, method.periphery)
        for count in pages.counts
    ]
    device = pages.rows.device

    def choose(layer: int, scores: torch.Tensor) -> Fixation:
        if method.fixation == "static":
            return top_k(scores, torch.tensor(budgets, device=device), max(budgets))
        if method.fixation == "random":
            return random_fixation(pages.counts, budgets, method.seed + layer).to(device)
        return last_fixation(pages.counts, budgets).to(device)

    return FixedGaze(choose, 1 if focal else method.warmup, method.periphery)
