"""Find a model: built in, in a local folder, or on the hub. It is found once, and handed on."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from compress.common.files import expand, folder_hash, read_json
from compress.common.foreign import reason
from compress.common.output_folder import CHECKPOINT_FACTS

BUILTIN = Path(__file__).parent / "builtin"
PIPELINE_INDEX = "model_index.json"
Kind = Literal["diffusion", "reader"]
EXAMPLE = {"diffusion": "google/ddpm-cifar10-32", "reader": "deepseek-ai/DeepSeek-OCR"}
LICENCE_FILES = ["README.md", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*"]
# no code, nothing pickled
READER_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", *LICENCE_FILES]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFolder:
    """A model that was found.

    Attributes
    ----------
    name : as it was asked for: ``builtin:NAME``, a folder or a hub id.
    folder : where it lies; of a hub id its snapshot in the cache.
    kind : a "diffusion" pipeline of diffusers, or a "reader": a vision-language model.
    """

    name: str
    folder: Path
    kind: Kind

    @cached_property
    def hash(self) -> str:
        """SHA-256 over weights and configuration."""
        return folder_hash(self.folder)


def builtin_models(kind: Kind) -> list[str]:
    """Names of the models of a kind that ship with compress."""
    pattern = f"*/{PIPELINE_INDEX}" if kind == "diffusion" else "reader-*/config.json"
    return sorted(path.parent.name for path in BUILTIN.glob(pattern))


def locate(model: "str | Path | ModelFolder", kind: Kind | None = None) -> ModelFolder:
    """Find a model.

    Parameters
    ----------
    model : ``builtin:NAME``, a folder, or a hub id, which is downloaded; what was found already is
        given back.
    kind : what is expected; whatever the model is when None.

    Raises
    ------
    ValueError : for an unknown built-in name, a built-in model of the other kind, or an id that the
        hub does not give.
    FileNotFoundError : for a folder that does not exist, or is of no known kind.
    """
    if isinstance(model, ModelFolder):
        return model
    name = str(model)
    prefix, _, builtin = name.partition(":")
    if prefix == "builtin":
        return ModelFolder(name, BUILTIN / builtin, _builtin_kind(name, builtin, kind))
    folder = expand(model)
    if folder.exists():
        return ModelFolder(name, folder, kind or _folder_kind(folder))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"model folder expected at {name}, which does not exist; give builtin:NAME, a folder "
            f"of {'transformers' if kind == 'reader' else 'diffusers'} or a hub id such as "
            f"{EXAMPLE[kind or 'diffusion']}"
        )
    try:
        kind = kind or _hub_kind(name)
        return ModelFolder(name, _download(name, kind), kind)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(
            f"model {name!r} is no folder here and could not be loaded from the hub: {reason}; "
            "check the name and the network, or give a local folder"
        ) from e


def _builtin_kind(name: str, builtin: str, kind: Kind | None) -> Kind:
    pipelines, readers = builtin_models("diffusion"), builtin_models("reader")
    actual: Kind | None = (
        "diffusion" if builtin in pipelines else "reader" if builtin in readers else None
    )
    if actual is None:
        raise ValueError(
            f"built-in models are {', '.join(pipelines)}, and the readers of pages "
            f"{', '.join(readers)}; got {name!r}; name one of them"
        )
    if kind == "diffusion" and actual == "reader":
        raise ValueError(
            f"a diffusion pipeline is expected, built in are {', '.join(pipelines)}; got {name!r}, "
            "a reader of pages; load it with compress.load_reader, measure it with compress eval "
            f"{name}"
        )
    if kind == "reader" and actual == "diffusion":
        raise ValueError(
            f"a reader of pages is expected, built in are {', '.join(readers)}; got {name!r}, a "
            f"diffusion pipeline; load it with compress.load, measure it with compress eval {name}"
        )
    return actual


def _folder_kind(folder: Path) -> Kind:
    if (folder / PIPELINE_INDEX).is_file():
        return "diffusion"
    if (folder / "config.json").is_file():
        return "reader"
    # a checkpoint of ours that lacks a file, or whose weights lie elsewhere
    if (folder / CHECKPOINT_FACTS).is_file():
        facts = read_json(folder / CHECKPOINT_FACTS)
        kinds: dict[Any, Kind] = {"slim": "diffusion", "runtime": "reader"}
        if isinstance(facts, dict) and str(facts.get("kind")) in kinds:
            return kinds[facts["kind"]]
    raise FileNotFoundError(
        f"a model folder has a {PIPELINE_INDEX} (diffusers) or a config.json (transformers); "
        f"{folder} has neither; name the model's top folder"
    )


def _hub_kind(name: str) -> Kind:
    try:
        hf_hub_download(name, PIPELINE_INDEX)
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):  # no network: this says nothing
            raise
        return "reader"
    return "diffusion"


def _download(name: str, kind: Kind) -> Path:
    if kind == "reader":
        return Path(snapshot_download(name, allow_patterns=READER_FILES))
    from diffusers import DiffusionPipeline

    folder = Path(DiffusionPipeline.download(name, use_safetensors=True))
    try:  # diffusers leaves these out; the folder's name is the commit
        snapshot_download(name, revision=folder.name, allow_patterns=LICENCE_FILES)
    except Exception as error:  # whatever the hub's client raises, the model is there
        logger.warning("the licence of %s could not be downloaded: %s", name, reason(error))
    return folder
