"""Load a diffusers pipeline from a recipe's ``model``, with errors that name what is wrong."""

import importlib
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open

from compress.common.files import folder_hash, read_json

BUILTIN = Path(__file__).parent / "builtin"
# how an index names a UNet of ours
OUR_UNET = ["compress.models.free_width", "FreeWidthUNet2DModel"]


def builtin_names() -> list[str]:
    """Names of the pipelines that ship with compress."""
    return sorted(p.parent.name for p in BUILTIN.glob("*/model_index.json"))


def builtin_readers() -> list[str]:
    """Names of the vision-language models that ship with compress."""
    return sorted(path.parent.name for path in BUILTIN.glob("reader-*/config.json"))


def load_pipeline(model: str) -> DiffusionPipeline:
    """Load ``builtin:NAME``, a local diffusers folder, or a hub id, in float32.

    Only safetensors weights are read, never pickled ones, and code that comes with a model is not
    run.

    Raises
    ------
    ValueError : for an unknown built-in name, a damaged file (named), or an id that the hub does
        not give.
    FileNotFoundError : when a local folder is missing or is no pipeline folder.
    """
    folder = local_folder(model)
    if folder is None:
        return _from_hub(model)
    check_folder(folder)
    pipeline = _from_folder(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            _check_complete(folder / name, part)
    return pipeline


def _from_folder(folder: Path) -> DiffusionPipeline:
    """Read a UNet of ours by our own class: code that lies in a folder is never run."""
    parts = {}
    if read_json(folder / "model_index.json").get("unet") == OUR_UNET:
        module, name = OUR_UNET
        unet = getattr(importlib.import_module(module), name)
        parts["unet"] = unet.from_pretrained(
            folder / "unet", use_safetensors=True, local_files_only=True
        )
    return DiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, **parts
    )


def local_folder(model: str) -> Path | None:
    """The folder that a model's name stands for, or None for a hub id.

    Raises
    ------
    ValueError, FileNotFoundError : as :func:`load_pipeline`.
    """
    kind, _, name = model.partition(":")
    if kind == "builtin":
        if name in builtin_readers():
            raise ValueError(
                f"a diffusion pipeline expected, built in are {', '.join(builtin_names())}; got "
                f"{model!r}, a reader of pages; load it with compress.models.vlm.load_vlm, measure "
                f"it with compress eval {model} --suite ocr"
            )
        if name not in builtin_names():
            raise ValueError(
                f"built-in models are {', '.join(builtin_names())}, and the readers of pages "
                f"{', '.join(builtin_readers())}, which compress eval measures with --suite ocr; "
                f"got {model!r}; name one of them"
            )
        return BUILTIN / name
    folder = Path(model).expanduser()
    if folder.exists():
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise FileNotFoundError(
            f"model folder expected at {model}, which does not exist; give builtin:NAME, a "
            "diffusers folder or a hub id such as google/ddpm-cifar10-32"
        )
    return None


def pipeline_folder(model: str) -> Path:
    """The folder that :func:`load_pipeline` has read a model from; of a hub id its snapshot.

    Raises
    ------
    ValueError, FileNotFoundError : as :func:`load_pipeline`.
    """
    folder = local_folder(model)
    if folder is not None:
        return folder
    return Path(DiffusionPipeline.download(model, use_safetensors=True, local_files_only=True))


def check_folder(folder: Path) -> None:
    """Check that a folder is a pipeline whose configuration and weights can be read.

    Raises
    ------
    FileNotFoundError : when ``model_index.json`` or a component's weights are missing.
    ValueError : naming the damaged file.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"a diffusers pipeline folder has a model_index.json; {folder} has none; name the "
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
    if (folder / "unet").is_dir() and not list((folder / "unet").glob("*.safetensors")):
        raise FileNotFoundError(
            f"weights expected as safetensors in {folder / 'unet'}; found none (pickled weights "
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


def _from_hub(model: str) -> DiffusionPipeline:
    try:
        return _from_folder(Path(DiffusionPipeline.download(model, use_safetensors=True)))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model {model!r} is no folder here and could not be loaded from the hub: {first}; "
            "check the name and the network, or give a local diffusers folder"
        ) from error


def model_hash(model: str, pipeline: DiffusionPipeline) -> str:
    """A hash of a model's weights and configuration: of its folder, or of its parameters."""
    folder = local_folder(model)
    if folder is not None:
        return folder_hash(folder)
    import hashlib

    digest = hashlib.sha256(model.encode())
    for name, tensor in sorted(pipeline.unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
