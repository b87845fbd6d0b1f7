"""Open a reader, and read pages with it: a few in memory, or millions into a folder.

A folder of texts has a file of JSON lines for each process, a row for each page, which is all that
``resume`` needs: it may go on with another number of processes. Pages are shared out by their
places among the sources, so processes need nothing of each other until the end.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from compress.checkpoints.applied import Applied
from compress.checkpoints.runtime import base_model, load_runtime
from compress.common.environment import choose_device
from compress.common.files import append_rows, drop_torn_line, sync, write_text
from compress.common.foreign import foreign, reason
from compress.common.output_folder import TEXTS, check_apart, recorded_folder
from compress.data.page_files import OcrPage, absolute, common_root, find_pages, text_file
from compress.data.pages import DOCUMENT, LINE, PAGE, SQUARE_PAGE
from compress.eval.settings import PageFiles, ReadSettings
from compress.methods.base import Event, RuntimeMethod
from compress.models.deepseek_ocr_processor import with_mode
from compress.models.locate import ModelFolder, locate
from compress.models.reading import OPENER_KILLED, Reading, check_of_a_page, try_pages
from compress.models.visual import adapter_for
from compress.parallel import distributed

logger = logging.getLogger(__name__)

RENDERED_SIZES = {kind.size for kind in (LINE, PAGE, SQUARE_PAGE, DOCUMENT)}
WINDOW = 256  # pages of a process among which those of like size are put together
LIKE = 2  # a batch decodes until its longest text ends: no page has so many times another's tokens
RECORDS = "pages-[0-9][0-9][0-9][0-9].jsonl"


# ---- a reader, and batches of pages --------------------------------------------------------------


def open_reader(
    at: ModelFolder, settings: ReadSettings, device: str
) -> tuple[Any, Any, tuple[RuntimeMethod, ...]]:
    """A reader on its device, its processor, and the methods of its checkpoint, not applied yet."""
    model, processor, methods = load_runtime(at, getattr(torch, settings.dtype))
    model.to(device)
    return model, with_mode(processor, settings.mode), methods


def as_known(at: ModelFolder) -> Callable[[Sequence[OcrPage]], list[OcrPage]]:
    """What makes pages say so, once, when a built-in reader opens one unlike its training pages."""
    base = base_model(at)
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

    def known(pages: Sequence[OcrPage]) -> list[OcrPage]:
        if not base.startswith("builtin:"):
            return list(pages)
        return [replace(page, open=partial(opened, page)) for page in pages]

    return known


def in_batches(pages: Iterable[OcrPage], size: int) -> Iterator[list[OcrPage]]:
    """Pages in their order, so many at a time."""
    rest = iter(pages)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def by_tokens(
    pages: Iterable[OcrPage], budget: int, count: Callable[[OcrPage], int]
) -> Iterator[list[OcrPage]]:
    """Pages of like size together, as many as stay within a budget once they are padded.

    Parameters
    ----------
    pages : of which ``WINDOW`` at a time are sorted; the largest of a batch has at most ``LIKE``
        times the tokens of the smallest.
    budget : visual tokens of a batch: those of its largest page times its pages. A page that has
        more is a batch of its own.
    count : visual tokens of a page.
    """
    for window in in_batches(pages, WINDOW):
        batch: list[OcrPage] = []
        fewest = 0
        for tokens, _, page in sorted((count(page), i, page) for i, page in enumerate(window)):
            if batch and (tokens * (len(batch) + 1) > budget or tokens > LIKE * fewest):
                yield batch
                batch = []
            fewest = tokens if not batch else fewest
            batch.append(page)
        yield batch


def token_counter(model: Any, processor: Any) -> Callable[[OcrPage], int]:
    """What gives the visual tokens of a page from its size; 0 where that cannot be known."""
    count = adapter_for(model.config).tokens

    def tokens(page: OcrPage) -> int:
        try:
            return count(processor, *page.size()) if page.size else 0
        except (ValueError, OSError):  # its opening says what is wrong
            return 0

    return tokens


class _Opened(Dataset[list[OcrPage]]):
    """Batches of pages by themselves, with their images."""

    def __getitem__(self, pages: Any) -> list[OcrPage]:
        return [replace(page, open=_opening(page), size=None) for page in pages]


def _opening(page: OcrPage) -> Callable[[], Image.Image]:
    try:
        return partial(_given, page.open())
    except (ValueError, OSError) as error:
        return partial(_given, None, str(error))


def _given(image: Image.Image | None, error: str = "") -> Image.Image:
    if image is None:
        raise ValueError(error)
    return image


def opened_ahead(batches: Iterable[list[OcrPage]], workers: int) -> Iterator[list[OcrPage]]:
    """Batches whose pages other processes open while the model reads; of two a process at most.

    Parameters
    ----------
    batches : of pages.
    workers : number of processes; 0 opens pages here, when it is their turn.
    """
    loader: DataLoader[list[OcrPage]] = DataLoader(
        _Opened(), batch_size=None, sampler=batches, num_workers=workers, collate_fn=list
    )
    yield from loader


@contextmanager
def openers_watched() -> Iterator[None]:
    """Say what to do where a process that opens pages was killed.

    Raises
    ------
    OSError : in place of what torch raises.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(OPENER_KILLED):
            raise
        raise OSError(
            "a process that opens pages was killed, perhaps for lack of memory; go on with "
            "--resume, and fewer --workers or pages in a batch"
        ) from error


