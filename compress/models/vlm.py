"""Load a vision-language model and its processor: a local folder or a hub id."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoProcessor,
    DeepseekOcr2ForConditionalGeneration,
    DeepseekOcr2ImageProcessor,
    DeepseekOcr2Processor,
    PreTrainedTokenizerFast,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from compress.common.files import read_json
from compress.common.foreign import ForeignFileError, foreign, soon
from compress.models.deepseek_ocr import load_deepseek_ocr
from compress.models.deepseek_ocr_layout import ARCHITECTURE, ARCHITECTURE_2, native_config_2
from compress.models.deepseek_ocr_processor import load_processor
from compress.models.locate import ModelFolder, locate
from compress.models.transformers_folder import read_model
from compress.models.visual import ADAPTERS
from compress.models.weights import check_config, check_inside

# what the first revision of `baidu/Unlimited-OCR` calls itself; transformers knows unlimited_ocr
UNLIMITED_OCR = "unlimited-ocr"
# chat templates take milliseconds
TEMPLATE_SECONDS = 2


def load_vlm(
    model: str | Path | ModelFolder, dtype: torch.dtype = torch.float32, *, adapter: bool = True
) -> tuple[Any, Any]:
    """Load a model and its processor.

    Parameters
    ----------
    model : ``builtin:NAME``, a folder in transformers' layout or in that of
        `deepseek-ai/DeepSeek-OCR`, or a hub id.
    dtype : of the parameters.
    adapter : whether a family without one is refused: its prompts can only be built by its own
        processor. False takes what transformers has as an image-text-to-text model.

    Raises
    ------
    ValueError : for an unknown built-in name, a damaged file (named), a missing tensor (named), an
        unknown architecture (listing the known ones), or an id that the hub does not give.
    FileNotFoundError : when the folder or one of its files is missing.
    """
    folder = locate(model, "reader").folder
    config_file = folder / "config.json"
    config = check_config(config_file)
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if ARCHITECTURE in architectures:
        return load_deepseek_ocr(folder, dtype)
    if ARCHITECTURE_2 in architectures and "language_config" in config:
        processor = load_processor_of(folder)
        with foreign(config_file, "the configuration of a DeepSeek-OCR-2"):
            translated = native_config_2(config)
            translated.image_token_id = processor.image_token_id
            translated.text_config.pad_token_id = processor.tokenizer.pad_token_id
        return read_model(
            DeepseekOcr2ForConditionalGeneration, folder, dtype, translated
        ), processor
    if kind == UNLIMITED_OCR:
        settings = {k: v for k, v in config.items() if k not in ("model_type", "auto_map")}
        with foreign(config_file, "the configuration of an Unlimited-OCR"):
            translated = UnlimitedOcrConfig(**settings)
        network = read_model(UnlimitedOcrForConditionalGeneration, folder, dtype, translated)
        return network, load_processor_of(folder)
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if kind not in names or (adapter and kind not in ADAPTERS):
        raise ForeignFileError(
            f"{config_file} has an unknown architecture (model_type={kind!r}, "
            f"architectures={architectures}); known are {', '.join(ADAPTERS)}, and "
            f"{ARCHITECTURE} and {ARCHITECTURE_2} in their checkpoints' layout; choose a model of "
            "these"
        )
    network = read_model(getattr(transformers, names[kind]), folder, dtype)
    return network, load_processor_of(folder)


def load_processor_of(model: str | Path | ModelFolder) -> Any:
    """The processor of a model; as :func:`load_vlm` gives it, without the weights."""
    folder = locate(model, "reader").folder
    config = check_config(folder / "config.json")
    _check_settings(folder)
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    layers = (config.get("text_config") or {}).get("layer_types") or []
    if ARCHITECTURE in architectures or (
        # DeepSeek-OCR in transformers' layout
        kind == "unlimited_ocr" and layers and all(layer == "full_attention" for layer in layers)
    ):
        return load_processor(folder)
    safe = {"local_files_only": True, "trust_remote_code": False}
    with foreign(folder, f"the tokenizer and the image processor of {kind}"):
        if ARCHITECTURE_2 in architectures and "language_config" in config:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **safe)
            return DeepseekOcr2Processor(DeepseekOcr2ImageProcessor(), tokenizer)
        # by the model's kind, where transformers knows: the automatic class would ask on the
        # terminal whether to run the code of a folder that names none of transformers' classes
        known = "unlimited_ocr" if kind == UNLIMITED_OCR else kind
        processor_class = getattr(
            transformers, PROCESSOR_MAPPING_NAMES.get(known, AutoProcessor.__name__)
        )
        processor = processor_class.from_pretrained(folder, **safe)
        if not hasattr(processor, "image_processor"):
            raise ForeignFileError(f"{folder} has no settings of an image processor; restore them")
        if kind in ADAPTERS:
            _check_template(processor)
        return processor


def _check_settings(folder: Path) -> None:
    """Name the JSON that is damaged, or that names a tokenizer elsewhere."""
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if path.name == "tokenizer_config.json" and isinstance(content, dict):
            for name in content.get("fast_tokenizer_files") or []:
                check_inside(folder, folder / str(name))


def _check_template(processor: Any) -> None:
    """Let jinja read the chat template, if there is one, before there are pages."""
    if getattr(processor, "chat_template", None):
        parts = [{"type": "image"}, {"type": "text", "text": "text"}]
        conversation = [{"role": "user", "content": parts}]
        with soon(TEMPLATE_SECONDS, "the chat template"):
            processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
