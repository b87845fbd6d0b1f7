"""The files of an exported pipeline: a new UNet, and every other part as it was.

Text encoders, tokenizers, autoencoder and scheduler are copied byte by byte from the folder that
the dense pipeline was read from; only the UNet is written anew, and beside it its class where
diffusers has no such class.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import split_torch_state_dict_into_shards

from compress.common.files import read_json, write_json
from compress.models import free_width

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
SHARD = "10GB"  # diffusers' own default
# of other frameworks, or pickled: what a pipeline with safetensors never reads
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5", ".onnx", ".onnx_data"}
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def part_files(source: Path, part: str) -> list[Path]:
    """The files of one part of a pipeline folder, relative to it, without unused weights.

    Weights of a variant (``model.fp16.safetensors``) are unused: the plain ones are read. A flat
    folder, with all parts in one place, has none.
    """
    return sorted(
        path.relative_to(source)
        for path in (source / part).rglob("*")
        if path.is_file()
        and path.suffix not in OTHER_WEIGHTS
        and not (path.suffix == ".safetensors" and "." in path.stem)
    )


def other_parts(source: Path) -> list[str]:
    """Names of a pipeline folder's parts but for the UNet and those that it leaves out."""
    return [
        name
        for name, value in read_json(source / INDEX).items()
        if isinstance(value, list) and name != "unet" and value[0] is not None
    ]


def export(pipeline: DiffusionPipeline, source: Path, target: Path) -> None:
    """Write a pipeline whose UNet is new and whose other parts lie in ``source``.

    Parameters
    ----------
    pipeline : with the new UNet.
    source : the folder that the other parts were read from.
    target : an empty folder.
    """
    _write_other_parts(pipeline, source, target)
    pipeline.unet.save_pretrained(target / "unet", safe_serialization=True)
    export_code(pipeline.unet, target / "unet")
    index = _index(source, pipeline.unet)
    if index is None:
        shutil.copyfile(source / INDEX, target / INDEX)
    else:
        write_json(target / INDEX, index)


def export_code(unet: ModelMixin, folder: Path) -> None:
    """Put the class of a UNet beside its weights where diffusers has no such class.

    diffusers runs the file that is called as ``model_index.json`` calls the module, where
    ``trust_remote_code=True`` allows it.

    Parameters
    ----------
    unet : whose weights lie in ``folder``.
    folder : the UNet's own, of a pipeline.
    """
    code = _code(unet)
    if code is not None:
        shutil.copyfile(code, folder / f"{type(unet).__module__}.py")


def exported_bytes(pipeline: DiffusionPipeline, source: Path, unet: ModelMixin) -> int:
    """Size of what :func:`export` would write.

    Parameters
    ----------
    pipeline : read from ``source``.
    source : as in :func:`export`.
    unet : takes the place of the pipeline's; may be on the meta device.
    """
    size = model_bytes(unet)
    code = _code(unet)
    size += 0 if code is None else code.stat().st_size
    index = _index(source, unet)
    if index is None:
        size += (source / INDEX).stat().st_size
    else:
        size += len(json.dumps(index, indent=2, ensure_ascii=False).encode()) + 1
    flat = []
    for part in other_parts(source):
        files = part_files(source, part)
        size += sum((source / path).stat().st_size for path in files)
        flat += [] if files else [part]
    if flat:  # how a library writes its own configuration is best asked by writing it
        with tempfile.TemporaryDirectory() as folder:
            for part in flat:
                getattr(pipeline, part).save_pretrained(Path(folder) / part)
            size += sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return size


def _write_other_parts(pipeline: DiffusionPipeline, source: Path, target: Path) -> None:
    for part in other_parts(source):
        files = part_files(source, part)
        for path in files:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target / path)
        if not files:
            getattr(pipeline, part).save_pretrained(target / part)


def _index(source: Path, unet: ModelMixin) -> dict | None:
    """The pipeline's index where the UNet's class is another one, which it must name."""
    index = read_json(source / INDEX)
    if index["unet"][1] == type(unet).__name__:
        return None
    return index | {"unet": [type(unet).__module__, type(unet).__name__]}


def _code(unet: ModelMixin) -> Path | None:
    ours = isinstance(unet, free_width.FreeWidthUNet2DModel)
    return Path(free_width.__file__) if ours else None


def model_bytes(model: ModelMixin) -> int:
    """Size of the files that ``save_pretrained`` makes of a model, on the meta device or not."""
    tensors = model.state_dict()
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=WEIGHTS, max_shard_size=SHARD
    )
    size = len(model.to_json_string().encode())
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        size += len(json.dumps(index, indent=2, sort_keys=True).encode()) + 1
    for names in split.filename_to_tensors.values():
        size += _safetensors_bytes({name: tensors[name] for name in names})
    return size


def _safetensors_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Size of a safetensors file as diffusers writes it.

    Eight bytes of length, a header of JSON that is padded to a multiple of eight, and the tensors,
    widest type first and then by name.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
        tensor, start = tensors[name], stop
        stop += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + 8 * math.ceil(len(text) / 8) + stop
