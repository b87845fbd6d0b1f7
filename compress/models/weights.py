"""Weights of a model folder, compared with its model before any memory is taken.

Only the headers of safetensors files are read, and the model is built on the meta device.
"""

import contextlib
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.utils import logging as transformers_logging

from compress.common.files import read_json
from compress.common.foreign import LONGEST_NAME, ForeignFileError, foreign, one_line

# what transformers and diffusers call the weights of a folder
STEMS = ("model", "diffusion_pytorch_model")
# model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
FILE = re.compile(
    rf"({'|'.join(STEMS)})(\.(?P<variant>[^.]+?))?(-\d{{5}}-of-\d{{5}})?\.safetensors"
)
# a number beyond these makes a library count for minutes before it has a model to compare
MOST_LAYERS, MOST = 10_000, 10_000_000
LAYERS = re.compile(r"layer|depth|block")
COUNT = re.compile(r"^(num|n)_|_(num|size|steps)$")
# settings of a config.json by which other weights, or other code, would be loaded
REDIRECTIONS = {
    "quantization_config": "weights that are not quantised",
    "transformers_weights": "its weights under their usual name",
    "fusion_config": "a model without fused layers",
}
# files that transformers reads in place of the weights, or puts on top of them
OVERRIDES = {
    "shard-*.safetensors": "weights in the layout of save_pretrained",
    "adapter_config.json": "weights that no adapter changes",
}
# what else than a mapping of settings is a damaged configuration
MAPPINGS = re.compile(r"(^|_)(config|map)$")

logger = logging.getLogger("compress")


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file has it.

    Attributes
    ----------
    file : where it is.
    shape : its sizes.
    dtype : as safetensors writes it, such as F16.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def variants(folder: Path) -> dict[Path, str | None]:
    """The files of a folder that are named as weights are, with the variant that each is of."""
    named = ((path, FILE.fullmatch(path.name)) for path in folder.glob("*.safetensors"))
    return {path: match["variant"] for path, match in named if match}


def variant_of(folder: Path) -> str | None:
    """The variant whose weights a folder has, such as "fp16"; None where it has plain ones.

    Raises
    ------
    ValueError : where there are no plain weights, and those of several variants.
    """
    present = set(variants(folder).values())
    named = sorted(variant for variant in present if variant)
    if None in present or not named:
        return None
    if len(named) > 1:
        raise ForeignFileError(
            f"{folder} should have weights of one variant; it has {', '.join(named)}; remove all "
            "but one"
        )
    return named[0]


def stored_tensors(folder: Path, variant: str | None = None) -> dict[str, Stored]:
    """The tensors of the files that loading a folder would read, by name.

    Parameters
    ----------
    folder : of a transformers model, or of one part of a diffusers pipeline.
    variant : whose weights are read, such as "fp16"; the plain ones when None.

    Raises
    ------
    FileNotFoundError : when the weights, or one of their files, are missing.
    ValueError : naming the file that is damaged, that lies outside the folder, or that a library
        may read in place of another.
    """
    for pattern, right in OVERRIDES.items():
        for path in folder.glob(pattern):
            raise ForeignFileError(f"compress reads {right}; got {path}; remove or merge it")
    tensors: dict[str, Stored] = {}
    for path, names in _weight_files(folder, variant).items():
        with foreign(path, "safetensors"), safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            shard = {
                name: Stored(path, tuple(tensor.get_shape()), tensor.get_dtype())
                for name, tensor in slices.items()
            }
        for name in sorted(names - shard.keys()):
            raise ForeignFileError(
                f"{path} should hold {name}, as the index beside it says; it does not; restore both"
            )
        for name in sorted(tensors.keys() & shard.keys()):
            raise ForeignFileError(
                f"{name} should be stored once; {tensors[name].file} and {path} both hold it; "
                "restore the weights"
            )
        tensors |= shard
    return tensors


