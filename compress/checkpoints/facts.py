"""What every checkpoint has: ``compress.json`` with facts and hashes, and a model card."""

import contextlib
import hashlib
import html
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData
from pydantic import BaseModel, ConfigDict

from compress.common.files import atomic_folder, expand, read_json, sha256, write_json, write_text
from compress.common.foreign import ForeignFileError, foreign
from compress.common.output_folder import CHECKPOINT, check_replaceable
from compress.common.output_folder import CHECKPOINT_FACTS as FACTS
from compress.eval.tables import markdown
from compress.models.locate import ModelFolder
from compress.models.weights import check_inside

FORMAT = 2
# what loading reads, or what plain diffusers may run
READ = {".json", ".safetensors", ".jinja", ".txt", ".model", ".py"}
INSTALL = "pip install compress-models"

logger = logging.getLogger("compress")


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
    check_replaceable(folder, CHECKPOINT, overwrite=overwrite)
    with atomic_folder(folder) as temporary:
        yield temporary
        content = {"format": FORMAT, "kind": kind, **facts}
        write_text(temporary / "README.md", card(content))
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        hashes = {path.relative_to(temporary).as_posix(): sha256(path) for path in files}
        content |= {"files": hashes}
        write_json(temporary / FACTS, content | {"hash": _own_hash(content)})


class _Reference(BaseModel):
    """Weights that lie elsewhere."""

    model: str
    hash: str


class _Facts(BaseModel):
    """What is read of ``compress.json``; it may hold more."""

    model_config = ConfigDict(strict=True)

    kind: Literal["slim", "runtime"]
    files: dict[str, str]
    hash: str
    base_model: str | None = None
    methods: list[dict[str, Any]] = []
    weights: _Reference | None = None


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What ``compress.json`` holds, unverified; None for what is no checkpoint of ours.

    Raises
    ------
    ValueError : naming the file, which is there and holds something else.
    """
    path = folder / FACTS
    if not path.is_file():
        return None
    facts = read_json(path)
    version = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
    if version != FORMAT:
        raise ForeignFileError(
            f"{path} should have format {FORMAT}; got {version!r:.60}; this version of compress "
            "cannot read it: make the checkpoint again"
        )
    with foreign(path, "the facts of a checkpoint"):
        _Facts.model_validate(facts)
    return dict(facts)


def warn_unverified(at: ModelFolder) -> None:
    """Say that nothing vouches for a folder that is no checkpoint of ours.

    Nothing is said of models that ship with compress, and of those of the hub, which names files
    by their hash.
    """
    if expand(at.name) == at.folder:
        logger.warning(
            "warning: %s is not a checkpoint of compress, as it has no file %s: whether its files "
            "are what was saved is not verified",
            *(at.folder, FACTS),
        )


def verify(folder: Path) -> dict[str, Any] | None:
    """Check a checkpoint's files against their hashes.

    Returns
    -------
    Its facts; None for what is no checkpoint of ours.

    Raises
    ------
    ValueError : naming the file whose content is not what was saved, or that was added.
    FileNotFoundError : naming what is missing.
    """
    facts = read_facts(folder)
    if facts is None:
        return None
    if facts["hash"] != _own_hash(facts):
        raise ForeignFileError(
            f"{folder / FACTS} is not what was saved (its SHA-256 differs from the one it holds); "
            "restore the file"
        )
    for name, expected in facts["files"].items():
        path = folder / name
        check_inside(folder, path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is part of the checkpoint but missing; restore it")
        if sha256(path) != expected:
            raise ForeignFileError(
                f"{path} is not what was saved (its SHA-256 differs from {FACTS}); restore the file"
            )
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        linked = path.is_symlink() and path.is_dir()
        if (linked or path.suffix in READ) and name not in {*facts["files"], FACTS}:
            raise ForeignFileError(
                f"{path} was added to the checkpoint, and might be loaded in place of what was "
                "saved; remove it"
            )
    return facts


def _own_hash(facts: Mapping[str, Any]) -> str:
    """SHA-256 over all facts but this one."""
    content = {name: value for name, value in facts.items() if name != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
        f"# {plain(title)}",
        "",
        f"Base model: {code(base)} (SHA-256 {code(facts.get('base_hash', 'unknown'))}).",
        "Licence of the base model: "
        + plain(facts.get("base_licence", "unknown: see the base model")),
        "",
        usage,
        "",
        *_metrics_table(facts.get("metrics", {})),
        f"Method, recipe and provenance: `{FACTS}`. Made with `{INSTALL}`.",
        "",
    ]
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(body)))


def plain(text: object) -> str:
    r"""Text from outside as one line of Markdown, in which nothing of it is markup.

    >>> plain("a_b\n# <script>")
    'a\\_b # &lt;script&gt;'
    """
    line = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", line)


def code(text: object) -> str:
    r"""Text from outside as a code span, which ends where the text does.

    >>> code("a` <b>\n")
    "`a' <b>`"
    """
    return f"`{' '.join(str(text).replace('`', chr(39)).split())}`"


def _metrics_table(metrics: Mapping[str, Any]) -> list[str]:
    """What a run measured of both models; none for no metrics."""
    if not metrics:
        return []
    lines = [
        {"metric": name}
        | {side: _value(entry[side]) for side in ("dense", "compressed")}
        | {"n": str(entry["compressed"].get("n", ""))}
        for name, entry in metrics.items()
    ]
    return [
        markdown(lines),
        "",
        "Brackets are 95% confidence intervals; n is what a value was measured on.",
        "",
    ]


def _value(side: Mapping[str, Any]) -> str:
    if why := side.get("why"):
        return plain(why)
    interval = side.get("ci95")
    inside = f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
    return f"{side['value']:.5g}{inside}"
