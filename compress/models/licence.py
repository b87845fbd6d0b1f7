"""What a model's folder says about its licence, for the cards of checkpoints made from it."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from compress.common.files import expand
from compress.models.locate import BUILTIN

OURS = "Apache-2.0, that of compress, whose scripts trained it"
KEYS = ("license", "license_name", "license_link")  # of a model card's metadata
FILES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")


def licence_of(folder: Path, model: str) -> str:
    """The licence of a model in words, or where to look for it.

    Parameters
    ----------
    folder : of the model.
    model : how it was named: ``builtin:NAME``, a folder or a hub id.
    """
    builtin = folder.resolve().parent == BUILTIN.resolve()
    card = _metadata(folder / "README.md")
    named = [OURS] if builtin else [str(card[key]) for key in KEYS if key in card]
    statements = [*named, *(f"see {path.name}" for path in licence_files(folder))]
    where = f"where {model} came from"
    if not expand(model).is_dir():
        where = f"at https://huggingface.co/{model}"
    unknown = f"stated neither in its README.md nor in a LICENSE; look {where}"
    return "; ".join(statements) or unknown


def licence_id(folder: Path) -> str | None:
    """The licence's identifier as the hub knows it, where the model's card has one."""
    if folder.resolve().parent == BUILTIN.resolve():
        return "apache-2.0"
    named = _metadata(folder / "README.md").get("license")
    return named if isinstance(named, str) else None


def licence_files(folder: Path) -> list[Path]:
    """The files of a model's folder that hold its licence."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name.upper().startswith(FILES))


def _metadata(card: Path) -> dict[str, Any]:
    """What a model card has between its first two lines of dashes; nothing for none."""
    try:
        return metadata_load(card) or {}
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        return {}
