"""Open a reader, and read pages with it."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from compress.checkpoints.applied import Applied
from compress.checkpoints.runtime import base_model, load_runtime
from compress.common.environment import choose_device
from compress.common.files import write_text
from compress.common.output_folder import TEXTS, listed_folder
from compress.data.page_files import OcrPage, text_files
from compress.data.pages import DOCUMENT, LINE, PAGE, SQUARE_PAGE
from compress.eval.settings import ReadSettings
from compress.methods.base import RuntimeMethod
from compress.models.deepseek_ocr_processor import with_mode
from compress.models.locate import ModelFolder, locate
from compress.models.reading import Reading, try_pages

logger = logging.getLogger(__name__)

RENDERED_SIZES = {kind.size for kind in (LINE, PAGE, SQUARE_PAGE, DOCUMENT)}


def open_reader(
    at: ModelFolder, settings: ReadSettings, device: str
) -> tuple[Any, Any, tuple[RuntimeMethod, ...]]:
    """A reader on its device, its processor, and the methods of its checkpoint, not applied yet."""
    model, processor, methods = load_runtime(at, getattr(torch, settings.dtype))
    model.to(device)
    return model, with_mode(processor, settings.mode), methods


def as_known(at: ModelFolder, pages: Sequence[OcrPage]) -> list[OcrPage]:
    """Pages that say so, once, when a built-in reader opens one unlike those it was trained on."""
    base = base_model(at)
    if not base.startswith("builtin:"):
        return list(pages)
    warned: list[str] = []

    def opened(page: OcrPage) -> Image.Image:
        image = page.open()
        if image.size not in RENDERED_SIZES and not warned:
            warned.append(page.name)
            logger.warning(
                "%s was trained on small rendered pages alone; %s has %dx%d pixels, and what it "
                "reads there means nothing; name another model for pages of your own",
                *(base, page.name, *image.size),
            )
        return image

    return [replace(page, open=partial(opened, page)) for page in pages]


def read_files(
    model: str | Path | ModelFolder,
    pages: Sequence[OcrPage],
    settings: ReadSettings | None = None,
    *,
    batch: int = 1,
    output: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
) -> Iterator[tuple[OcrPage, Reading]]:
    """Read pages, and yield each with what was read; the same as ``compress read``.

    Parameters
    ----------
    model : ``builtin:NAME``, a folder, a hub id, or a runtime checkpoint with its methods.
    pages : of :func:`compress.data.page_files.find_pages`, opened a batch at a time.
    settings : how they are read.
    batch : pages that are read together.
    output : folder that gets a ``.md`` file for each page, as soon as it is read.
    resume : read the pages that have no file yet, and yield those alone.
    overwrite : start again.
    device : CUDA where there is any when None.

    Raises
    ------
    ValueError, FileNotFoundError : for a model that cannot be used. A page that cannot be read has
        an ``error`` in its reading, and no file.
    FileExistsError : when ``output`` is in use, or holds something that is not to be replaced.
    """
    settings = settings or ReadSettings()
    where = choose_device(device)
    at = locate(model, "reader")
    if output is None:
        yield from _read(at, pages, settings, batch, where)
        return
    names = {name: path.as_posix() for name, path in text_files(pages).items()}
    files = {path: name for name, path in names.items()}
    facts = {"model": at.name, "model_hash": at.hash, **settings.model_dump(mode="json")}
    with listed_folder(output, TEXTS, files, facts, resume=resume, overwrite=overwrite) as done:
        left = [page for page in pages if names[page.name] not in done]
        for page, reading in _read(at, left, settings, batch, where) if left else ():
            if not reading.error:
                path = output / names[page.name]
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, reading.text + "\n")
            yield page, reading


def _read(
    at: ModelFolder, pages: Sequence[OcrPage], settings: ReadSettings, batch: int, device: str
) -> Iterator[tuple[OcrPage, Reading]]:
    network, processor, methods = open_reader(at, settings, device)
    pages = as_known(at, pages)
    if methods:
        Applied(network, methods)  # the network holds it
    for first in range(0, len(pages), batch):
        chosen = pages[first : first + batch]
        readings = try_pages(network, processor, chosen, **settings.generation)
        yield from zip(chosen, readings, strict=True)
