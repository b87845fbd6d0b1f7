"""Let a vision-language model transcribe pages."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteriaList

from compress.common.foreign import reason
from compress.common.stages import stage
from compress.data.page_files import OcrPage
from compress.models.generation import fastest_cache
from compress.models.loops import LoopStopper
from compress.models.visual import adapter_for, build_prompt, inputs_for, visual_layouts

logger = logging.getLogger(__name__)
OPENER_KILLED = "DataLoader worker"  # how torch begins to say so
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
    error : why the page could not be read; its text is empty then.
    loop : whether it was stopped since it repeated itself, see :mod:`compress.models.loops`.
    """

    text: str
    new_tokens: int
    visual_tokens: int
    ended: bool
    error: str | None = None
    loop: bool = False


def read_pages(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    loop_tokens: int | None = None,
    no_repeat_ngram: int | None = None,
) -> list[Reading]:
    """Transcribe pages greedily, as one batch.

    Parameters
    ----------
    model, processor : of :func:`compress.models.vlm.load_vlm`.
    images : one page each.
    prompt : what to do with them; the family's prompt for plain text when None.
    max_new_tokens : of a page; what the checkpoint's generation settings say when None, and where
        they say nothing what its positions leave, but at most ``MOST_NEW_TOKENS``.
    loop_tokens : that exact copies at the end of a text cover when it is stopped; None never stops.
    no_repeat_ngram : length in tokens of pieces that no text may contain twice.

    Raises
    ------
    TypeError, ValueError : for images that cannot be used.
    """
    inputs = page_prompts(model, processor, images, prompt)
    return _generate(model, processor, inputs, max_new_tokens, loop_tokens, no_repeat_ngram)


def try_pages(
    model: Any,
    processor: Any,
    pages: Sequence[OcrPage],
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    loop_tokens: int | None = None,
    no_repeat_ngram: int | None = None,
) -> list[Reading]:
    """Open pages and read them as one batch; of one that cannot be read, its ``error`` is given.

    Parameters
    ----------
    model, processor, prompt, max_new_tokens, loop_tokens, no_repeat_ngram : as in
        :func:`read_pages`.
    pages : each opened here, and named by its error.
    """
    with stage("preprocess"):
        places, inputs, errors = open_prompts(model, processor, pages, prompt)
    readings_of = {place: Reading("", 0, 0, False, error) for place, error in errors.items()}
    if places:
        limits = max_new_tokens, loop_tokens, no_repeat_ngram
        readings = _generate(model, processor, inputs, *limits)
        readings_of.update(zip(places, readings, strict=True))
    return [readings_of[place] for place in range(len(pages))]


def open_prompts(
    model: Any, processor: Any, pages: Sequence[OcrPage], prompt: str | None = None
) -> tuple[list[int], dict[str, Any], dict[int, str]]:
    """Open pages and build their prompt.

    Returns
    -------
    places : of the pages that can be read, in ``pages``.
    inputs : of the model for them, as :func:`page_prompts` makes them; empty where there are none.
    errors : why each other page cannot be read, by its place; the page is named.
    """
    images: dict[int, Image.Image] = {}
    errors: dict[int, str] = {}
    for place, page in enumerate(pages):
        try:
            images[place] = page.open()
        except (ValueError, OSError) as error:  # which name the file
            errors[place] = str(error)

    def built() -> dict[str, Any]:
        return page_prompts(model, processor, list(images.values()), prompt) if images else {}

    try:
        return list(images), built(), errors
    except Exception as failure:  # a processor raises whatever it likes: find the pages it is about
        check_of_a_page(failure)
        for place, image in list(images.items()):
            try:
                page_prompts(model, processor, [image], prompt)
            except Exception as error:
                check_of_a_page(error)
                errors[place] = f"{pages[place].name}: {reason(error)}"
                del images[place]
        return list(images), built(), errors


def check_of_a_page(error: Exception) -> None:
    """Raise an error again that no page is to blame for.

    A lost device is of no use to the other pages either, and torch says that a process of its
    data loader was killed wherever the main thread is at that time.
    """
    words, lost = str(error), getattr(torch, "AcceleratorError", None)
    # before torch 2.8 by its words
    gone = isinstance(error, lost) if lost else words.startswith("CUDA error: ")
    short = "ALLOC_FAILED" in words or "out of memory" in words  # for fewer pages it may do
    if (gone and not short) or words.startswith(OPENER_KILLED):
        raise error


def page_prompts(
    model: Any, processor: Any, images: Sequence[Image.Image], prompt: str | None = None
) -> dict[str, Any]:
    """Model inputs that ask for the texts of pages, on the model's device."""
    family = adapter_for(model.config)
    text = family.read_prompt if prompt is None else prompt
    inputs = inputs_for(model, build_prompt(model, processor, images, [text] * len(images)))
    length, known = inputs["input_ids"].shape[1], _positions(model)
    if length >= known:
        raise ValueError(
            f"the page takes {length:,} tokens, and the model knows {known:,} positions; scale the "
            "page down, or choose a model for pages of its size (the built-in ones know small "
            "rendered pages)"
        )
    return inputs


def _positions(model: Any) -> int:
    return int(model.config.get_text_config().max_position_embeddings)


@torch.no_grad()
def _generate(
    model: Any,
    processor: Any,
    inputs: dict[str, Any],
    max_new_tokens: int | None,
    loop_tokens: int | None,
    no_repeat_ngram: int | None,
) -> list[Reading]:
    layouts = visual_layouts(model, inputs)
    length = inputs["input_ids"].shape[1]
    left = _positions(model) - length
    limit = max_new_tokens or model.generation_config.max_new_tokens or min(left, MOST_NEW_TOKENS)
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": limit}
    if no_repeat_ngram:
        settings["no_repeat_ngram_size"] = no_repeat_ngram

    def write(fast: dict[str, Any]) -> tuple[torch.Tensor, LoopStopper | None]:
        loops = LoopStopper(len(layouts), length, loop_tokens) if loop_tokens else None
        stops = {"stopping_criteria": StoppingCriteriaList([loops])} if loops else {}
        return model.generate(**inputs, **settings, **stops, **fast)[:, length:].cpu(), loops

    fast = fastest_cache(model)
    with stage("generate"):
        try:
            new, loops = write(fast)
        except ValueError as error:
            if not fast or fastest_cache(model):
                raise
            # what cannot be captured is found out in the first answer
            logger.warning("pages are read without a static cache, which is slower: %s", error)
            new, loops = write({})
    stopped = [-1] * len(new) if loops is None else loops.stopped.tolist()
    answers = [row if end < 0 else row[:end] for row, end in zip(new, stopped, strict=True)]
    texts = processor.batch_decode(
        [answer.tolist() for answer in answers], skip_special_tokens=True
    )
    ends = torch.tensor(_ends(model))
    readings = []
    for answer, text, layout, end in zip(answers, texts, layouts, stopped, strict=True):
        stops = torch.isin(answer, ends).nonzero()[:, 0]
        ended = len(stops) > 0  # what a sequence is padded with after its end may look like a loop
        count = int(stops[0]) + 1 if ended else len(answer)
        loop = end >= 0 and not ended
        readings.append(Reading(text, count, len(layout.positions), ended, loop=loop))
    return readings


def _ends(model: Any) -> list[int]:
    """Ids that end an answer."""
    ends = model.generation_config.eos_token_id
    return list(ends) if isinstance(ends, list | tuple) else [-1 if ends is None else ends]
