"""Read a transformers model folder, with errors that name what is wrong with it."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from compress.common.files import read_json

INDEX = "model.safetensors.index.json"


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of all tensors of a folder, whose files are checked on the way.

    Raises
    ------
    FileNotFoundError : when ``config.json``, the weights or one of their files are missing.
    ValueError : naming the damaged file.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"a model folder has a config.json; {folder} has none; name the folder that has it"
        )
    for path in sorted(folder.glob("*.json")):
        read_json(path)
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{folder / INDEX} should have a weight_map; restore the file")
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    if not files:
        raise FileNotFoundError(
            f"weights expected as safetensors in {folder}; found none (pickled weights are not "
            "read); convert them with save_pretrained"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is part of the model but missing; restore it")
        try:
            with safe_open(path, "pt") as file:
                shapes.update(
                    {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                )
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} should hold safetensors but is damaged: {error}; restore the file"
            ) from error
    return shapes


def read_model(model_class: Any, folder: Path, dtype: torch.dtype, config: Any = None) -> Any:
    """Load a checked folder into a transformers class, for evaluation.

    Parameters
    ----------
    model_class : has ``from_pretrained``.
    folder : checked by :func:`stored_shapes`.
    dtype : of the parameters.
    config : in place of the folder's own.

    Raises
    ------
    ValueError : naming a tensor that is missing or has another shape than the configuration says.
    """
    given = {} if config is None else {"config": config}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of what does not fit is replaced by one message
    try:
        model, info = model_class.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **given,
        )
    except RuntimeError as error:  # tensors that are stored apart and do not fit together
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: {error}; restore both files"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    shapes = {name: (stored, wanted) for name, stored, wanted in info["mismatched_keys"]}
    check_tensors(folder, set(info["missing_keys"]), shapes)
    return model.eval()


def check_tensors(
    folder: Path,
    missing: Set[str],
    mismatched: Mapping[str, tuple[Sequence[int], Sequence[int]]],
) -> None:
    """Refuse a folder that lacks tensors, or has some of another shape than its ``config.json``.

    Parameters
    ----------
    folder : as messages call it.
    missing : names.
    mismatched : the shape that is stored, and the one that belongs there.

    Raises
    ------
    ValueError : naming the first tensor.
    """
    if missing:
        raise ValueError(
            f"{folder} should hold all tensors of its config.json; {len(missing)} are missing, "
            f"among them {min(missing)}; restore the weights"
        )
    if mismatched:
        name = min(mismatched)
        stored, wanted = mismatched[name]
        raise ValueError(
            f"{folder}: {name} should have shape {tuple(wanted)} by config.json and has "
            f"{tuple(stored)}; {len(mismatched)} tensors do not fit; restore both files"
        )
