"""What a result depends on besides the recipe: devices and versions."""

import contextlib
import datetime
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def choose_device(device: str | None) -> str:
    """The device that is asked for; CUDA where there is any when None.

    Raises
    ------
    ValueError : for what is no device, or CUDA where torch sees no GPU.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type != "cuda":
            torch.zeros((), device=chosen).item()  # a device that torch knows may hold nothing
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be such as cpu or cuda; got {device!r}; choose one that this machine has"
        ) from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} was asked for, but torch sees {torch.cuda.device_count() or 'no'} "
            "GPU; use cpu"
        )
    return device


def device_name(device: str | torch.device) -> str:
    """``cpu``, or the GPU's product name."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def created(device: str) -> dict[str, Any]:
    """When and where something was measured."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions by package; those that are not installed are left out."""
    versions = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