def _weight_files(folder: Path, variant: str | None = None) -> dict[Path, Set[str]]:
    """The files that loading would read, with the tensors that an index expects in each.

    Parameters and errors as for :func:`stored_tensors`.
    """
    named_so = f".{variant}" if variant else ""
    files: dict[Path, Set[str]] = {}
    for stem in STEMS:
        single = folder / f"{stem}{named_so}.safetensors"
        index = folder / f"{stem}.safetensors.index{named_so}.json"
        named = _indexed(index) if index.is_file() else {}
        if single.is_file() and named and set(named) != {single}:
            raise ForeignFileError(
                f"{folder} should have its weights once; it has {single.name}, and {index.name} "
                "that names other files, and libraries differ in which they read; remove one"
            )
        files |= named or ({single: frozenset()} if single.is_file() else {})
    if not files:
        raise FileNotFoundError(
            f"weights expected as safetensors in {folder}; found none (pickled weights are not "
            "read); convert them with save_pretrained"
        )
    return files


def _indexed(index: Path) -> dict[Path, Set[str]]:
    """The files that an index names, and the tensors in each."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ForeignFileError(f"{index} should have a weight_map of tensors; restore the file")
    if not isinstance(content.get("metadata", {}), dict):
        raise ForeignFileError(f"{index} should have a mapping as metadata; restore the file")
    files: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        # a name with a folder, or of something else, is not what save_pretrained writes
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ForeignFileError(
                f"{index} should name files beside it; got {name!r} for {tensor}; restore the file"
            )
        if not name.endswith(".safetensors"):
            raise ForeignFileError(
                f"{index} should name safetensors files; got {name!r} for {tensor}; convert the "
                "weights with save_pretrained"
            )
        files.setdefault(index.parent / name, set()).add(tensor)
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is part of the model but missing; restore it")
        check_inside(index.parent, path)
    return {path: frozenset(names) for path, names in sorted(files.items())}


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a path that a file of a folder names and that leads out of that folder.

    Links of the hub's cache are followed: from ``snapshots`` to the ``blobs`` of the repository, or
    to those that repositories share.
    """
    home, target = folder.resolve(), path.resolve()
    snapshots = [above for above in home.parents if above.name == "snapshots"]
    cached = [above / "blobs" for snapshot in snapshots for above in list(snapshot.parents)[:2]]
    if not any(target.is_relative_to(allowed) for allowed in (home, *cached)):
        raise ForeignFileError(
            f"{path} should lie in {folder}; it leads to {target}; put the file itself there"
        )


def read_settings(path: Path) -> dict[str, Any]:
    """Read JSON that holds a mapping."""
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ForeignFileError(
            f"{path} should hold a mapping of settings; got {type(settings).__name__}; restore the "
            "file"
        )
    return settings


def check_config(path: Path) -> dict[str, Any]:
    """Read a model's configuration; refuse what would load other weights or code, or never end."""
    if not path.is_file():
        raise FileNotFoundError(
            f"a model folder has a {path.name}; {path.parent} has none; name the folder that has it"
        )
    config = read_settings(path)
    for key, right in REDIRECTIONS.items():
        if config.get(key) is not None:
            raise ForeignFileError(f"{path} has {key}; compress reads {right}; choose such a model")
    for key, kind in (("model_type", str), ("architectures", list)):
        if not isinstance(config.get(key), kind | None):
            raise ForeignFileError(
                f"{path}: {key} should be a {kind.__name__}; got {config[key]!r:.60}; restore the "
                "file"
            )
    _check_settings(path, "", config)
    return config


