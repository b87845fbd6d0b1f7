"""What this machine offers to `compress`, and what stands in the way of a run."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, resources, util
from pathlib import Path

from packaging.requirements import Requirement

from compress.common.extras import DISTRIBUTION, EXTRAS, command
from compress.common.files import cache_folder, sha256

OPTIONAL = {
    "tensorboard": "train.trackers: [tensorboard]",
    "triton": "GPU kernels; torch brings it on Linux",
    "wandb": "train.trackers: [wandb]",
}
# a run keeps its checkpoint, its state and a temporary copy of the larger of the two
ENOUGH_DISK = 2**30


@dataclass(frozen=True)
class Check:
    """One finding.

    Parameters
    ----------
    name : what was looked at.
    found : what is there.
    ok : whether that is as it should be.
    required : whether a run cannot work while it is not.
    hint : what to do about it.
    """

    name: str
    found: str
    ok: bool = True
    required: bool = False
    hint: str = ""


def examine() -> list[Check]:
    """Look at versions, extras, optional packages, devices, disk, cache and built-in models."""
    return [
        *versions(),
        *_extras(),
        *_optional(),
        *_devices(),
        *_disk(),
        *_builtin_models(),
    ]


def versions() -> Iterator[Check]:
    """Compare every installed dependency with the range that `compress` declares for it."""
    yield Check("python", ".".join(map(str, sys.version_info[:3])))
    for requirement in _requirements(""):
        bounds = ",".join(sorted(map(str, requirement.specifier), reverse=True))
        supported = bounds or "any version"
        hint = f"run: pip install '{requirement.name}{bounds}'"
        installed = _installed(requirement.name)
        ok = installed is not None and _supports(requirement, installed)
        state = f"{installed or 'missing'} (supported: {supported})"
        yield Check(requirement.name, state, ok, True, "" if ok else hint)


def _installed(name: str) -> str | None:
    """The version of a package; None for one that is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _supports(requirement: Requirement, installed: str) -> bool:
    return requirement.specifier.contains(installed, prereleases=True)


def _requirements(extra: str) -> list[Requirement]:
    """What an extra requires; of "" what `compress` itself requires."""
    every = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    core = [r for r in every if not r.marker or r.marker.evaluate({"extra": ""})]
    if not extra:
        return core
    return [r for r in every if r not in core and r.marker and r.marker.evaluate({"extra": extra})]


def _extras() -> Iterator[Check]:
    """Tell for every extra whether its packages are installed, in versions that are supported."""
    for extra, purpose in EXTRAS.items():
        missing, unsupported = [], []
        for requirement in _requirements(extra):
            installed = _installed(requirement.name)
            if installed is None:
                missing.append(requirement.name)
            elif not _supports(requirement, installed):
                unsupported.append(f"{requirement.name} {installed}")
        state = f"without {', '.join(missing)}" if missing else "installed"
        if unsupported:
            state += f", not supported: {', '.join(unsupported)}"
        hint = f"run: {command(extra)}" if missing or unsupported else ""
        yield Check(f"extra {extra}", f"{state} (for {purpose})", not unsupported, hint=hint)


def _devices() -> Iterator[Check]:
    if util.find_spec("torch") is None:
        return
    import torch

    yield Check("cpu threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Check(f"cuda:{index}", f"{name}, {_size(free)} free of {_size(total)}")
    else:
        yield Check("cuda", f"no device (torch is built for CUDA {torch.version.cuda})")


def _disk() -> Iterator[Check]:
    for name, folder in (("disk here", Path.cwd()), ("cache", cache_folder())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if not os.access(existing, os.W_OK):
            hint = "set COMPRESS_CACHE to a folder of yours" if name == "cache" else "use --output"
            yield Check(name, f"{folder}: no write permission", False, name == "cache", hint)
        elif free < ENOUGH_DISK:
            hint = f"free some space: {_size(ENOUGH_DISK)} or more is comfortable"
            yield Check(name, f"{folder}: {_size(free)} free", False, hint=hint)
        else:
            yield Check(name, f"{folder}: {_size(free)} free")


def _optional() -> Iterator[Check]:
    for name, purpose in OPTIONAL.items():
        yield Check(name, f"{_installed(name) or 'not installed'} (optional, for {purpose})")


def _builtin_models() -> Iterator[Check]:
    if util.find_spec("torch") is None:
        return
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    hint = "the installation is damaged; run: pip install --force-reinstall compress-models"
    folder = Path(str(resources.files("compress.models.builtin")))
    weights = sorted(folder.rglob("*.safetensors"))
    if not weights:
        yield Check("built-in models", f"no weights under {folder}", False, True, hint)
    for path in weights:
        name = f"builtin:{path.relative_to(folder).parts[0]}"
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            yield Check(name, f"{path}: {error}", False, True, hint)
            continue
        count = sum(tensor.numel() for tensor in tensors.values())
        finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        # of DeepSeek-OCR's layout some are read by nothing: more than the parameters that run
        state = f"{count:,} values stored, sha256 {sha256(path)[:12]}"
        if finite:
            yield Check(name, state)
        else:
            yield Check(name, f"{state}, not all finite", False, True, hint)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
