"""Load what compress wrote, or any model that it serves."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.checkpoints.applied import Applied
from compress.checkpoints.facts import verify, warn_unverified
from compress.checkpoints.runtime import load_runtime, runtime_facts
from compress.models.loading import load_pipeline
from compress.models.locate import ModelFolder, locate
from compress.models.reading import Reading, read_pages

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image


class Reader(NamedTuple):
    """A vision-language model with what it needs to read.

    Attributes
    ----------
    model : of transformers.
    processor : its tokenizer and image processor.
    applied : the methods on the model; None for a dense one.
    """

    model: Any
    processor: Any
    applied: Applied | None

    def read(
        self,
        images: "Sequence[Image.Image]",
        prompt: str | None = None,
        max_new_tokens: int | None = None,
    ) -> "list[Reading]":
        """Transcribe pages; see :func:`compress.read_pages`."""
        return read_pages(self.model, self.processor, images, prompt, max_new_tokens)


def load(
    model: str | Path | ModelFolder,
    *,
    dtype: "torch.dtype | None" = None,
    device: "torch.device | str | None" = None,
) -> "DiffusionPipeline | Reader":
    """Load a checkpoint of ours, or any model that compress serves.

    Parameters
    ----------
    model : a folder, ``builtin:NAME`` or a hub id.
    dtype : of a reader's weights; float32 when None. Pipelines are loaded in float32.
    device : where to; the CPU when None.

    Returns
    -------
    A diffusers pipeline; or a `Reader`, whose ``applied`` holds a runtime checkpoint's methods.

    Raises
    ------
    ValueError : naming the file whose content is not what was saved.
    FileNotFoundError : naming what is missing.
    """
    at = locate(model)
    if at.kind == "reader":
        return load_reader(at, dtype=dtype, device=device)
    facts = verify(at.folder)
    pipeline = load_pipeline(at)
    if facts is None:
        warn_unverified(at)
    return pipeline if device is None else pipeline.to(device)


def load_reader(
    model: str | Path | ModelFolder,
    *,
    dtype: "torch.dtype | None" = None,
    device: "torch.device | str | None" = None,
) -> Reader:
    """Load a vision-language model with its processor, and with the methods of its checkpoint.

    Of any family: where a checkpoint's model has no adapter the methods try the model on its first
    prompt, or refuse. Parameters and errors as for :func:`load`.
    """
    at = locate(model, "reader")
    network, processor, methods = load_runtime(at, dtype, adapter=runtime_facts(at.folder) is None)
    if device is not None:
        network.to(device)
    return Reader(network, processor, Applied(network, methods, processor) if methods else None)
