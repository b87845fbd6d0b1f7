"""Let a vision-language model transcribe pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from compress.models.visual import adapter_for, build_prompt, to_device, visual_layouts

MOST_NEW_TOKENS = 4096  # where neither the caller nor the checkpoint says


@dataclass(frozen=True)
class Reading:
    """What a model made of one page.

    Parameters
    ----------
    text : without special tokens.
    new_tokens : generated, the end token counted.
    visual_tokens : of the page in the prompt, newlines and separators counted.
    ended : whether the model ended by itself, rather than at the length limit.
    """

    text: str
    new_tokens: int
    visual_tokens: int
    ended: bool


@torch.no_grad()
def read_pages(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    prompt: str | None = None,
    max_new_tokens: int | None = None,
) -> list[Reading]:
    """Transcribe pages greedily, as one batch.

    Parameters
    ----------
    model, processor : of :func:`compress.models.vlm.load_vlm`.
    images : one page each.
    prompt : what to do with them; the family's prompt for plain text when None.
    max_new_tokens : of a page; what the checkpoint's generation settings say when None, and where
        they say nothing what its positions leave, but at most ``MOST_NEW_TOKENS``.

    Raises
    ------
    TypeError, ValueError : for images that cannot be used.
    """
    family = adapter_for(model.config)
    text = family.read_prompt if prompt is None else prompt
    inputs = build_prompt(model, processor, images, [text] * len(images))
    inputs = to_device(inputs, model.device)
    layouts = visual_layouts(model, inputs)
    length = inputs["input_ids"].shape[1]
    left = model.config.get_text_config().max_position_embeddings - length
    limit = max_new_tokens or model.generation_config.max_new_tokens or min(left, MOST_NEW_TOKENS)
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=limit)
    new = whole[:, length:].cpu()
    texts = processor.batch_decode(new, skip_special_tokens=True)
    ends = torch.tensor(_ends(model))
    readings = []
    for row, answer, layout in zip(new, texts, layouts, strict=True):
        stops = torch.isin(row, ends).nonzero()[:, 0]
        ended = len(stops) > 0
        count = int(stops[0]) + 1 if ended else len(row)
        readings.append(Reading(answer, count, len(layout.positions), ended))
    return readings


def _ends(model: Any) -> list[int]:
    """Ids that end an answer."""
    ends = model.generation_config.eos_token_id
    return list(ends) if isinstance(ends, list | tuple) else [-1 if ends is None else ends]
