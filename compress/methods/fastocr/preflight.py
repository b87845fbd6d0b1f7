"""Find out whether a model that nobody tried decodes rightly under FastOCR."""

from collections.abc import Mapping
from typing import Any

import torch

from compress.methods.fastocr.gaze import MovingGaze
from compress.methods.fastocr.patch import attached
from compress.methods.fastocr.state import Gaze, Pages
from compress.models.cache_argument import NAMES

STEPS = 2


def preflight(model: Any, inputs: Mapping[str, Any]) -> None:
    """Decode two steps densely and at keep_visual 1.0, and refuse a model where they differ.

    :meth:`FastOCR.attach` sees to it that a family that nobody tried passes this.

    Parameters
    ----------
    model : a vision-language model.
    inputs : a prompt with an image, as its processor makes it, and for ``generate`` if need be a
        ``cache_implementation``. A cache of the caller's own is left alone.

    Raises
    ------
    ValueError : with a sentence that says what is missing.
    """
    inputs = {name: value for name, value in inputs.items() if name not in NAMES}
    before = _logits(model, inputs)
    with attached(model, _everything) as handle:
        after = _logits(model, inputs)
        facts = handle.facts()
    kind = model.config.model_type
    if not facts["visual_tokens"]:
        raise ValueError(
            f"a prompt with an image is expected for the preflight of {kind!r}; input_ids has no "
            f"image token {model.config.image_token_id}; build it with the model's processor"
        )
    deaf = [layer for layer, share in enumerate(facts["attended_by_layer"]) if not share]
    if deaf:
        raise ValueError(
            f"{kind!r} cannot run under FastOCR: layers {', '.join(map(str, deaf))} do not call "
            "transformers' attention interface with the keywords that the text model is given; "
            "leave fastocr out"
        )
    # half precision rounds the two ways of summing differently
    tolerance = 1e-4 if before.dtype == model.dtype else 2e-2
    difference = (after - before).abs().max().item()
    allowed = tolerance * max(1.0, before.abs().max().item())
    if not difference <= allowed:
        raise ValueError(
            f"{kind!r} cannot run under FastOCR: with all visual tokens its logits differ from "
            f"dense ones by {difference:.2g}, more than {allowed:.2g}; its attention does more "
            "than scaled dot products; leave fastocr out"
        )


def _everything(pages: Pages, layers: int) -> Gaze:
    """A gaze that chooses all visual tokens, through the gather, below its one focal layer."""
    return MovingGaze(
        pages,
        layers,
        keep=1.0,
        focal=[0],
        warmup=2,
        dilate=0,
        min_mass=0.0,
        reuse=True,
        periphery=0,
    )


def _logits(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Logits of the decode steps of a greedy answer, (steps, batch, vocabulary), float32."""
    output = model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=1 + STEPS,
        min_new_tokens=1 + STEPS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits[1:])
