"""Open a reader, and read image files with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compress.checkpoints.applied import Applied
from compress.checkpoints.runtime import load_runtime
from compress.common.environment import choose_device
from compress.data.pixels import open_image
from compress.eval.settings import ReadSettings
from compress.methods.base import RuntimeMethod
from compress.models.deepseek_ocr_processor import with_mode
from compress.models.locate import ModelFolder, locate
from compress.models.reading import read_pages


def open_reader(
    at: ModelFolder, settings: ReadSettings, device: str
) -> tuple[Any, Any, tuple[RuntimeMethod, ...]]:
    """A reader on its device, its processor, and the methods of its checkpoint, not applied yet."""
    model, processor, methods = load_runtime(at, getattr(torch, settings.dtype))
    model.to(device)
    return model, with_mode(processor, settings.mode), methods


def read_files(
    model: str | Path | ModelFolder,
    pages: Sequence[Path],
    settings: ReadSettings | None = None,
    *,
    device: str | None = None,
) -> list[str]:
    """Read image files one by one; the same as ``compress read``.

    Parameters
    ----------
    model : ``builtin:NAME``, a folder, a hub id, or a runtime checkpoint with its methods.
    pages : image files.
    settings : how they are read.
    device : CUDA where there is any when None.

    Raises
    ------
    ValueError, FileNotFoundError : for a model or an image that cannot be used.
    """
    settings = settings or ReadSettings()
    images = [open_image(path) for path in pages]
    where = choose_device(device)
    network, processor, methods = open_reader(locate(model, "reader"), settings, where)
    if methods:
        Applied(network, methods)  # the network holds it
    limits = settings.prompt, settings.max_new_tokens
    return [read_pages(network, processor, [image], *limits)[0].text for image in images]