def read_batch(
    model: Any, processor: Any, pages: Sequence[OcrPage], settings: ReadSettings
) -> list[Reading]:
    """Read pages as one batch, or one by one where that fails; see :func:`try_pages`."""
    try:
        return try_pages(model, processor, pages, **settings.generation)
    except Exception as error:  # a model raises whatever it likes, and no page ends the job
        check_of_a_page(error)
        if len(pages) == 1:
            return [Reading("", 0, 0, False, f"{pages[0].name}: {reason(error)}")]
    return [one for page in pages for one in read_batch(model, processor, [page], settings)]


def read_pages_of(
    at: ModelFolder, pages: Iterable[OcrPage], settings: ReadSettings, files: PageFiles, device: str
) -> Iterator[tuple[list[tuple[OcrPage, Reading]], float]]:
    """Open a model, read pages with it, and yield those of each batch with its seconds."""
    network, processor, methods = open_reader(at, settings, device)
    known = as_known(at)
    if methods:
        Applied(network, methods)  # the network holds it
    if files.batch_tokens:
        batches = by_tokens(pages, files.batch_tokens, token_counter(network, processor))
    else:
        batches = in_batches(pages, files.batch)
    for opened in opened_ahead(batches, files.workers):
        begun = time.perf_counter()
        readings = read_batch(network, processor, known(opened), settings)
        yield list(zip(opened, readings, strict=True)), time.perf_counter() - begun


def read_files(
    model: str | Path | ModelFolder,
    pages: Iterable[OcrPage],
    settings: ReadSettings | None = None,
    *,
    batch: int = 1,
    device: str | None = None,
) -> Iterator[tuple[OcrPage, Reading]]:
    """Read pages, and yield each with what was read; the same as ``compress read`` to stdout.

    Parameters
    ----------
    model : ``builtin:NAME``, a folder, a hub id, or a runtime checkpoint with its methods.
    pages : of :func:`compress.data.page_files.find_pages`, opened a batch at a time.
    settings : how they are read.
    batch : pages that are read together.
    device : CUDA where there is any when None.

    Raises
    ------
    ValueError, FileNotFoundError : for a model that cannot be used. A page that cannot be read has
        an ``error`` in its reading.
    """
    files = PageFiles(batch=batch, workers=0)
    where, at = choose_device(device), locate(model, "reader")
    for read, _ in read_pages_of(at, pages, settings or ReadSettings(), files, where):
        yield from read


