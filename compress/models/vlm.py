"""Load a vision-language model and its processor: a local folder or a hub id."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    DeepseekOcr2ForConditionalGeneration,
    DeepseekOcr2ImageProcessor,
    DeepseekOcr2Processor,
    PreTrainedTokenizerFast,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
    UnlimitedOcrProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from compress.common.files import read_json
from compress.models.deepseek_ocr import load_deepseek_ocr
from compress.models.deepseek_ocr_layout import ARCHITECTURE, ARCHITECTURE_2, native_config_2
from compress.models.deepseek_ocr_processor import load_processor
from compress.models.locate import ModelFolder, locate
from compress.models.transformers_folder import read_model, stored_shapes
from compress.models.visual import ADAPTERS

# what the first revision of `baidu/Unlimited-OCR` calls itself; transformers knows unlimited_ocr
UNLIMITED_OCR = "unlimited-ocr"


def load_vlm(
    model: str | Path | ModelFolder, dtype: torch.dtype = torch.float32, *, adapter: bool = True
) -> tuple[Any, Any]:
    """Load a model and its processor.

    Parameters
    ----------
    model : ``builtin:NAME``, a folder in transformers' layout or in that of
        `deepseek-ai/DeepSeek-OCR`, or a hub id.
    dtype : of the parameters.
    adapter : whether a family without one is refused: nobody can build its prompts but its own
        processor. False takes what transformers has as an image-text-to-text model.

    Raises
    ------
    ValueError : for an unknown built-in name, a damaged file (named), a missing tensor (named), an
        unknown architecture (listing the known ones), or an id that the hub does not give.
    FileNotFoundError : when the folder or one of its files is missing.
    """
    folder = locate(model, "reader").folder
    stored_shapes(folder)
    config = read_json(folder / "config.json")
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if ARCHITECTURE in architectures:
        return load_deepseek_ocr(folder, dtype)
    if ARCHITECTURE_2 in architectures and "language_config" in config:
        processor = load_processor_of(folder)
        translated = native_config_2(config)
        translated.image_token_id = processor.image_token_id
        translated.text_config.pad_token_id = processor.tokenizer.pad_token_id
        return read_model(
            DeepseekOcr2ForConditionalGeneration, folder, dtype, translated
        ), processor
    if kind == UNLIMITED_OCR:
        settings = {k: v for k, v in config.items() if k not in ("model_type", "auto_map")}
        network = read_model(
            UnlimitedOcrForConditionalGeneration, folder, dtype, UnlimitedOcrConfig(**settings)
        )
        return network, load_processor_of(folder)
    if kind not in ADAPTERS and (adapter or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        raise ValueError(
            f"{folder / 'config.json'} has an unknown architecture (model_type={kind!r}, "
            f"architectures={architectures}); known are {', '.join(ADAPTERS)}, and "
            f"{ARCHITECTURE} and {ARCHITECTURE_2} in their checkpoints' layout; choose a model of "
            "these"
        )
    return read_model(AutoModelForImageTextToText, folder, dtype), load_processor_of(folder)


def load_processor_of(model: str | Path | ModelFolder) -> Any:
    """The processor of a model; as :func:`load_vlm` gives it, without the weights.

    Raises
    ------
    ValueError, FileNotFoundError : naming what is damaged or missing.
    """
    folder = locate(model, "reader").folder
    config = read_json(folder / "config.json")
    full_attention = set(config.get("text_config", {}).get("layer_types", [])) == {"full_attention"}
    if ARCHITECTURE in (config.get("architectures") or []) or (
        # DeepSeek-OCR in transformers' layout
        config.get("model_type") == "unlimited_ocr" and full_attention
    ):
        return load_processor(folder)
    found = UnlimitedOcrProcessor if config.get("model_type") == UNLIMITED_OCR else AutoProcessor
    try:
        if ARCHITECTURE_2 in (config.get("architectures") or []) and "language_config" in config:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            return DeepseekOcr2Processor(DeepseekOcr2ImageProcessor(), tokenizer)
        return found.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} should have the tokenizer and the image processor of "
            f"{config.get('model_type')}, which do not load: {error}; restore their files"
        ) from error
