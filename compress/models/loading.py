"""Load a diffusers pipeline part by part, with errors that name what is wrong with it."""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import (
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compress.common.files import is_litter, read_json
from compress.common.foreign import ForeignFileError, foreign
from compress.models.free_width import FreeWidthUNet2DModel
from compress.models.free_width_transformer import FREE_WIDTH_TRANSFORMERS
from compress.models.locate import PIPELINE_INDEX, ModelFolder, locate
from compress.models.pipelines import family_of
from compress.models.weights import check_config, check_weights, read_settings, variant_of

FREE_WIDTHS = (FreeWidthUNet2DModel, *FREE_WIDTH_TRANSFORMERS.values())
# how an index names a class of ours: code that lies in a folder is never run
OURS = {(kind.__module__, kind.__name__): kind for kind in FREE_WIDTHS}
# anything else would be imported by a name that stands in a file
LIBRARIES = ("diffusers", "transformers")
# what finds its own class, or loads parts in turn, might run code or read pickled weights
LOADED = (
    ModelMixin,
    SchedulerMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    FeatureExtractionMixin,
    ImageProcessingMixin,
)
TOKENIZER = "tokenizer.json"
RESTORE = "restore its files"


@dataclass(frozen=True)
class Part:
    """A part of a pipeline folder, which is checked but not loaded.

    Attributes
    ----------
    name : in the index.
    kind : its class, of diffusers, transformers or compress.
    folder : where it lies: a folder of its own, or the pipeline's where all parts lie in one place.
    """

    name: str
    kind: Any
    folder: Path

    @property
    def is_network(self) -> bool:
        """Whether it has weights."""
        return issubclass(self.kind, torch.nn.Module)

    def load(self) -> Any:
        """Load it; a network in float32, from safetensors alone."""
        options: dict[str, Any] = {"local_files_only": True}
        if self.is_network:
            dtype = "torch_dtype" if issubclass(self.kind, ModelMixin) else "dtype"
            options |= {dtype: torch.float32, "use_safetensors": True}
            options["variant"] = variant_of(self.folder)
        with foreign(self.folder, f"the {self.name}, a {self.kind.__name__},", RESTORE):
            return self.kind.from_pretrained(self.folder, **options)


def load_pipeline(model: str | ModelFolder) -> DiffusionPipeline:
    """Load ``builtin:NAME``, a local diffusers folder, or a hub id, in float32.

    Only safetensors weights are read, never pickled ones, and code that comes with a model is not
    run.

    Raises
    ------
    ValueError : for an unknown built-in name, a damaged file (named), or an id that the hub does
        not give.
    FileNotFoundError : when a local folder is missing or is no pipeline folder, or lacks a part.
    """
    folder = locate(model, "diffusion").folder
    index = _read_index(folder)
    kind = _pipeline_class(folder, index)
    required, options = kind._get_signature_keys(kind)
    arguments: dict[str, Any] = {name: index[name] for name in options if name in index}
    names = [*required, *(name for name, value in arguments.items() if isinstance(value, list))]
    parts = {name: _part(folder, kind, name, index.get(name)) for name in names}
    networks = [part.folder for part in parts.values() if part and part.is_network]
    variants = {variant for variant in map(variant_of, networks) if variant}
    if len(variants) > 1:
        raise ForeignFileError(
            f"{folder} should have weights of one variant; its parts have "
            f"{', '.join(sorted(variants))}; take all parts from one"
        )
    arguments |= {name: part and part.load() for name, part in parts.items()}
    with foreign(folder, f"a {kind.__name__}", RESTORE):
        pipeline = kind(**arguments)
    pipeline.register_to_config(_name_or_path=str(folder))
    return pipeline


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / PIPELINE_INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"a diffusers pipeline folder has a {PIPELINE_INDEX}; {folder} has none; name the "
            "pipeline's top folder"
        )
    return read_settings(path)


