"""Train the built-in `reader-deepseek`: python compress/models/builtin/train_reader_deepseek.py.

A small DeepSeek-OCR (SAM and CLIP encoders, newline and separator tokens, shared and routed
experts) that transcribes rendered pages, character by character. Needs --run DIR. Seeded; DIR gets
the log and a state from which --resume goes on after a kill; DIR/model, in the layout of
`deepseek-ai/DeepSeek-OCR`, is written whenever the character error rate on validation pages of the
last level falls, measured on the weights as stored.
"""

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
)

from compress.common.files import atomic_folder
from compress.data.pages import SQUARE_PAGE, Difficulty, Page
from compress.models.builtin.reader_training import (
    Level,
    Reader,
    answers,
    as_stored,
    character_tokenizer,
    train,
)
from compress.models.deepseek_ocr import save_deepseek_ocr
from compress.models.deepseek_ocr_processor import IMAGE_TOKEN, DeepseekOcrProcessor
from compress.models.deepseek_ocr_views import Mode

PATCH = 4  # a visual token covers 16x16 pixels: about two characters of one line
SIDE = SQUARE_PAGE.size[0]  # 14x14 visual tokens, 14 newlines and a separator
MOST_NEW_TOKENS = 400
BEGIN, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
PROMPT = "Free OCR."
# of the visual tokens' mean norm in the loss. Nothing else bounds them: without it the blank of a
# page had longer tokens (108 in the mean) than its text (89)
NORM_WEIGHT = 2e-3
# A model that saw whole grids only needs its blank: dropping a quarter of the tokens, all blank,
# cost 12% of its accuracy. DeepSeek-OCR saw pages of many sizes and leaves out padding; this one
# sees grids with holes. Shares of the pages, the others are whole, and the most that is hidden
BLANK_HOLES, ANY_HOLES = (0.4, 1.0), (0.2, 0.3)
INK_CONTRAST = 0.8  # of pixels in [-1, 1]: blank patches stay below 0.2, inked ones are above 1.4


def _level(side: int, lines: tuple[int, int], characters: tuple[int, int], batch: int) -> Level:
    fonts, wear = (12, 16) if side > 32 else (12, 14), 0.0 if side < 128 else 0.25
    shape: Any = {"spacing": (1.05, 1.25), "margin": (3, 6), "wear": wear}
    return Level(Difficulty((side, side), lines, characters, fonts, **shape), batch)


# square pages, as the model sees them, filled with lines: where a lone line stands anywhere on a
# square, reading begins several times later. 4, 9, 16, 36, 64, 121 and 196 visual tokens
LEVELS = (
    _level(32, (1, 1), (2, 3), 128),
    _level(48, (2, 2), (2, 4), 96),
    _level(64, (3, 3), (3, 6), 64),
    _level(96, (4, 5), (4, 9), 48),
    _level(128, (6, 7), (6, 12), 32),
    _level(176, (9, 10), (9, 15), 20),
    Level(SQUARE_PAGE, 16),
)


def build_processor() -> DeepseekOcrProcessor:
    """Tokenizer and views of reader-deepseek; its one mode has a single view."""
    tokenizer = character_tokenizer(
        [BEGIN, END, PAD, IMAGE_TOKEN], pad_token=PAD, eos_token=END, words=[PROMPT]
    )
    tokenizer.bos_token = BEGIN
    tokenizer.model_max_length = 2048
    return DeepseekOcrProcessor(tokenizer, Mode(SIDE), PATCH)


def build_model(processor: DeepseekOcrProcessor) -> UnlimitedOcrForConditionalGeneration:
    """The architecture of reader-deepseek: one dense layer and six with experts, of width 128."""
    tokenizer = processor.tokenizer
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    layers = 7
    config = UnlimitedOcrConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "moe_intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 2048,
            "initializer_range": 0.04,
            # full attention everywhere: that makes Unlimited-OCR's classes DeepSeek-OCR's
            "layer_types": ["full_attention"] * layers,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
            **ends,
        },
        vision_config={
            "sam_config": {
                "image_size": SIDE,
                "patch_size": PATCH,
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "mlp_dim": 128,
                "window_size": 8,
                # global attention over 56x56 patches would cost more than all the rest; CLIP's
                # layers have it
                "global_attn_indexes": [],
                "output_channels": 64,
                "downsample_channels": [128, 160],
                "initializer_range": 0.04,
            },
            "encoder_config": {
                "hidden_size": 160,
                "intermediate_size": 320,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": SIDE,
                "patch_size": 4 * PATCH,
                "initializer_range": 0.04,
            },
        },
        image_token_id=processor.image_token_id,
    )
    model = UnlimitedOcrForConditionalGeneration(config)
    # the learned positions start as sines: the levels of the curriculum resize them, which averages
    # random ones away
    sam, clip = model.model.vision_tower.sam_encoder, model.model.vision_tower.vision_encoder
    with torch.no_grad():
        _, rows, columns, width = sam.pos_embed.shape
        sam.pos_embed.copy_(0.3 * sines(rows, columns, width))
        positions = clip.embeddings.position_embedding.weight
        tokens = SIDE // (4 * PATCH)
        positions[1:] = sines(tokens, tokens, positions.shape[1]).flatten(0, 1)
    model.generation_config = GenerationConfig(max_new_tokens=MOST_NEW_TOKENS, **ends)
    return model


