"""Patched checkpoints: a transformers folder, and the methods to apply to it, in compress.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError

from compress.applied import Applied
from compress.checkpoint import FACTS, FORMAT, file_hashes, verify
from compress.files import atomic_folder, folder_hash, write_json, write_text
from compress.method import RuntimeMethod
from compress.methods import AnyRuntimeMethod
from compress.models.deepseek_ocr_processor import DeepseekOcrProcessor, save_processor
from compress.models.vlm import load_vlm, model_folder


def save_patched(
    model: Any,
    processor: Any,
    methods: Sequence[RuntimeMethod],
    folder: Path,
    facts: Mapping[str, Any] | None = None,
    reference: str | None = None,
) -> Path:
    """Write a checkpoint of run-time methods; complete or untouched.

    Plain transformers loads the folder as the dense model, unless it is a reference.

    Parameters
    ----------
    model, processor : of :func:`compress.models.vlm.load_vlm`; the methods may be applied or not.
    methods : with their settings.
    folder : where to.
    facts : JSON values: base model, recipe, calibration, metrics.
    reference : name of the base model that is stored in place of a copy of its weights.

    Raises
    ------
    OSError : when the disk is full or the folder cannot be written.
    """
    settings = [json.loads(_ADAPTER.dump_json(method)) for method in methods]
    made = {"format": FORMAT, "kind": "patched", "methods": settings, **(facts or {})}
    with atomic_folder(folder) as temporary:
        if reference is None:
            _save_dense(model, processor, temporary, folder)
        else:
            made["weights"] = {"model": reference, "hash": folder_hash(model_folder(reference))}
        write_text(temporary / "README.md", _model_card(made, reference))
        write_json(temporary / FACTS, {**made, "files": file_hashes(temporary)})
    return folder


def _save_dense(model: Any, processor: Any, temporary: Path, folder: Path) -> None:
    try:
        model.save_pretrained(temporary)
    except SafetensorError as error:  # how safetensors says that a disk is full
        raise OSError(f"the checkpoint cannot be written to {folder}: {error}") from error
    if isinstance(processor, DeepseekOcrProcessor):
        save_processor(processor, temporary)
    else:
        processor.save_pretrained(temporary)


def load_patched(folder: Path, dtype: Any = None) -> tuple[Any, Any, Applied]:
    """The model of a checkpoint with its methods applied, its processor, and what applies them.

    Raises
    ------
    ValueError, FileNotFoundError : naming the file that is damaged or missing, or a base model that
        is not the one that the checkpoint refers to.
    """
    import torch

    facts = verify(folder)
    base: str | Path = folder
    if "weights" in facts:
        base = facts["weights"]["model"]
        if (found := folder_hash(model_folder(base))) != facts["weights"]["hash"]:
            raise ValueError(
                f"{folder} refers to {base} with hash {facts['weights']['hash'][:12]}; what is "
                f"there now has {found[:12]}; restore that version, or save a copy of the weights"
            )
    model, processor = load_vlm(base, dtype or torch.float32)
    methods = [_ADAPTER.validate_json(json.dumps(method)) for method in facts["methods"]]
    return model, processor, Applied(model, methods)


_ADAPTER: TypeAdapter[Any] = TypeAdapter(AnyRuntimeMethod)


def _model_card(facts: Mapping[str, Any], reference: str | None) -> str:
    base = facts.get("base_model", reference or "unknown")
    names = ", ".join(method["name"] for method in facts["methods"])
    plain = (
        "Plain transformers loads this folder as the dense model; `compress.load` applies the "
        "methods."
        if reference is None
        else f"This folder has no weights: it refers to `{reference}`, and plain transformers "
        "cannot load it."
    )
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [compress, ocr]",
            "---",
            f"# {base} with {names}",
            "",
            f"Base model: `{base}` (SHA-256 `{facts.get('base_hash', 'unknown')}`).",
            f"Licence of the base model: {facts.get('base_licence', 'see the base model')}",
            "",
            plain,
            "",
            "```python",
            "import compress",
            "",
            'model = compress.load("path/to/this/folder")',
            "```",
            "",
            "Settings, recipe and provenance: `compress.json`.",
            "",
        ]
    )
