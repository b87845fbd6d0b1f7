"""Tiny DeepSeek-OCR-like models and their prompts, for the tests of the methods that run them."""

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    DeepseekOcr2Config,
    DeepseekOcr2ForConditionalGeneration,
    PreTrainedTokenizerFast,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
)

from compress.models.deepseek_ocr_processor import DeepseekOcrProcessor
from compress.models.deepseek_ocr_views import Mode

WORDS = ["<pad>", "<s>", "</s>", "?", "<image>", *"\n abcdefghijklmnopqrstuvwxyz."]
SMALL = Mode(256, 128)  # 4 tokens a side, crops 2
LAYERS = 2


def tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )


def _text(**more):
    return {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 8,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _sam(side):
    return {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": side,
        "window_size": 4,
        "global_attn_indexes": [],
        "output_channels": 8,
        "downsample_channels": [8, 16],
        "mlp_dim": 24,
    }


def _encoder(**more):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return {**sizes, "num_attention_heads": 2, **more}


def _filled(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros: every path carries something
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.normal_(0, 0.2).add_(0.5)
    return model.eval()


def deepseek_ocr(**text):
    """DeepSeek-OCR; Unlimited-OCR with ``sliding_window`` and no ``layer_types``."""
    config = UnlimitedOcrConfig(
        text_config=_text(**(text or {"layer_types": ["full_attention"] * LAYERS})),
        vision_config={"sam_config": _sam(256), "encoder_config": _encoder(image_size=56)},
        image_token_id=WORDS.index("<image>"),
    )
    return _filled(UnlimitedOcrForConditionalGeneration(config))


def unlimited_ocr(window=4):
    return deepseek_ocr(sliding_window=window)


def deepseek_ocr2():
    config = DeepseekOcr2Config(
        text_config=_text(mlp_layer_types=["dense", "sparse"]),
        vision_config={
            "sam_config": _sam(1024),
            "encoder_config": _encoder(num_key_value_heads=1),
        },
        image_token_id=WORDS.index("<image>"),
    )
    return _filled(DeepseekOcr2ForConditionalGeneration(config))


def page(width, height, seed, written=1.0):
    """A page whose upper part is noise and whose lower part is white."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    pixels[round(height * written) :] = 255
    return Image.fromarray(pixels.numpy())


def deepseek_prompt(pages, texts, mode=SMALL):
    """Inputs of DeepSeek-OCR and Unlimited-OCR."""
    return dict(DeepseekOcrProcessor(tokenizer(), mode)(pages, texts))


def deepseek2_prompt(texts, seed=0):
    """Inputs of DeepSeek-OCR-2, whose pages have 256 tokens; the first has one crop of 144."""
    generator = torch.Generator().manual_seed(seed)
    crops = [1, *[0] * (len(texts) - 1)]
    image = WORDS.index("<image>")
    prompts = [
        [1, *[image] * (144 * n + 256 + 1), *tokenizer().encode(text, add_special_tokens=False)]
        for n, text in zip(crops, texts, strict=True)
    ]
    length = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (length - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]),
        "pixel_values": torch.rand(len(texts), 3, 1024, 1024, generator=generator) * 2 - 1,
        "pixel_values_local": torch.rand(1, 3, 768, 768, generator=generator) * 2 - 1,
        "num_local_patches": crops,
    }