def _pipeline_class(folder: Path, index: Mapping[str, Any]) -> type[DiffusionPipeline]:
    name = index.get("_class_name")
    kind = _attribute(diffusers, name) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, DiffusionPipeline):
        return kind
    saved = index.get("_diffusers_version")
    raise ForeignFileError(
        f"{folder / PIPELINE_INDEX} should name a pipeline of diffusers as _class_name; got "
        f"{name!r:.80}, which diffusers {diffusers.__version__} does not have (the folder was "
        f"saved with {saved or 'a version that it does not name'}); install that version, or "
        "choose another model"
    )


def _attribute(module: Any, name: str) -> Any:
    try:
        return getattr(module, name, None)
    except (ImportError, RuntimeError):  # it needs what is not installed
        return None


def _part(folder: Path, kind: type[DiffusionPipeline], name: str, value: Any) -> Part | None:
    """Check a part of a pipeline before anything is loaded; None where it may be absent and is."""
    index, family = folder / PIPELINE_INDEX, family_of(kind)
    optional = name in kind._optional_components
    if optional and (value is None or value == [None, None]):
        return None
    pair = isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)
    if not pair:
        raise ForeignFileError(
            f"{index} should say of the {name} of a {kind.__name__} which library and class it is "
            f"of, as two texts; got {value!r:.80}; restore the file, or load the whole pipeline"
        )
    part_class = _part_class(index, name, value)
    own = folder / name
    config = getattr(part_class, "config_name", None) or "config.json"
    # some folders have all parts in one place
    flat = not own.is_dir() and (folder / config).is_file()
    if not (own.is_dir() or flat):
        if optional and not (family and name in family.parts):
            return None  # a safety checker that was removed
        raise FileNotFoundError(
            f"{index} has a {name}, a {value[1]}, which is expected in {own}; there is no such "
            "folder; restore it"
        )
    part = Part(name, part_class, folder if flat else own)
    _check_files(part, config)
    return part


def _part_class(index: Path, name: str, value: list[str]) -> type:
    library, class_name = value
    # saved again by diffusers, which ran the file of the class from a package of its own
    library = re.sub(r"^diffusers_modules\..*?(?=compress\.)", "", library)
    if ours := OURS.get((library, class_name)):
        return ours
    module = _attribute(diffusers.pipelines, library)
    if library in LIBRARIES:
        module = importlib.import_module(library)
    kind = _attribute(module, class_name)
    if isinstance(kind, type) and issubclass(kind, LOADED):
        return kind
    raise ForeignFileError(
        f"{index} should say of the {name} which model, scheduler, tokenizer or image processor of "
        f"{' or '.join(LIBRARIES)} it is; got {class_name} of {library}, which is none of "
        f"diffusers {diffusers.__version__} and transformers {transformers.__version__}, and code "
        "that comes with a model is not run; choose another model"
    )


def _check_files(part: Part, config: str) -> None:
    """Check that configuration, weights and vocabulary are there and fit each other."""
    for path in sorted(part.folder.glob("*.json")):
        if not is_litter(path.name):
            read_json(path)
    if issubclass(part.kind, ConfigMixin | torch.nn.Module):
        if not (part.folder / config).is_file():
            raise FileNotFoundError(
                f"the {part.name}, a {part.kind.__name__}, has a {config}; {part.folder} has none; "
                "restore it"
            )
        check_config(part.folder / config)
    if part.is_network:
        check_weights(part.folder, part.kind, variant=variant_of(part.folder))
    _check_vocabulary(part)


def _check_vocabulary(part: Part) -> None:
    """Refuse a tokenizer without its files, of which transformers makes one that knows nothing."""
    names = set(getattr(part.kind, "vocab_files_names", {}).values())
    missing = sorted(name for name in names if not (part.folder / name).is_file())
    # one file has all, or several have it together
    if names and TOKENIZER in missing and (len(missing) > 1 or names == {TOKENIZER}):
        raise FileNotFoundError(
            f"the {part.name}, a {part.kind.__name__}, has {' and '.join(sorted(names))}; "
            f"{part.folder} lacks {', '.join(missing)}; restore them"
        )
