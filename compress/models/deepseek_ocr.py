"""Read and write folders in the layout of `deepseek-ai/DeepSeek-OCR`."""

from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import UnlimitedOcrForConditionalGeneration

from compress.common.files import write_json
from compress.common.foreign import foreign
from compress.common.output_folder import new_folder
from compress.models.deepseek_ocr_layout import (
    native_config,
    original_config,
    original_weights,
    unused_weights,
    weight_shapes,
)
from compress.models.deepseek_ocr_processor import (
    DeepseekOcrProcessor,
    load_processor,
    save_processor,
)
from compress.models.transformers_folder import read_model
from compress.models.weights import check_config, compare, few_parameters, stored_tensors


def save_deepseek_ocr(
    model: UnlimitedOcrForConditionalGeneration,
    processor: DeepseekOcrProcessor,
    folder: Path,
    largest_shard: int = 5_000_000_000,
) -> Path:
    """Write a folder in the layout of `deepseek-ai/DeepSeek-OCR`.

    Parameters
    ----------
    model : with full attention in every layer.
    processor : its mode is stored unless it is gundam.
    folder : where to; complete or untouched.
    largest_shard : bytes of a weights file; one tensor may exceed it.

    Raises
    ------
    ValueError : when the model slides a window.
    OSError : when the disk is full or the folder cannot be written.
    """
    config = original_config(model.config, model.dtype)
    weights = original_weights(model) | unused_weights(model.config)
    shards = split_torch_state_dict_into_shards(weights, max_shard_size=largest_shard)
    with new_folder(folder, "model") as temporary:
        where = {}
        for number, names in enumerate(shards.filename_to_tensors.values(), 1):
            file = f"model-{number:05d}-of-{len(shards.filename_to_tensors):06d}.safetensors"
            shard = {name: weights[name] for name in names}
            save_file(shard, temporary / file, metadata={"format": "pt"})
            where.update(dict.fromkeys(names, file))
        write_json(
            temporary / "model.safetensors.index.json",
            {"metadata": shards.metadata, "weight_map": dict(sorted(where.items()))},
        )
        write_json(temporary / "config.json", config)
        model.generation_config.save_pretrained(temporary)
        save_processor(processor, temporary)
    return folder


def load_deepseek_ocr(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[UnlimitedOcrForConditionalGeneration, DeepseekOcrProcessor]:
    """Load a folder in the layout of `deepseek-ai/DeepSeek-OCR`; none of its code is run."""
    config_file = folder / "config.json"
    stored = stored_tensors(folder)
    with (
        foreign(config_file, "the configuration of a DeepSeek-OCR"),
        few_parameters(config_file, len(stored)),
    ):
        config = native_config(check_config(config_file))
        with torch.device("meta"):
            unused = unused_weights(config)
        expected = weight_shapes(config)
    compare(folder, {name: t for name, t in stored.items() if name not in unused}, expected)
    processor = load_processor(folder)
    config.image_token_id = processor.image_token_id
    config.text_config.pad_token_id = processor.tokenizer.pad_token_id
    return read_model(UnlimitedOcrForConditionalGeneration, folder, dtype, config), processor