def _check_settings(path: Path, key: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for inner, content in value.items():
            _check_settings(path, inner, content)
        if key and "auto_map" in value:
            raise ForeignFileError(
                f"{path}: {key} should not name code of its own; it has an auto_map; remove it"
            )
    elif MAPPINGS.search(key) and value is not None:
        raise ForeignFileError(
            f"{path}: {key} should be a mapping; got {value!r:.60}; restore the file"
        )
    elif isinstance(value, list):
        for content in value:
            _check_settings(path, key, content)
    elif isinstance(value, str) and key.endswith("_implementation") and not value.isidentifier():
        raise ForeignFileError(
            f"{path}: {key} should be a name of transformers; got {value!r}, which may be code of "
            "the hub; remove it"
        )
    elif isinstance(value, int | float):
        most = MOST_LAYERS if LAYERS.search(key) else MOST if COUNT.search(key) else value
        if not value <= most:
            raise ForeignFileError(
                f"{path}: {key} should be at most {most:,}; got {value:.3g}; restore the file"
            )


def check_weights(
    folder: Path, model_class: Any, config: Any = None, variant: str | None = None
) -> None:
    """Compare a folder's weights with the model that its ``config.json`` describes.

    Nothing of the size of the weights is allocated.

    Parameters
    ----------
    folder : of a transformers model, or of one part of a diffusers pipeline.
    model_class : of transformers or of diffusers: what the folder is loaded into.
    config : in place of the folder's own; of the class that `model_class` takes.
    variant : as for :func:`stored_tensors`.

    Raises
    ------
    FileNotFoundError : when the configuration, the weights or one of their files are missing.
    ValueError : naming the file, and the tensor that is missing or has another shape.
    """
    config_file = folder / "config.json"
    check_config(config_file)
    stored = stored_tensors(folder, variant)
    fitting = f"a {model_class.__name__} whose weights fit its config.json"
    with foreign(folder, fitting), few_parameters(config_file, len(stored)):
        if not issubclass(model_class, ModelMixin):
            missing, extra, shapes = _transformers(folder, model_class, config, stored)
            return _report(folder, stored, missing, extra, shapes)
        with torch.device("meta"):
            part = model_class.from_config(
                model_class.load_config(folder, local_files_only=True) if config is None else config
            )
        # names of attention layers from before diffusers 0.12, as Stable Diffusion's VAE has them
        part._fix_state_dict_keys_on_load(stored)
    compare(folder, stored, {name: tuple(t.shape) for name, t in part.state_dict().items()})


def compare(
    folder: Path, stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse weights that lack a tensor, or hold one of another shape.

    Parameters
    ----------
    folder : as messages call it.
    stored : of :func:`stored_tensors`.
    expected : the shapes that the model has by its ``config.json``, by the names that are stored.
    """
    differ = {
        name: (stored[name].shape, expected[name])
        for name in expected.keys() & stored.keys()
        if stored[name].shape != expected[name]
    }
    _report(
        folder, stored, expected.keys() - stored.keys(), stored.keys() - expected.keys(), differ
    )


Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
Compared = tuple[Set[str], Set[str], Shapes]


def _transformers(
    folder: Path, model_class: Any, config: Any, stored: Mapping[str, Stored]
) -> Compared:
    """As transformers itself matches them: it renames, joins and splits what older files have."""
    if config is None:
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    with silent_transformers():
        _, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict={name: torch.empty(s.shape, device="meta") for name, s in stored.items()},
            device_map={"": "meta"},
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    differ = {name: (tuple(is_), tuple(should)) for name, is_, should in info["mismatched_keys"]}
    return set(info["missing_keys"]), set(info["unexpected_keys"]), differ


def _report(
    folder: Path, stored: Mapping[str, Stored], missing: Set[str], extra: Set[str], shapes: Shapes
) -> None:
    files = sorted({tensor.file for tensor in stored.values()})
    whole = files[0] if len(files) == 1 else folder
    if missing:
        raise ForeignFileError(
            f"{whole} should hold all tensors of {folder / 'config.json'}; {len(missing)} are "
            f"missing, among them {one_line(min(missing), LONGEST_NAME)}; restore the weights"
        )
    for name in sorted(shapes):
        shape, expected = shapes[name]
        raise ForeignFileError(
            f"{stored[name].file if name in stored else whole}: "
            f"{one_line(name, LONGEST_NAME)} should have shape "
            f"{expected} by {folder / 'config.json'} and has {shape}; {len(shapes)} tensors do not "
            "fit; restore both files"
        )
    if extra:
        logger.warning(
            "%s holds %d tensors that are no part of the model by its config.json, among them %s; "
            "they are not read",
            *(one_line(str(whole)), len(extra), one_line(min(extra), LONGEST_NAME)),
        )


@contextlib.contextmanager
def few_parameters(config: Path, stored: int) -> Iterator[None]:
    """Stop the building of a model with many more parameters than are stored.

    Parameters
    ----------
    config : that describes the model, for the message.
    stored : number of tensors.
    """
    most, count, here = 2 * stored + 1000, 0, threading.get_ident()

    def bound(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == here
        if count > most:
            raise ForeignFileError(
                f"{config} describes a model of more than {most} tensors, and {stored} are stored; "
                "restore both files"
            )

    handle = register_module_parameter_registration_hook(bound)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    """No progress bar and no table of what does not fit: one message says it."""
    verbosity, bar = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
