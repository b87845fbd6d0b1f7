"""Slim checkpoints: a diffusers pipeline folder plus ``compress.json``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from compress.checkpoints.exporting import export, export_code
from compress.common.files import atomic_folder, read_json, sha256, write_json, write_text
from compress.models.free_width import FreeWidthUNet2DModel
from compress.models.loading import check_folder, load_pipeline

FORMAT = 1
FACTS = "compress.json"
PLAIN_INTRODUCTION = "A plain diffusers pipeline with smaller widths; it needs no extra package:"
FREE_WIDTHS_INTRODUCTION = f"""\
A diffusers pipeline whose inner widths differ from layer to layer, which no class of diffusers has.
The class comes with the folder, in `unet/{FreeWidthUNet2DModel.__module__}.py`, and needs diffusers
alone; `trust_remote_code=True` lets diffusers run that file. (`compress.load` runs no code of a
folder: it has the class.)"""


def save_slim(
    pipeline: DiffusionPipeline, folder: Path, facts: dict[str, Any], *, source: Path | None = None
) -> Path:
    """Write a pipeline folder that plain diffusers loads, with the facts of its making.

    A UNet with free inner widths has a class of ours, which is written beside its weights:
    diffusers loads it with ``trust_remote_code=True``.

    Written to a temporary sibling and renamed: ``folder`` is complete or absent.

    Parameters
    ----------
    pipeline : with the slim UNet.
    folder : where to.
    facts : JSON values: base model and its hash, recipe, widths, metrics.
    source : the folder that all parts but the UNet were read from; they are then copied byte by
        byte, and otherwise written as diffusers and transformers write them.

    Raises
    ------
    OSError : when the disk is full or the folder cannot be written.
    """
    free = isinstance(getattr(pipeline, "unet", None), FreeWidthUNet2DModel)
    with atomic_folder(folder) as temporary:
        try:
            if source is None:
                pipeline.save_pretrained(temporary, safe_serialization=True)
                if free:
                    export_code(pipeline.unet, temporary / "unet")
            else:
                export(pipeline, source, temporary)
        except SafetensorError as error:  # how safetensors says that a disk is full
            raise OSError(f"the checkpoint cannot be written to {folder}: {error}") from error
        card = _model_card(facts, kind=type(pipeline).__name__, free_widths=free)
        write_text(temporary / "README.md", card)
        made = {"format": FORMAT, "kind": "slim", **facts, "files": file_hashes(temporary)}
        write_json(temporary / FACTS, made)
    return folder


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, by its path there."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def load(folder: str | Path) -> Any:
    """Load a checkpoint of ours, or any model that we know.

    Returns
    -------
    A diffusers pipeline; of a patched checkpoint the transformers model with its methods applied
    (its processor: :func:`load_processor`).

    Raises
    ------
    ValueError : naming the file whose content is not what was saved.
    FileNotFoundError : naming what is missing.
    """
    path = Path(folder)
    if (path / FACTS).is_file():
        facts = verify(path)
        if facts.get("kind") == "patched":
            from compress.checkpoints.runtime import load_patched

            return load_patched(path)[0]
        check_folder(path)
    return load_pipeline(str(folder))


def load_processor(folder: str | Path) -> Any:
    """The processor of a patched checkpoint, or of a reader's folder.

    Raises
    ------
    ValueError, FileNotFoundError : naming what is damaged or missing.
    """
    from compress.models.vlm import load_processor_of

    path = Path(folder)
    facts = verify(path) if (path / FACTS).is_file() else {}
    return load_processor_of(facts.get("weights", {}).get("model", folder))


def verify(folder: Path) -> dict[str, Any]:
    """Check a checkpoint's files against their hashes and return its facts.

    Raises
    ------
    ValueError, FileNotFoundError : as :func:`load`.
    """
    facts = read_json(folder / FACTS)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(
            f"{folder / FACTS} should have format {FORMAT}; got "
            f"{facts.get('format') if isinstance(facts, dict) else type(facts).__name__}; this "
            "version of compress cannot read it"
        )
    if not isinstance(facts.get("files"), dict):
        raise ValueError(
            f"{folder / FACTS} should list the checkpoint's files and their hashes; it does not; "
            "restore the file"
        )
    for name, expected in facts["files"].items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is part of the checkpoint but missing; restore it")
        if sha256(path) != expected:
            raise ValueError(
                f"{path} is not what was saved (its SHA-256 differs from {FACTS}); restore the file"
            )
    return facts


def _model_card(facts: dict[str, Any], *, kind: str, free_widths: bool) -> str:
    base = facts.get("base_model", "unknown")
    licence = facts.get("base_licence", "unknown: see the base model")
    trust = ", trust_remote_code=True" if free_widths else ""
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [compress, pruned]",
        "---",
        f"# {base}, pruned",
        "",
        f"Base model: `{base}` (SHA-256 `{facts.get('base_hash', 'unknown')}`).",
        f"Licence of the base model: {licence}",
        "",
        FREE_WIDTHS_INTRODUCTION if free_widths else PLAIN_INTRODUCTION,
        "",
        "```python",
        f"from diffusers import {kind}",
        "",
        f'pipeline = {kind}.from_pretrained("path/to/this/folder"{trust})',
        "```",
        "",
    ]
    widths = facts.get("widths", [])
    lines += [f"- {w['level']}: {w['dense']} -> {w['compressed']}" for w in widths]
    lines += metrics_table(facts.get("metrics", {}))
    return "\n".join([*lines, "", "Method, recipe and provenance: `compress.json`.", ""])


def metrics_table(metrics: Mapping[str, Any]) -> list[str]:
    """Lines of a model card: what a run measured of both models; none for no metrics."""
    if not metrics:
        return []
    return [
        "",
        "| metric | dense | compressed |",
        "|---|---|---|",
        *(
            f"| {name} | {entry['dense']['value']:.5g} | {entry['compressed']['value']:.5g} |"
            for name, entry in metrics.items()
        ),
    ]
