"""What every checkpoint has: ``compress.json`` with facts and hashes, and a model card."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError

from compress.common.files import atomic_folder, read_json, sha256, write_json, write_text
from compress.models.locate import CHECKPOINT_FACTS as FACTS

FORMAT = 1
INSTALL = "pip install compress-models"


@contextlib.contextmanager
def checkpoint_folder(
    folder: Path,
    kind: str,
    facts: Mapping[str, Any],
    card: Callable[[Mapping[str, Any]], str],
    *,
    overwrite: bool,
) -> Iterator[Path]:
    """Write a checkpoint: ``folder`` is complete or untouched.

    Parameters
    ----------
    folder : where to.
    kind : "slim" or "runtime".
    facts : JSON values.
    card : facts to the content of README.md.
    overwrite : replace a checkpoint of ours that is there.

    Yields
    ------
    A temporary folder to fill.

    Raises
    ------
    FileExistsError : when the folder holds something that is not to be replaced.
    OSError : when the disk is full or the folder cannot be written.
    """
    check_replaceable(folder, overwrite=overwrite)
    with atomic_folder(folder) as temporary:
        try:
            yield temporary
        except SafetensorError as error:  # how safetensors says that a disk is full
            raise OSError(f"the checkpoint cannot be written to {folder}: {error}") from error
        content = {"format": FORMAT, "kind": kind, **facts}
        write_text(temporary / "README.md", card(content))
        write_json(temporary / FACTS, content | {"files": file_hashes(temporary)})


def check_replaceable(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that a checkpoint must not take the place of.

    Raises
    ------
    FileExistsError : for a file, a folder that holds something else than a checkpoint of ours, or
        one of ours without ``overwrite``.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or read_facts(folder) is None:
        raise FileExistsError(
            f"a new or empty folder is expected for the checkpoint; {folder} holds something that "
            "is no checkpoint of compress; choose another folder"
        )
    if not overwrite:
        raise FileExistsError(
            f"{folder} holds a checkpoint of compress already; choose another folder, or replace "
            "it with overwrite=True"
        )


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, by its path there."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What ``compress.json`` holds, unverified; None for what is no checkpoint of ours."""
    if not (folder / FACTS).is_file():
        return None
    facts = read_json(folder / FACTS)
    return facts if isinstance(facts, dict) and "format" in facts else None


def verify(folder: Path) -> dict[str, Any]:
    """Check a checkpoint's files against their hashes and return its facts.

    Raises
    ------
    ValueError : naming the file whose content is not what was saved.
    FileNotFoundError : naming what is missing.
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


def model_card(
    facts: Mapping[str, Any], *, title: str, library: str, task: str, tags: list[str], usage: str
) -> str:
    """The content of a checkpoint's README.md, with the metadata that the hub reads.

    Parameters
    ----------
    facts : of the checkpoint: ``base_model``, ``base_hash``, ``base_licence``, ``recipe``,
        ``metrics`` are used where they are.
    title : what the model is.
    library, task, tags : the hub's ``library_name``, ``pipeline_tag`` and ``tags``.
    usage : Markdown that says how the folder is loaded.
    """
    base = str(facts.get("base_model", "unknown"))
    data = str(facts.get("recipe", {}).get("data", ""))
    metadata = ModelCardData(
        license=facts.get("base_licence_id"),
        base_model=base if base.count("/") == 1 and not base.startswith((".", "/", "~")) else None,
        library_name=library,
        pipeline_tag=task,
        tags=["compress", *tags],
        datasets=[data.removeprefix("hub:")] if data.startswith("hub:") else None,
    )
    body = [
        f"# {title}",
        "",
        f"Base model: `{base}` (SHA-256 `{facts.get('base_hash', 'unknown')}`).",
        f"Licence of the base model: {facts.get('base_licence', 'unknown: see the base model')}",
        "",
        usage,
        "",
        *_metrics_table(facts.get("metrics", {})),
        f"Method, recipe and provenance: `{FACTS}`. Made with `{INSTALL}`.",
        "",
    ]
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(body)))


def _metrics_table(metrics: Mapping[str, Any]) -> list[str]:
    """What a run measured of both models; none for no metrics."""
    if not metrics:
        return []
    return [
        "| metric | dense | compressed | n |",
        "|---|---|---|---|",
        *(
            f"| {name} | {_value(entry['dense'])} | {_value(entry['compressed'])} "
            f"| {entry['compressed'].get('n', '')} |"
            for name, entry in metrics.items()
        ),
        "",
        "Brackets are 95% confidence intervals; n is what a value was measured on.",
        "",
    ]


def _value(side: Mapping[str, Any]) -> str:
    interval = side.get("ci95")
    inside = f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
    return f"{side['value']:.5g}{inside}"
