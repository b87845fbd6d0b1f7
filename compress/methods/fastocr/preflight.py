"""Find out whether a model of a family without an adapter decodes correctly under FastOCR."""

from collections.abc import Mapping
from typing import Any

import torch

from compress.methods.fastocr.hooks import attached
from compress.methods.fastocr.policy import FocalPolicy
from compress.methods.fastocr.visual_tokens import VisualTokens
from compress.models.cache_argument import NAMES

STEPS = 2


def preflight(model: Any, inputs: Mapping[str, Any]) -> None:
    """Decode two steps densely and with all visual tokens, and refuse a model where they differ.

    :meth:`FastOCR.attach` calls it for families without an adapter.

    Parameters
    ----------
    model : a vision-language model.
    inputs : a prompt with an image, as its processor makes it, and for ``generate`` possibly a
        ``cache_implementation``. A cache among them is not used.
    """
    inputs = {name: value for name, value in inputs.items() if name not in NAMES}
    before = _logits(model, inputs)
    with attached(model, _everything) as handle:
        after = _logits(model, inputs)
        facts = handle.facts()
    kind = model.config.model_type
    if not facts["visual_tokens"]:
        raise ValueError(
            f"FastOCR's preflight of {kind!r} expects a prompt with an image; input_ids has no "
            f"image token {model.config.image_token_id}; build it with the model's processor"
        )
    unreached = [layer for layer, share in enumerate(facts["attended_by_layer"]) if not share]
    if unreached:
        raise ValueError(
            f"{kind!r} cannot run under FastOCR: layers {', '.join(map(str, unreached))} do not "
            "call transformers' attention interface with the keywords that the text model is "
            "given; leave fastocr out"
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


def _everything(tokens: VisualTokens, layers: int) -> FocalPolicy:
    """A policy that chooses all visual tokens, and gathers them in all layers but one."""
    return FocalPolicy(tokens, layers, keep=1.0, focal=[0])


def _logits(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Logits of the decode steps of a greedy answer, ``(steps, batch, vocabulary)`` in float32."""
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
