"""Runtime checkpoints: a transformers folder, and the methods to apply to it, in compress.json."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.checkpoints.facts import (
    FACTS,
    checkpoint_folder,
    code,
    model_card,
    read_facts,
    verify,
    warn_unverified,
)
from compress.common.foreign import ForeignFileError, foreign
from compress.methods.base import RuntimeMethod
from compress.methods.registry import runtime_method
from compress.models.deepseek_ocr_processor import DeepseekOcrProcessor, save_processor
from compress.models.licence import licence_files, licence_id, licence_of
from compress.models.locate import BUILTIN, ModelFolder, locate
from compress.models.vlm import load_vlm

KIND = "runtime"
UNKNOWN = "unknown; look where you got the base model from"


def save_runtime(
    model: Any,
    processor: Any,
    methods: Sequence[RuntimeMethod],
    folder: Path,
    facts: Mapping[str, Any] | None = None,
    *,
    base: ModelFolder | None = None,
    reference: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint of run-time methods; complete or untouched.

    Plain transformers loads the folder as the dense model, unless it is a reference.

    Parameters
    ----------
    model, processor : of :func:`compress.models.vlm.load_vlm`; the methods may be applied or not.
    methods : with their settings.
    folder : where to.
    facts : JSON values: recipe, calibration, metrics.
    base : where the model was loaded from; found by the model's own record when None.
    reference : store the name of ``base`` in place of a copy of its weights.
    overwrite : replace a checkpoint that is there.
    """
    content: dict[str, Any] = {
        "methods": [method.model_dump(mode="json") for method in methods],
        **(facts or {}),
    }
    base = base or _origin(model)
    if base is not None:
        content |= {"base_model": base_model(base), "base_hash": base.hash, **_licence(base)}
        if reference:
            content["weights"] = {"model": base.name, "hash": base.hash}
    with checkpoint_folder(folder, KIND, content, _card, overwrite=overwrite) as temporary:
        if not reference:
            model.save_pretrained(temporary)
            if isinstance(processor, DeepseekOcrProcessor):
                save_processor(processor, temporary)
            else:
                processor.save_pretrained(temporary)
            for path in licence_files(base.folder) if base else ():
                shutil.copy(path, temporary)
    return folder


def _origin(model: Any) -> ModelFolder | None:
    """Where a model was loaded from, if that is still there."""
    folder = Path(model.name_or_path)
    if not (model.name_or_path and folder.is_dir()):
        return None
    return ModelFolder(str(folder), folder, "reader")


def _licence(base: ModelFolder) -> dict[str, Any]:
    """Of a base model; where that is a runtime checkpoint, of what it was made of."""
    facts = runtime_facts(base.folder)
    if facts is not None:
        kept = {key: facts.get(key) for key in ("base_licence", "base_licence_id")}
        return kept | {"base_licence": kept["base_licence"] or UNKNOWN}
    return {
        "base_licence": licence_of(base.folder, base.name),
        "base_licence_id": licence_id(base.folder),
    }


def load_runtime(
    at: ModelFolder, dtype: Any = None, *, adapter: bool = True
) -> tuple[Any, Any, tuple[RuntimeMethod, ...]]:
    """Any reader, and the methods that belong to it, which are not applied yet.

    Parameters
    ----------
    at : a reader, or a runtime checkpoint of ours, which alone has methods.
    dtype : of the parameters; float32 when None.
    adapter : whether a dense family without an adapter is refused; see ``load_vlm``.

    Raises
    ------
    ValueError, FileNotFoundError : naming the file that is damaged or missing, or that lacks
        settings, or a base model that is not the one that the checkpoint refers to.
    """
    import torch

    dtype = dtype or torch.float32
    facts = verify(at.folder)
    if facts is None or facts["kind"] != KIND:
        model, processor = load_vlm(at, dtype, adapter=adapter)
        warn_unverified(at)
        return model, processor, ()
    with foreign(at.folder / FACTS, "methods of compress"):
        methods = tuple(map(runtime_method, facts["methods"]))
    for method, settings in zip(methods, facts["methods"], strict=True):
        if missing := type(method).model_fields.keys() - settings.keys():
            raise ForeignFileError(
                f"{at.folder / FACTS} should hold all settings of {method.name}, since defaults "
                f"change; it lacks {', '.join(sorted(missing))}; make the checkpoint again"
            )
    if "weights" in facts:
        base = locate(facts["weights"]["model"], "reader")
        if base.hash != facts["weights"]["hash"]:
            raise ValueError(
                f"{at.folder} refers to {base.name} with hash {facts['weights']['hash'][:12]}; "
                f"what is there now has {base.hash[:12]}; restore that version, or save a copy of "
                "the weights"
            )
        at = base
    return *load_vlm(at, dtype, adapter=adapter), methods


def base_model(at: ModelFolder) -> str:
    """The model that a runtime checkpoint was made of; any other model is its own."""
    if at.folder.resolve().parent == BUILTIN.resolve():
        return f"builtin:{at.folder.name}"
    facts = runtime_facts(at.folder)
    if facts is None:
        return at.name
    return str(facts.get("base_model") or facts.get("weights", {}).get("model", at.name))


def check_dense(at: ModelFolder) -> None:
    """Refuse a runtime checkpoint where a model is expected to put methods on."""
    facts = runtime_facts(at.folder)
    if facts is not None:
        settings = ", ".join(json.dumps(method) for method in facts["methods"])
        raise ValueError(
            f"methods are put on a dense model; {at.name} is a runtime checkpoint with methods of "
            f"its own; name its base model, {base_model(at)}, and under method what it has: "
            f"{settings}"
        )


def runtime_facts(folder: Path) -> dict[str, Any] | None:
    """What ``compress.json`` says, unverified; None for what is no runtime checkpoint."""
    facts = read_facts(folder)
    return facts if facts is not None and facts.get("kind") == KIND else None


def _card(facts: Mapping[str, Any]) -> str:
    base = facts.get("base_model", "a vision-language model")
    names = " and ".join(method["name"] for method in facts["methods"])
    plain = (
        f"This folder has no weights: it refers to {code(facts['weights']['model'])}, and plain "
        "transformers cannot load it."
        if "weights" in facts
        else "Plain transformers loads this folder as the dense model; `compress.load` applies the "
        f"methods that `{FACTS}` lists."
    )
    lines = [
        plain,
        "",
        "```python",
        "import compress",
        "",
        'reader = compress.load("path/to/this/folder")  # .model, .processor, .applied',
        "```",
    ]
    return model_card(
        facts,
        title=f"{base} with {names}",
        library="transformers",
        task="image-text-to-text",
        tags=["ocr"],
        usage="\n".join(lines),
    )