# ---- a folder of texts ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """Which pages a folder of texts has.

    Parameters
    ----------
    done : names of the pages that were read.
    failed : why each of the others could not be read, by name.
    """

    done: set[str]
    failed: dict[str, str]


def read_to_folder(
    model: str | Path | ModelFolder,
    sources: Sequence[str | Path],
    output: Path,
    settings: ReadSettings | None = None,
    files: PageFiles | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
) -> Generator[Event, None, Record]:
    """Read pages into a folder, on all processes that a launcher started, as events.

    The folder gets ``pages-0000.jsonl`` of the first process, and so on, with a row for each page:
    ``page``, ``text``, ``new_tokens``, ``visual_tokens``, ``seconds`` (its share of the batch's),
    ``flags`` (of "empty", "loop" and "truncated") and ``error``. The rows of a batch are on the
    disk before the next one is read. A page with an error is tried again by ``resume``, and gets
    another row if that ends differently.

    Parameters
    ----------
    model : ``builtin:NAME``, a folder, a hub id, or a runtime checkpoint with its methods.
    sources : see :func:`compress.data.page_files.find_pages`.
    output : the folder.
    settings : how pages are read.
    files : which pages, in which batches, and whether each gets a ``.md`` file, too.
    resume : read the pages that have no text yet.
    overwrite : start again.
    device : CUDA where there is any when None.

    Raises
    ------
    ValueError, FileNotFoundError : for a model or sources that cannot be used, or to resume others.
    FileExistsError : when the folder is in use, or holds something that is not to be replaced.
    ConnectionError : when another process ended early.
    """
    settings, files = settings or ReadSettings(), files or PageFiles()
    where = distributed.join(choose_device(device), patience=distributed.NO_LIMIT)
    at, main = locate(model, "reader"), distributed.is_main()
    # pages are called after them, and must be called the same wherever the next sitting begins
    sources = [absolute(one) for one in sources]
    root = common_root(sources)
    facts = {
        **{"model": at.name, "model_hash": at.hash, "sources": sources},
        **files.model_dump(include={"pages", "dpi", "markdown"}),
        "root": str(root),
        **settings.model_dump(mode="json"),
    }

    def written(then: Mapping[str, Any]) -> Iterator[str]:
        for path in output.glob(RECORDS):
            yield path.name
            for row in rows_of(path) if then.get("markdown") else ():
                yield text_file(row["page"], Path(then["root"])).as_posix()

    def begin() -> tuple[int, int]:
        """How many pages there are, and are left."""
        done = _repaired(output, root if files.markdown else None).done
        every = find_pages(sources, files.pages, files.dpi) if done else ()
        return total, sum(page.name not in done for page in every) if done else total

    total = 0
    with distributed.explained():
        if main:
            check_apart(
                output, {"model": at.folder} | {f"source {i}": s for i, s in enumerate(sources, 1)}
            )
            # what is wrong with the sources is said before the folder is touched
            total = _counted(sources, files, root)
        held = recorded_folder(output, TEXTS, facts, written, resume=resume, overwrite=overwrite)
        with held if main else nullcontext():
            total, left = distributed.from_main(begin)
            if left:
                yield from _read_share(at, sources, output, settings, files, where, total, left)
            distributed.wait_for_all()  # none of them writes any more
            return distributed.from_main(lambda: record_of(output))


def _counted(sources: Sequence[str | Path], files: PageFiles, root: Path) -> int:
    """Number of the pages, whose texts must not become one file."""
    texts: dict[Path, str] = {}
    count = 0
    for page in find_pages(sources, files.pages, files.dpi):
        count += 1
        if files.markdown:
            target = text_file(page.name, root)
            if (other := texts.setdefault(target, page.name)) != page.name:
                raise ValueError(
                    f"each page should have a file of its own; {other} and {page.name} would both "
                    f"become {target}; read them into folders of their own"
                )
    return count


def _read_share(
    at: ModelFolder,
    sources: Sequence[str | Path],
    output: Path,
    settings: ReadSettings,
    files: PageFiles,
    device: str,
    total: int,
    left: int,
) -> Iterator[Event]:
    """Read the pages of this process."""
    rank, processes = distributed.process(), distributed.processes()
    before, root = record_of(output), common_root(sources)
    mine = (
        page
        for place, page in enumerate(find_pages(sources, files.pages, files.dpi))
        if place % processes == rank and page.name not in before.done
    )
    path, count, begun = output / f"pages-{rank:04}.jsonl", 0, time.perf_counter()
    with openers_watched():
        for read, seconds in read_pages_of(at, mine, settings, files, device):
            rows = [_row(page, reading, seconds / len(read)) for page, reading in read]
            failed = before.failed
            append_rows(
                path, *(r for r in rows if not r["error"] or r["error"] != failed.get(r["page"]))
            )
            sync(path)
            for row in rows:
                if row["error"]:
                    logger.warning("not read: %s", row["error"])
                elif files.markdown:
                    _write_markdown(output, root, row)
            count += len(rows)
            # of all processes, as if the others were as far as this one
            speed = processes * count / (time.perf_counter() - begun)
            done = min(left, processes * count)
            rates = {"pages_per_second": speed, "seconds_left": (left - done) / speed}
            yield Event("read", total - left + done, total, rates)


def _row(page: OcrPage, reading: Reading, seconds: float) -> dict[str, Any]:
    flags = {
        "empty": not reading.text.strip(),
        "loop": reading.loop,
        "truncated": not reading.ended and not reading.loop,
    }
    return {
        "page": page.name,
        "text": reading.text,
        "new_tokens": reading.new_tokens,
        "visual_tokens": reading.visual_tokens,
        "seconds": round(seconds, 4),
        "flags": [] if reading.error else [name for name, raised in flags.items() if raised],
        "error": reading.error,
    }


def _write_markdown(output: Path, root: Path, row: dict[str, Any]) -> None:
    path = output / text_file(row["page"], root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, row["text"] + "\n")


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, without a last one that is not complete.

    Raises
    ------
    ForeignFileError : naming the line that is no row.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                with foreign(f"{path}, line {number}", "the row of a page", "remove the line"):
                    row = json.loads(line)
                    if not isinstance(row["page"], str) or not {"text", "error"} <= row.keys():
                        raise ValueError("it lacks a page, a text or an error")
                yield row


def record_of(folder: Path) -> Record:
    """Which pages the rows of a folder are of."""
    done: set[str] = set()
    failed: dict[str, str] = {}
    for path in sorted(folder.glob(RECORDS)):
        for row in rows_of(path):
            if row["error"]:
                failed[row["page"]] = row["error"]
            else:
                done.add(row["page"])
    return Record(done, {page: error for page, error in failed.items() if page not in done})


def _repaired(folder: Path, root: Path | None) -> Record:
    """Remove last rows that a kill cut off, and write the ``.md`` files that it left out.

    Parameters
    ----------
    folder : of texts.
    root : of the sources, where there are to be such files.
    """
    for path in folder.glob(RECORDS):
        drop_torn_line(path)
        if root is None:
            continue
        for row in rows_of(path):
            if not row["error"] and not (folder / text_file(row["page"], root)).exists():
                _write_markdown(folder, root, row)
    return record_of(folder)
