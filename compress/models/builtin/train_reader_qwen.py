"""Train the built-in `reader-qwen`: python compress/models/builtin/train_reader_qwen.py --run DIR.

A small Qwen2.5-VL that transcribes rendered pages, character by character. Seeded; DIR gets the log
and a state from which --resume goes on after a kill; DIR/model is written whenever the character
error rate on validation pages of the last level falls, measured on the weights as stored.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from compress.common.files import atomic_folder
from compress.data.pages import Page
from compress.models.builtin.reader_training import (
    LEVELS,
    Reader,
    answers,
    as_stored,
    character_tokenizer,
    train,
)

PATCH, MERGE = 8, 2  # a visual token covers 16x16 pixels: about two characters of one line
MOST_NEW_TOKENS = 640
SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# the images of the user's turn in brackets, then the answer. The reader does one thing, so whatever
# text asks for it is left out: no instruction, no role names, they would cost a token a character
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' }}"
    "{%- for part in message.content if part.type == 'image' -%}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- endfor -%}"
    "{{ '<|im_end|>' }}"
    "{%- endfor -%}"
)
PROMPT = "<|im_start|><|vision_start|><|image_pad|><|vision_end|><|im_end|>"


def build_processor() -> Qwen2_5_VLProcessor:
    """Tokenizer, image processor and chat template of reader-qwen."""
    tokenizer = character_tokenizer(SPECIALS, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.model_max_length = 2048
    sizes = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "size": {"shortest_edge": 1024, "longest_edge": 1 << 20},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes),
        tokenizer,
        Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    processor: Qwen2_5_VLProcessor, layers: int = 8
) -> Qwen2_5_VLForConditionalGeneration:
    """The architecture of reader-qwen: 8 text layers of width 128, 3 vision layers of width 96."""
    tokenizer = processor.tokenizer
    special = {word: tokenizer.convert_tokens_to_ids(word) for word in SPECIALS}
    ends = {
        "bos_token_id": special["<|im_start|>"],
        "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"],
    }
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.04,
            # rows and columns take turns at the frequencies, and the base fits pages of a few
            # hundred tokens: by default the columns get angles of 0.0002 a token and less
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "mrope_section": [0, 1, 1] * 8,
            },
            **ends,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 128,
            "initializer_range": 0.04,
        },
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(max_new_tokens=MOST_NEW_TOKENS, **ends)
    return model


def encode(
    processor: Qwen2_5_VLProcessor, pages: list[Page], device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Inputs and labels of pages of one size: the loss is on the answer and its end only.

    Pixels are prepared on ``device``, where they stay.
    """
    end = processor.tokenizer.eos_token
    inputs = processor(
        images=[p.image for p in pages],
        text=[PROMPT + p.text + end for p in pages],
        padding=True,
        padding_side="right",
        return_tensors="pt",
        device=device,
    )
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    images = inputs["mm_token_type_ids"][0].sum()
    labels[:, : images + 4] = -100
    # padding stands on the right, where no causal attention looks; without a mask SDPA skips what
    # lies above the diagonal (a fifth of the step)
    inputs["attention_mask"].fill_(1)
    return {**inputs, "labels": labels}


def read(processor: Qwen2_5_VLProcessor, model: Any, pages: list[Page]) -> list[str]:
    """Transcribe pages greedily."""
    inputs = processor(
        images=[p.image for p in pages],
        text=[PROMPT] * len(pages),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return answers(model, processor, inputs)


def save(processor: Qwen2_5_VLProcessor, model: Any, folder: Path) -> None:
    """Write the model folder: float16 safetensors, tokenizer and processor, atomically."""
    with atomic_folder(folder) as temporary:
        as_stored(model).half().save_pretrained(temporary)
        processor.save_pretrained(temporary)


def build() -> Reader:
    """The untrained reader."""
    processor = build_processor()
    return Reader(
        build_model(processor),
        partial(encode, processor),
        partial(read, processor),
        partial(save, processor),
    )


if __name__ == "__main__":
    train(__doc__, build, LEVELS)
