"""Patched checkpoints: a transformers folder, and the methods to apply to it, in compress.json."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from compress.checkpoints.applied import Applied
from compress.checkpoints.slim import FACTS, FORMAT, file_hashes, metrics_table, verify
from compress.common.files import atomic_folder, folder_hash, read_json, write_json, write_text
from compress.methods.base import RuntimeMethod
from compress.methods.registry import runtime_method
from compress.models.deepseek_ocr_processor import DeepseekOcrProcessor, save_processor
from compress.models.licence import licence_files, licence_of
from compress.models.loading import BUILTIN
from compress.models.vlm import load_vlm, model_folder

UNKNOWN = "unknown; look where you got the base model from"


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
    settings = [method.model_dump(mode="json") for method in methods]
    made = {"format": FORMAT, "kind": "patched", "methods": settings, **(facts or {})}
    base = reference or made.get("base_model")
    source = model_folder(base) if base else _origin(model)
    if source is not None:
        made |= {"base_model": base or base_model(source), "base_licence": _licence(source, base)}
    with atomic_folder(folder) as temporary:
        if reference is None:
            _save_dense(model, processor, temporary, folder)
            for path in licence_files(source) if source else ():
                shutil.copy(path, temporary)
        else:
            made["weights"] = {"model": reference, "hash": folder_hash(model_folder(reference))}
        write_text(temporary / "README.md", _model_card(made, reference))
        write_json(temporary / FACTS, {**made, "files": file_hashes(temporary)})
    return folder


def _origin(model: Any) -> Path | None:
    """The folder that a model was loaded from, if it is still there."""
    folder = Path(model.name_or_path)
    return folder if model.name_or_path and folder.is_dir() else None


def _licence(source: Path, name: str | None) -> str:
    """Of the base model in a folder; where that is a patched checkpoint, of what it was made of."""
    facts = _patched_facts(source)
    if facts is None:
        return licence_of(source, name or str(source))
    return str(facts.get("base_licence", UNKNOWN))


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

    Of any family: where it has no adapter the methods try the model on its first prompt, or refuse.

    Raises
    ------
    ValueError, FileNotFoundError : naming the file that is damaged or missing, or a base model that
        is not the one that the checkpoint refers to.
    """
    model, processor, methods = _read(folder, dtype, adapter=False)
    return model, processor, Applied(model, methods)


def load_reader(model: str | Path, dtype: Any = None) -> tuple[Any, Any, tuple[RuntimeMethod, ...]]:
    """Any reader, and the methods that belong to it, which are not applied yet.

    Parameters
    ----------
    model : as in :func:`compress.models.vlm.load_vlm`, or a patched checkpoint of ours, which alone
        has methods.
    dtype : of the parameters; float32 when None.

    Raises
    ------
    ValueError, FileNotFoundError : as :func:`load_patched`.
    """
    import torch

    folder = model_folder(model)
    if _patched_facts(folder) is not None:
        return _read(folder, dtype, adapter=True)
    return *load_vlm(folder, dtype or torch.float32), ()


def base_model(model: str | Path) -> str:
    """The model that a patched checkpoint was made of; any other model is its own."""
    folder = Path(model).expanduser()
    if folder.resolve().parent == BUILTIN.resolve():
        return f"builtin:{folder.name}"
    facts = _patched_facts(folder)
    if facts is None:
        return str(model)
    return str(facts.get("base_model") or facts.get("weights", {}).get("model", model))


def check_dense(model: str, folder: Path) -> None:
    """Refuse a patched checkpoint where a model is wanted to put methods on.

    Raises
    ------
    ValueError : naming its base model and its methods.
    """
    facts = _patched_facts(folder)
    if facts is not None:
        settings = ", ".join(json.dumps(method) for method in facts["methods"])
        raise ValueError(
            f"methods are put on a dense model; {model} is a patched checkpoint with methods of "
            f"its own; name its base model, {base_model(folder)}, and under method what it has: "
            f"{settings}"
        )


def _patched_facts(folder: Path) -> dict[str, Any] | None:
    """What ``compress.json`` says, unverified; None for what is no patched checkpoint."""
    if not (folder / FACTS).is_file():
        return None
    facts = read_json(folder / FACTS)
    return facts if isinstance(facts, dict) and facts.get("kind") == "patched" else None


def _read(folder: Path, dtype: Any, *, adapter: bool) -> tuple[Any, Any, tuple[RuntimeMethod, ...]]:
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
    model, processor = load_vlm(base, dtype or torch.float32, adapter=adapter)
    return model, processor, tuple(map(runtime_method, facts["methods"]))


def _model_card(facts: Mapping[str, Any], reference: str | None) -> str:
    base = facts.get("base_model") or reference or "unknown"
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
            f"Licence of the base model: {facts.get('base_licence', UNKNOWN)}",
            "",
            plain,
            "",
            "```python",
            "import compress",
            "",
            'model = compress.load("path/to/this/folder")',
            "```",
            *metrics_table(facts.get("metrics", {})),
            "",
            "Settings, recipe and provenance: `compress.json`.",
            "",
        ]
    )
