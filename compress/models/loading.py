"""Load a diffusers pipeline, with errors that name what is wrong with it."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open

from compress.common.files import read_json
from compress.models.free_width import FreeWidthUNet2DModel
from compress.models.locate import PIPELINE_INDEX, ModelFolder, locate
from compress.models.pipelines import DENOISERS

# how an index names a UNet of ours
OUR_UNET = [FreeWidthUNet2DModel.__module__, FreeWidthUNet2DModel.__name__]


def load_pipeline(model: str | ModelFolder) -> DiffusionPipeline:
    """Load ``builtin:NAME``, a local diffusers folder, or a hub id, in float32.

    Only safetensors weights are read, never pickled ones, and code that comes with a model is not
    run.

    Raises
    ------
    ValueError : for an unknown built-in name, a damaged file (named), or an id that the hub does
        not give.
    FileNotFoundError : when a local folder is missing or is no pipeline folder.
    """
    folder = locate(model, "diffusion").folder
    _check_folder(folder)
    parts = {}
    if read_json(folder / PIPELINE_INDEX).get("unet") == OUR_UNET:
        # by our own class: code that lies in a folder is never run
        parts["unet"] = FreeWidthUNet2DModel.from_pretrained(
            folder / "unet", use_safetensors=True, local_files_only=True
        )
    pipeline = DiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, **parts
    )
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            _check_complete(folder / name, part)
    return pipeline


def _check_folder(folder: Path) -> None:
    """Check that a folder is a pipeline whose configuration and weights can be read."""
    index = folder / PIPELINE_INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"a diffusers pipeline folder has a {PIPELINE_INDEX}; {folder} has none; name the "
            "pipeline's top folder"
        )
    read_json(index)
    for config in sorted(folder.glob("*/*.json")):
        read_json(config)
    for weights in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(weights, "pt") as file:
                file.keys()
        except SafetensorError as error:
            raise ValueError(
                f"{weights} should hold safetensors but is damaged: {error}; restore the file"
            ) from error
    for part in DENOISERS:
        if (folder / part).is_dir() and not list((folder / part).glob("*.safetensors")):
            raise FileNotFoundError(
                f"weights expected as safetensors in {folder / part}; found none (pickled weights "
                "are not read); convert them with diffusers' save_pretrained"
            )


def _check_complete(folder: Path, part: torch.nn.Module) -> None:
    """Refuse weights that lack a tensor: diffusers leaves such a parameter without a value."""
    stored: dict[str, None] = {}
    for weights in folder.glob("*.safetensors"):
        with safe_open(weights, "pt") as file:
            stored |= dict.fromkeys(file.keys())
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
