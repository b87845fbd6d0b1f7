"""Tiny real models of every vision-language family, with their processors and two pages."""

from unittest.mock import patch

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    DeepseekOcr2Config,
    DeepseekOcr2ForConditionalGeneration,
    DeepseekOcr2ImageProcessor,
    DeepseekOcr2Processor,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessor,
    GotOcr2Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
    UnlimitedOcrImageProcessor,
    UnlimitedOcrProcessor,
)
from transformers.models.got_ocr2.processing_got_ocr2 import GotOcr2ProcessorKwargs

from compress.models.deepseek_ocr_processor import DeepseekOcrProcessor
from compress.models.deepseek_ocr_views import Mode

LETTERS = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:"
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}


def _tokenizer(*specials, **named):
    words = ["<pad>", "<s>", "</s>", "?", *specials, *LETTERS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={**{f"special_{i}": s for i, s in enumerate(specials)}, **named},
    )


def _template(image):
    return (
        "{%- for message in messages -%}{%- for part in message.content -%}"
        f"{{%- if part.type == 'image' -%}}{{{{ '{image}' }}}}"
        "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endfor -%}"
    )


def _text(tokenizer, **more):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {"vocab_size": len(tokenizer), **TEXT, **ids, **more}


def _mrope(*sections):
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": list(sections),
        }
    }


QWEN = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
PIXELS = {"shortest_edge": 256, "longest_edge": 1 << 16}
PATCHES = {"patch_size": 8, "merge_size": 2, "size": PIXELS}


def _qwen_ids(tokenizer):
    names = ["vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id"]
    return dict(zip(names, tokenizer.convert_tokens_to_ids(QWEN), strict=True))


def _qwen2_5_vl():
    tokenizer = _tokenizer(*QWEN)
    config = Qwen2_5_VLConfig(
        text_config=_text(tokenizer, **_mrope(2, 3, 3)),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
        },
        **_qwen_ids(tokenizer),
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**PATCHES),
        tokenizer,
        Qwen2VLVideoProcessor(**PATCHES),
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl():
    tokenizer = _tokenizer(*QWEN)
    config = Qwen3VLConfig(
        text_config=_text(tokenizer, head_dim=16, **_mrope(4, 2, 2)),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 8,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
            "out_hidden_size": 32,
        },
        **_qwen_ids(tokenizer),
    )
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**PATCHES),
        tokenizer,
        Qwen3VLVideoProcessor(**PATCHES),
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return Qwen3VLForConditionalGeneration(config), processor


def _paddleocr_vl():
    tokenizer = _tokenizer("<start>", "<end>", "<video>", image_token="<image>")
    start, end, video, image = tokenizer.convert_tokens_to_ids(
        ["<start>", "<end>", "<video>", "<image>"]
    )
    config = PaddleOCRVLConfig(
        text_config=_text(tokenizer, head_dim=16, **_mrope(2, 3, 3)),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    processor = PaddleOCRVLProcessor(
        PaddleOCRVLImageProcessor(**PATCHES),
        tokenizer,
        chat_template=_template("<start><image><end>"),
    )
    return PaddleOCRVLForConditionalGeneration(config), processor


def _glm_ocr():
    names = ["begin_of_image", "image", "end_of_image", "begin_of_video", "video", "end_of_video"]
    words = [f"<|{name}|>" for name in names]
    tokenizer = _tokenizer(*words)
    ids = tokenizer.convert_tokens_to_ids(words)
    config = GlmOcrConfig(
        text_config=_text(tokenizer, head_dim=16, **_mrope(2, 3, 3)),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "out_hidden_size": 32,
        },
        image_start_token_id=ids[0],
        image_token_id=ids[1],
        image_end_token_id=ids[2],
        video_start_token_id=ids[3],
        video_token_id=ids[4],
        video_end_token_id=ids[5],
    )
    processor = Glm46VProcessor(
        Glm46VImageProcessor(**PATCHES),
        tokenizer,
        Glm46VVideoProcessor(**PATCHES),
        chat_template=_template("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    return GlmOcrForConditionalGeneration(config), processor


def _internvl():
    tokenizer = _tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [64, 64],
            "patch_size": [8, 8],
            "layer_scale_init_value": 1.0,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
    )
    size = {"height": 64, "width": 64}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=_template("<IMG_CONTEXT>"),
    )
    return InternVLForConditionalGeneration(config), processor


def _got_ocr2():
    tokenizer = _tokenizer("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>")
    config = GotOcr2Config(
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        vision_config={
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 256,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 24,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
        image_seq_length=16,
    )
    image_processor = GotOcr2ImageProcessor(size={"height": 256, "width": 256})
    processor = GotOcr2Processor(image_processor, tokenizer)
    processor.num_image_tokens = 16
    if "num_image_tokens" not in vars(GotOcr2Processor):  # below transformers 5.23
        GotOcr2ProcessorKwargs._defaults["images_kwargs"]["num_image_tokens"] = 16
    return GotOcr2ForConditionalGeneration(config), processor


def _sam():
    return {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 256,
        "window_size": 4,
        "global_attn_indexes": [1],
        "output_channels": 8,
        "downsample_channels": [8, 16],
        "mlp_dim": 24,
    }


def _experts(tokenizer):
    return _text(
        tokenizer,
        moe_intermediate_size=8,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_key_value_heads=2,
    )


def _unlimited(tokenizer, **attention):
    config = UnlimitedOcrConfig(
        text_config={**_experts(tokenizer), **attention},
        vision_config={
            "sam_config": _sam(),
            "encoder_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 56,
            },
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return UnlimitedOcrForConditionalGeneration(config)


def _deepseek_ocr():
    tokenizer = _tokenizer("<image>")
    model = _unlimited(tokenizer, layer_types=["full_attention"] * 2)
    return model, DeepseekOcrProcessor(tokenizer, Mode(256, 128))


def _unlimited_ocr():
    tokenizer = _tokenizer("<image>")
    images = UnlimitedOcrImageProcessor(size={"height": 256, "width": 256}, tile_size=128)
    processor = UnlimitedOcrProcessor(images, tokenizer, chat_template=_template("<image>"))
    return _unlimited(tokenizer, sliding_window=8), processor


def _deepseek_ocr2():
    tokenizer = _tokenizer("<image>")
    config = DeepseekOcr2Config(
        text_config={**_experts(tokenizer), "mlp_layer_types": ["dense", "sparse"]},
        vision_config={
            # attention over a whole page of 64 x 64 patches would take most of the tests' time
            "sam_config": {**_sam(), "image_size": 1024, "global_attn_indexes": []},
            "encoder_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = DeepseekOcr2Processor(
        DeepseekOcr2ImageProcessor(), tokenizer, chat_template=_template("<image>")
    )
    return DeepseekOcr2ForConditionalGeneration(config), processor


FAMILIES = {
    "deepseek_ocr": _deepseek_ocr,
    "unlimited_ocr": _unlimited_ocr,
    "deepseek_ocr2": _deepseek_ocr2,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "paddleocr_vl": _paddleocr_vl,
    "glm_ocr": _glm_ocr,
    "got_ocr2": _got_ocr2,
}


def build(family, layers=2):
    """A seeded model of the family and its processor."""
    torch.manual_seed(0)
    with patch.dict(TEXT, num_hidden_layers=layers):
        return FAMILIES[family]()


def page(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


PAGES = [page(300, 200, 0), page(128, 128, 1)]
TEXTS = ["OCR: ", "read all"]
