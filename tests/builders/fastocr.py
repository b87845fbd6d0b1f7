"""Models whose attention is far from even, three pages, and the answers of a batch."""

import torch

from builders import vlm
from compress.methods.fastocr import FastOCR

PAGES = [*vlm.PAGES, vlm.page(200, 300, 2)]
TEXTS = [*vlm.TEXTS, "OCR: "]


def model(family, layers=2):
    built, processor = vlm.build(family, layers)
    return fill(built), processor


def paper(**settings):
    """The method as published: no dense layers, and no floor, which small pages are below.

    Summaries that choose have neither.
    """
    own = {"min_fixation": 0, "dense_layers": "none"} if "choose" not in settings else {}
    return FastOCR(**own | settings)


def fill(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(0.01)
            else:  # queries and keys large, so that attention is far from even
                parameter.normal_(0, 0.25 if "q_proj" in name or "k_proj" in name else 0.1)
    model.generation_config.eos_token_id = None
    return model.eval()


def write(model, inputs, steps=4, **settings):
    """Greedy answer: the new tokens (batch, steps + 1), and logits of the decode steps."""
    output = model.generate(
        **inputs,
        max_new_tokens=steps + 1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    logits = torch.stack(output.logits[1:], 1)  # (batch, steps, vocabulary)
    return output.sequences[:, inputs["input_ids"].shape[1] :], logits