def sines(rows: int, columns: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, ``(rows, columns, width)``, from fast to slow."""
    speeds = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    down = torch.arange(rows)[:, None, None] * speeds
    right = torch.arange(columns)[None, :, None] * speeds
    parts = [down.sin(), down.cos(), right.sin(), right.cos()]
    return torch.cat([part.expand(rows, columns, -1) for part in parts], 2)


def encode(processor: DeepseekOcrProcessor, pages: list[Page]) -> dict[str, torch.Tensor]:
    """Inputs and labels of square pages of one size: the loss is on the answer and its end only."""
    tokenizer = processor.tokenizer
    sized = replace(processor, mode=Mode(pages[0].image.width))
    inputs = sized([p.image for p in pages], [PROMPT] * len(pages))
    answers = [tokenizer.encode(p.text, add_special_tokens=False) for p in pages]
    answers = [answer + [tokenizer.eos_token_id] for answer in answers]
    length = max(map(len, answers))
    padded = torch.tensor([a + [tokenizer.pad_token_id] * (length - len(a)) for a in answers])
    ignored = torch.tensor([a + [-100] * (length - len(a)) for a in answers])
    prompts = inputs["input_ids"]
    seen = torch.ones(len(pages), prompts.shape[1] + length, dtype=torch.long)
    seen[:, : prompts.shape[1]][prompts == processor.image_token_id] = torch.cat(
        [_seen(p, inked) for p, inked in zip(pages, _inked(inputs["pixel_values"]), strict=True)]
    ).long()
    return {
        "input_ids": torch.cat([prompts, padded], 1),
        "labels": torch.cat([torch.full_like(prompts, -100), ignored], 1),
        "pixel_values": inputs["pixel_values"],
        # padding stands on the right, where no causal attention looks: only hidden tokens count
        "attention_mask": seen,
    }


def _inked(pixel_values: torch.Tensor) -> torch.Tensor:
    """Which visual tokens' patches have ink, ``(pages, rows, columns)``."""
    grey = pixel_values.flatten(0, -4).mean(1)
    patches = grey.unfold(1, 4 * PATCH, 4 * PATCH).unfold(2, 4 * PATCH, 4 * PATCH).flatten(3)
    return patches.amax(-1) - patches.amin(-1) > INK_CONTRAST


def _seen(page: Page, inked: torch.Tensor) -> torch.Tensor:
    """Which of a page's visual tokens the language model sees, separator included, flat.

    A row without tokens has no newline either. The page itself is the seed.
    """
    rng = random.Random(page.text)
    draw = rng.random()
    hidden = torch.zeros_like(inked)
    if draw < BLANK_HOLES[0] + ANY_HOLES[0]:
        blank_only = draw < BLANK_HOLES[0]
        share = rng.uniform(0, (BLANK_HOLES if blank_only else ANY_HOLES)[1])
        chances = torch.tensor([rng.random() for _ in range(inked.numel())]).view_as(inked)
        hidden = (chances < share) & ~(inked & blank_only)
    seen = torch.cat([~hidden, (~hidden).any(1, keepdim=True)], 1)
    return torch.cat([seen.flatten(), seen.new_ones(1)])


def loss(
    model: UnlimitedOcrForConditionalGeneration, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Cross-entropy, and a price for the length of visual tokens: what says nothing gets short."""
    lengths: list[torch.Tensor] = []

    def measure(module: torch.nn.Module, args: object, tokens: torch.Tensor) -> None:
        lengths.append(tokens.float().norm(dim=-1).mean())

    hook = model.model.multi_modal_projector.register_forward_hook(measure)
    try:
        written = model(**inputs).loss
    finally:
        hook.remove()
    return written + NORM_WEIGHT * torch.stack(lengths).mean()


def read(processor: DeepseekOcrProcessor, model: Any, pages: list[Page]) -> list[str]:
    """Transcribe square pages of one size greedily."""
    sized = replace(processor, mode=Mode(pages[0].image.width))
    inputs = sized([p.image for p in pages], [PROMPT] * len(pages))
    return answers(model, processor, inputs)


def save(processor: DeepseekOcrProcessor, model: Any, folder: Path) -> None:
    """Write the model folder in float16, atomically."""
    with atomic_folder(folder) as temporary:
        save_deepseek_ocr(as_stored(model).half(), processor, temporary)


def build() -> Reader:
    """The untrained reader."""
    processor = build_processor()
    return Reader(
        build_model(processor),
        partial(encode, processor),
        partial(read, processor),
        partial(save, processor),
        loss,
    )


if __name__ == "__main__":
    train(__doc__, build, LEVELS)
