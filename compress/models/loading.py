"""Load a diffusers pipeline part by part, with errors that name what is wrong with it."""

import contextlib
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open

from compress.common.files import read_json
from compress.models.free_width import FreeWidthUNet2DModel
from compress.models.locate import PIPELINE_INDEX, ModelFolder, locate
from compress.models.pipelines import family_of

# how an index names a UNet of ours; by our own class: code that lies in a folder is never run
OUR_UNET = [FreeWidthUNet2DModel.__module__, FreeWidthUNet2DModel.__name__]
# model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
WEIGHTS = re.compile(r"[^.]+?(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors")
# anything else would be imported by a name that stands in a file
LIBRARIES = ("diffusers", "transformers")
PICKLED = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
LONGEST_REASON = 300


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever a library raises on a foreign file into one error that says what it is."""
    try:
        yield
    except Exception as error:  # of every kind
        reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        raise ValueError(f"{what} cannot be loaded: {reason}; restore its files") from error


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
    def has_weights(self) -> bool:
        """Whether it is a network."""
        return issubclass(self.kind, torch.nn.Module)

    def load(self) -> Any:
        """Load it; a network in float32, from safetensors alone.

        Raises
        ------
        ValueError : for whatever its library finds wrong with it.
        """
        options: dict[str, Any] = {"local_files_only": True}
        if self.has_weights:
            dtype = "torch_dtype" if issubclass(self.kind, ModelMixin) else "dtype"
            options |= {dtype: torch.float32, "use_safetensors": True}
            options["variant"] = variant_of(self.folder)
        with explained(f"the {self.name} in {self.folder}, a {self.kind.__name__},"):
            loaded = self.kind.from_pretrained(self.folder, **options)
        if self.has_weights:
            _check_complete(self.folder, loaded)
        return loaded


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
    given: dict[str, Any] = {name: index[name] for name in options if name in index}
    names = [*required, *(name for name, value in given.items() if isinstance(value, list))]
    parts = {name: _part(folder, kind, name, index.get(name)) for name in names}
    networks = [part.folder for part in parts.values() if part and part.has_weights]
    variants = {variant for variant in map(variant_of, networks) if variant}
    if len(variants) > 1:
        raise ValueError(
            f"weights of one variant are expected in {folder}; its parts have those of "
            f"{', '.join(sorted(variants))}; take all parts from one"
        )
    given |= {name: part and part.load() for name, part in parts.items()}
    with explained(f"the {kind.__name__} in {folder}"):
        pipeline = kind(**given)
    pipeline.register_to_config(_name_or_path=str(folder))
    return pipeline


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / PIPELINE_INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"a diffusers pipeline folder has a {PIPELINE_INDEX}; {folder} has none; name the "
            "pipeline's top folder"
        )
    return _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} should hold a JSON object; got {_short(content)}; restore the file"
        )
    return content


def _short(value: Any) -> str:
    return repr(value)[:LONGEST_REASON]


def _pipeline_class(folder: Path, index: Mapping[str, Any]) -> type[DiffusionPipeline]:
    name = index.get("_class_name")
    kind = _attribute(diffusers, name) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, DiffusionPipeline):
        return kind
    saved = index.get("_diffusers_version")
    raise ValueError(
        f"{folder / PIPELINE_INDEX} should name a pipeline of diffusers as _class_name; got "
        f"{_short(name)}, which diffusers {diffusers.__version__} does not have (the folder was "
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
        raise ValueError(
            f"{index} should say of the {name} of a {kind.__name__} which library and class it is "
            f"of, as two texts; got {_short(value)}; restore the file, or load the whole pipeline"
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
    library, found = value
    if value == OUR_UNET:
        return FreeWidthUNet2DModel
    module = _attribute(diffusers.pipelines, library)
    if library in LIBRARIES:
        module = importlib.import_module(library)
    kind = _attribute(module, found)
    if isinstance(kind, type) and hasattr(kind, "from_pretrained"):
        return kind
    raise ValueError(
        f"{index} should say of the {name} which class of {' or '.join(LIBRARIES)} it is; got "
        f"{found} of {library}, which diffusers {diffusers.__version__} and transformers "
        f"{transformers.__version__} do not have, and code that comes with a model is not run; "
        "choose another model"
    )


def _check_files(part: Part, config: str) -> None:
    """Check that configuration and weights are there and can be read."""
    for path in sorted(part.folder.glob("*.json")):
        read_json(path)
    if issubclass(part.kind, ConfigMixin | torch.nn.Module):
        if not (part.folder / config).is_file():
            raise FileNotFoundError(
                f"the {part.name}, a {part.kind.__name__}, has a {config}; {part.folder} has none; "
                "restore it"
            )
        quantised = _read_object(part.folder / config).get("quantization_config")
        if quantised is not None:
            raise ValueError(
                f"compress reads weights that are not quantised; {part.folder / config} has a "
                f"quantization_config, {_short(quantised)}; choose the original weights"
            )
    if not part.has_weights:
        return
    weights = weights_of(part.folder)
    if not weights:
        others = sorted(p.name for p in part.folder.glob("*") if p.suffix in PICKLED)
        raise FileNotFoundError(
            f"weights of the {part.name} expected as safetensors in {part.folder}; found "
            f"{', '.join(others) or 'none'} (pickled weights are not read); convert them with "
            "diffusers' save_pretrained"
        )
    for path in weights:
        _tensor_names(path)


def variant_of(folder: Path) -> str | None:
    """The variant whose weights a folder has, such as "fp16"; None where it has plain ones.

    Raises
    ------
    ValueError : where plain weights lack and there are several variants.
    """
    named = map(WEIGHTS.fullmatch, (path.name for path in folder.glob("*.safetensors")))
    variants = {match["variant"] for match in named if match}
    if None in variants or not variants:
        return None
    if len(variants) > 1:
        raise ValueError(
            f"weights of one variant are expected in {folder}; got those of "
            f"{', '.join(sorted(variants))}; remove all but one"
        )
    return variants.pop()


def weights_of(folder: Path) -> list[Path]:
    """The safetensors that are read of a part's folder: the plain ones, or its only variant's."""
    variant = variant_of(folder)
    found = ((path, WEIGHTS.fullmatch(path.name)) for path in folder.glob("*.safetensors"))
    return sorted(path for path, match in found if match and match["variant"] == variant)


def dtypes_of(weights: Sequence[Path]) -> set[str]:
    """The dtypes of the tensors in files, as safetensors writes them, such as F16."""
    found = set()
    for path in weights:
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}
    return found


def _tensor_names(weights: Path) -> list[str]:
    try:
        with safe_open(weights, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{weights} should hold safetensors but is damaged: {error}; restore the file"
        ) from error


def _check_complete(folder: Path, part: torch.nn.Module) -> None:
    """Refuse weights that lack a tensor: diffusers leaves such a parameter without a value."""
    stored = dict.fromkeys(name for path in weights_of(folder) for name in _tensor_names(path))
    if isinstance(part, ModelMixin):
        # names of attention layers from before diffusers 0.12, as Stable Diffusion's VAE has them
        part._fix_state_dict_keys_on_load(stored)
    # transformers reads names with and without the prefix of a base model, such as text_model
    known = {ending for name in stored for ending in _endings(name)}
    missing = sorted(
        name
        for name in part.state_dict()
        if name not in known and not any(ending in stored for ending in _endings(name))
    )
    if stored and missing:
        raise ValueError(
            f"{folder} should hold weights for all parameters; {len(missing)} are missing, among "
            f"them {missing[0]}; restore the weights"
        )


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1)]
