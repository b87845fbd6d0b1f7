"""Where the eye rested while a page was written: for pictures, not for speed."""

from collections.abc import Mapping
from typing import Any

import torch

from compress.methods.fastocr.attaching import open_gaze as open_policy
from compress.methods.fastocr.fixation import Fixation
from compress.methods.fastocr.method import FastOCR
from compress.methods.fastocr.patch import attached
from compress.methods.fastocr.state import Gaze, Pages
from compress.models.visual import VisualLayout


class _Watched:
    """A gaze that notes what the last layer reads in each step."""

    def __init__(self, gaze: Gaze, layers: int) -> None:
        self.gaze = gaze
        self.periphery = gaze.periphery
        self.last = layers - 1
        self.seen: list[torch.Tensor | None] = []

    def start_step(self) -> None:
        """Begin a step."""
        self.gaze.start_step()

    def fixation(self, layer: int) -> Fixation | None:
        """What the layer reads."""
        found = self.gaze.fixation(layer)
        if layer == self.last:
            self.seen.append(None if found is None else found.index[0, found.valid[0]].cpu())
        return found

    def wants_scores(self, layer: int) -> bool:
        """As the gaze."""
        return self.gaze.wants_scores(layer)

    def see(self, layer: int, scores: torch.Tensor) -> int | torch.Tensor:
        """As the gaze."""
        return self.gaze.see(layer, scores)


def trace(
    method: FastOCR, model: Any, inputs: Mapping[str, Any], max_new_tokens: int
) -> tuple[torch.Tensor, VisualLayout, list[torch.Tensor | None]]:
    """Write one page, and say what was read of it.

    Parameters
    ----------
    method, model : the model must not have the method applied; another one may be.
    inputs : of one sequence, of :func:`compress.models.visual.build_prompt`.
    max_new_tokens : to write.

    Returns
    -------
    Ids of the answer ``(tokens,)``; the layout of the prompt that the decoder read; and for each of
    the answer's tokens but the first, which the prompt gives, the visual tokens that the last layer
    attended to when it wrote it, ``(kept,)``, as places in that layout; None where it attended to
    all.
    """
    opened: list[_Watched] = []
    read: list[VisualLayout] = []

    def open_gaze(pages: Pages, layers: int) -> Gaze:
        read.append(pages.layouts[0])
        opened.append(_Watched(open_policy(method, pages, layers), layers))
        return opened[-1]

    with attached(model, open_gaze):
        whole = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return whole[0, inputs["input_ids"].shape[1] :], read[0], opened[0].seen
