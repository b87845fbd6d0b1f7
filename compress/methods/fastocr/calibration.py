"""Find the focal layers of a model while it answers prompts densely."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from compress.methods.fastocr.hooks import attached, decoder
from compress.methods.fastocr.recall import Calibration, Recorder, default_count, summary
from compress.methods.fastocr.visual_tokens import VisualTokens


def calibrate(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    keep_visual: float = 0.05,
    count: int | None = None,
    max_new_tokens: int = 128,
) -> Calibration:
    """Let a model transcribe some pages densely, and choose its focal layers.

    Parameters
    ----------
    model : a vision-language model.
    batches : model inputs, of :func:`compress.models.visual.build_prompt`.
    keep_visual : fraction of the visual tokens that will be kept.
    count : focal layers to choose; None is :func:`compress.methods.fastocr.recall.default_count`.
    max_new_tokens : per page; steps after the end of its text do not count.

    Raises
    ------
    ValueError : when ``count`` is not one of the model's numbers of layers, or no answer has two
        decode steps.
    """
    layers = len(decoder(model).layers)
    count = default_count(layers) if count is None else count
    if not 1 <= count <= layers:
        raise ValueError(
            f"count should be between 1 and the model's {layers} layers; got {count}; correct it"
        )
    recorders: list[Recorder] = []

    def make_recorder(tokens: VisualTokens, layers: int) -> Recorder:
        recorders.append(Recorder(tokens, layers, keep_visual))
        return recorders[-1]

    sums = []
    with attached(model, make_recorder):
        for inputs in batches:
            output = model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens
            )
            answers = output[:, inputs["input_ids"].shape[1] :]
            sums += [recorder.sums(_lengths(model, answers)) for recorder in recorders]
            recorders.clear()
    return summary(sums, keep_visual, count, layers)


def _lengths(model: Any, answers: torch.Tensor) -> list[int]:
    """Tokens before the end of each answer: its decode steps that read a token of the text."""
    end = model.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else end, device=answers.device).flatten()
    before = torch.isin(answers, ends).int().cumsum(1) == 0
    return before.sum(1).tolist()
