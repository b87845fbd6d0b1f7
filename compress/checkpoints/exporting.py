"""The files of an exported pipeline: a new denoiser, and every other part as it was.

Text encoders, tokenizers, autoencoder and scheduler are copied byte by byte from the folder that
the dense pipeline was read from; only the denoiser is written anew, and beside it its class where
diffusers has no such class.
"""

import inspect
import shutil
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from compress.common.files import read_json, walk, write_json
from compress.models.loading import FREE_WIDTHS
from compress.models.pipelines import denoiser
from compress.models.weights import stored_tensors, variant_of, variants

INDEX = "model_index.json"
# of other frameworks, or pickled: what a pipeline with safetensors never reads
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5", ".onnx", ".onnx_data"}


def export(pipeline: DiffusionPipeline, target: Path, source: Path | None = None) -> None:
    """Write a pipeline whose denoiser is new.

    diffusers runs the file of its class that then lies beside it where ``trust_remote_code=True``
    allows it.

    Parameters
    ----------
    pipeline : with the new denoiser.
    target : an empty folder.
    source : the folder that the other parts were read from and are copied from; without, all parts
        are written as diffusers and transformers write them.
    """
    part, model = denoiser(pipeline)
    if source is None:
        pipeline.save_pretrained(target, safe_serialization=True)
    else:
        index = read_json(source / INDEX)
        changed: dict[str, Any] = {}
        for name in other_parts(source, part):
            files = part_files(source, name)
            for path in files:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / path, target / path)
            if not files and getattr(pipeline, name, None) is None:
                changed[name] = [None, None]  # its folder was removed
            elif not files:
                getattr(pipeline, name).save_pretrained(target / name)
        model.save_pretrained(target / part, safe_serialization=True)
        if index[part][1] != type(model).__name__:
            changed[part] = [type(model).__module__, type(model).__name__]
        if changed:
            write_json(target / INDEX, index | changed)
        else:
            shutil.copyfile(source / INDEX, target / INDEX)
    if isinstance(model, FREE_WIDTHS):
        # named as the index names the module
        code = inspect.getfile(type(model))
        shutil.copyfile(code, target / part / f"{type(model).__module__}.py")


def load_options(folder: Path, pipeline: DiffusionPipeline) -> dict[str, str]:
    """What ``from_pretrained`` must be told of an exported folder: arguments as Python text.

    The variant of parts that have no other weights; and one dtype, that of the denoiser, where
    weights are not stored in float32: transformers loads each part in its own, diffusers does not.
    """
    networks = {path: variant_of(path) for path in folder.iterdir() if variants(path)}
    named = [variant for variant in networks.values() if variant]
    options = {"variant": f'"{named[0]}"'} if named else {}
    tensors = (stored_tensors(*network).values() for network in networks.items())
    if any(tensor.dtype != "F32" for stored in tensors for tensor in stored):
        options["torch_dtype"] = str(denoiser(pipeline)[1].dtype)
    return options


def other_parts(source: Path, denoiser: str) -> list[str]:
    """Names of a pipeline folder's parts but for the denoiser and those that it leaves out."""
    return [
        name
        for name, value in read_json(source / INDEX).items()
        if isinstance(value, list) and name != denoiser and value[0] is not None
    ]


def part_files(source: Path, part: str) -> list[Path]:
    """The files of one part of a pipeline folder, relative to it, without unused weights.

    Weights of a variant (``model.fp16.safetensors``) are unused where there are plain ones. A flat
    folder, with all parts in one place, has none.
    """
    weights, variant = variants(source / part), variant_of(source / part)
    return sorted(
        path.relative_to(source)
        for path in walk(source / part)
        if path.suffix not in OTHER_WEIGHTS
        and (path.suffix != ".safetensors" or weights.get(path, "") == variant)
    )
