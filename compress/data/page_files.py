"""Files that hold pages: images, PDFs, folders, archives, lists; each opened when it is needed."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from compress.common.extras import extra
from compress.common.files import json_lines, walk
from compress.common.foreign import ForeignFileError, foreign
from compress.data.page_archives import HUB, Damaged, hub_rows, members
from compress.data.pixels import (
    FRAMED,
    IMAGE_SUFFIXES,
    Stored,
    check_size,
    frame_count,
    image_size,
    is_image,
    open_image,
)

MOST_DPI = 4_800
DPI = 144.0  # at which DeepSeek-OCR's own script renders a PDF


@dataclass(frozen=True)
class OcrPage:
    """A page to read.

    Parameters
    ----------
    name : of the page in this set, and of its prediction.
    open : gives the image.
    text : what stands on it; None where a benchmark has tests instead, or it is not known.
    unseen_font : whether it is set in the font that no training page has.
    size : gives width and height in pixels and decodes nothing; None where they are not needed.
    """

    name: str
    open: Callable[[], Image.Image]
    text: str | None = None
    unseen_font: bool = False
    size: Callable[[], tuple[int, int]] | None = None


def find_pages(
    sources: Sequence[str | Path], numbers: str | None = None, dpi: float = DPI
) -> Iterator[OcrPage]:
    """The pages of sources, in their order and one by one: there may be millions.

    Parameters
    ----------
    sources : images, PDFs, WebDataset shards (``.tar``, not compressed), folders of these, nested
        as they like; lists of paths, a ``.jsonl`` with a path or an object with "path" in each
        line, from the list's own folder; or ``hub:NAME``, the train split of a data set.
    numbers : of the pages that are taken of each PDF, TIFF and GIF, such as "1-3,7" or "5-"; all
        when None. Of the other images there is one page, which is taken.
    dpi : at which a PDF is rendered.

    Raises
    ------
    FileNotFoundError : when a source does not exist.
    ValueError : for a resolution beyond use, a folder without pages, numbers that cannot be read,
        or a list that is none. A damaged file, one that a list names in vain, and the first page of
        a range that a file does not have are one page each, whose opening raises.
    MissingExtraError : without pypdfium2 for PDFs, or `datasets` for the hub.
    """
    if not 1 <= dpi <= MOST_DPI:
        raise ValueError(f"dpi should be from 1 to {MOST_DPI}; got {dpi}; choose another")
    every: list[tuple[int, int | None]] = [(1, None)]
    ranges = every if numbers is None else _ranges(numbers)
    several = False
    for file in _files(sources):
        several = several or _may_have_pages(file)
        taken = ranges if _may_have_pages(file) else every
        yield from pages_of(file, str(file), taken, dpi)
    if numbers is not None and not several:
        raise ValueError(
            f"PDFs, TIFFs or GIFs are expected where pages are chosen ({numbers}); got none; leave "
            "the numbers out"
        )


def _files(sources: Sequence[str | Path]) -> Iterator[Stored]:
    """The files of sources, each once, however many ways lead to it."""
    seen: set[str] = set()
    for source in dict.fromkeys(map(str, sources)):
        path = Path(source)
        if source.startswith(HUB):
            yield from hub_rows(source)
        elif path.is_dir():
            inside = [file for file in walk(path) if is_page_file(file) or _is_archive(file)]
            if not inside:
                raise ValueError(
                    f"{path} should hold page images or PDFs; it holds none; check the path"
                )
            yield from itertools.chain.from_iterable(map(_inside, _new(inside, seen)))
        elif not path.exists():
            raise FileNotFoundError(
                f"an image, a PDF or a folder of them is expected at {path}; there is no such "
                "file; check the path"
            )
        else:
            listed = _listed(path) if path.suffix.lower() == ".jsonl" else [path]
            yield from itertools.chain.from_iterable(map(_inside, _new(listed, seen)))


def _new(paths: Iterable[Path], seen: set[str]) -> Iterator[Path]:
    """Those whose real path was not seen yet."""
    for path in paths:
        try:
            real = os.path.realpath(path)
        except ValueError:  # no file can be called so, which its opening says
            real = str(path)
        if real not in seen:
            seen.add(real)
            yield path


def _inside(path: Path) -> Iterator[Stored]:
    """A file, or those of an archive; one that is damaged stands for what it no longer gives."""
    if not _is_archive(path):
        yield path
        return
    try:
        yield from (file for file in members(path) if is_pdf(file) or _has_image_name(file))
    except (ValueError, OSError) as error:
        yield Damaged(str(path), str(error))


def _listed(path: Path) -> list[Path]:
    """The paths of a list."""
    paths = []
    for number, line in json_lines(path):
        with foreign(f"{path}, line {number}", "a path, or an object with a path", "correct it"):
            content = json.loads(line)
            paths.append(path.parent / (content["path"] if isinstance(content, dict) else content))
    return paths


def _is_archive(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def _has_image_name(file: Stored) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def is_page_file(path: Stored) -> bool:
    """Whether a file is an image or a PDF."""
    return is_pdf(path) or is_image(path)


def is_pdf(path: Stored) -> bool:
    """Whether a file is a PDF, by its suffix."""
    return path.suffix.lower() == ".pdf"


def _may_have_pages(path: Stored) -> bool:
    return is_pdf(path) or path.suffix.lower() in FRAMED


def pages_of(
    path: Stored,
    name: str,
    ranges: Sequence[tuple[int, int | None]] = ((1, None),),
    dpi: float = DPI,
) -> list[OcrPage]:
    """The pages of one file: of a PDF, or the frames of a TIFF or GIF.

    Parameters
    ----------
    path : of the file.
    name : of the file in the names of its pages.
    ranges : first and last number of the pages that are taken; to the end where the last is None.
    dpi : at which a PDF is rendered.
    """
    begin = min(first for first, _ in ranges)
    try:
        count = frame_count(path) if path.suffix.lower() in FRAMED else 1
        if is_pdf(path):
            with _pdf(path) as document:
                count = len(document)
    except (ValueError, OSError):  # what is wrong, the opening of its first page says
        count = begin
        ranges = [(count, count)]
    chosen = [n for n in range(begin, count + 1) if any(a <= n <= (b or count) for a, b in ranges)]
    beyond = {max(first, count + 1) for first, last in ranges if (last or first) > count}
    absent = [
        Damaged(
            f"{name}, page {n}",
            f"{path} has {count} page{'s' * (count != 1)}, and page {n} is asked for; choose "
            "others, or leave the last number away (2-)",
        )
        for n in sorted(beyond)
    ]
    missing = [OcrPage(page.name, partial(open_image, page)) for page in absent]
    if is_pdf(path):
        return [
            OcrPage(
                f"{name}, page {n}",
                partial(pdf_page, path, n, dpi),
                size=partial(_pdf_page_size, path, n, dpi),
            )
            for n in chosen
        ] + missing
    named = count > 1
    return [
        OcrPage(
            f"{name}, page {n}" if named else name,
            partial(open_image, path, frame=n - 1),
            size=partial(image_size, path, n - 1),
        )
        for n in chosen
    ] + missing


def _ranges(numbers: str) -> list[tuple[int, int | None]]:
    ranges: list[tuple[int, int | None]] = []
    for part in numbers.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:\s*(-)\s*([0-9]*))?\s*", part)
        first = int(match[1]) if match else 0
        last = (int(match[3]) if match[3] else None) if match and match[2] else first
        if not first or (last is not None and last < first):
            raise ValueError(
                f"pages are numbers from 1 and ranges, such as 1-3,7 or 5-; got {numbers!r}"
            )
        ranges.append((first, last))
    return ranges


def text_file(name: str, root: Path) -> Path:
    """Where the text of a page goes below a folder: laid out as the files are below ``root``.

    >>> text_file("/scans/a/doc.pdf, page 2", Path("/scans"))
    PosixPath('a/doc_page_2.md')
    """
    split = re.fullmatch(r"(.*?)(?:, page ([0-9]+))?", name, re.DOTALL)
    whole, number = split.groups() if split else (name, None)
    file = _place(whole)
    # a list may name files anywhere
    below = file.relative_to(root if root in file.parents else file.anchor)
    return below.with_name(f"{file.stem}{f'_page_{number}' if number else ''}.md")


def common_root(sources: Sequence[str | Path]) -> Path:
    """The folder below which the files of sources lie; of data sets where there are no files."""
    files = [source for source in sources if not str(source).startswith(HUB)]
    places = [_place(source) for source in files or sources]
    above = [at if at.is_dir() or not files else at.parent for at in places]
    return Path(os.path.commonpath(above))


def absolute(source: str | Path) -> str:
    """A source by its whole path; a data set of the hub as it is called."""
    return str(source) if str(source).startswith(HUB) else os.path.abspath(source)


def _place(source: str | Path) -> Path:
    """The whole path of a source or a page; of the hub's one that depends on no folder here."""
    return Path(os.path.abspath(os.path.join("/", absolute(source))))


def pdf_page(
    path: Stored, number: int, dpi: float | None = None, longest: int | None = None
) -> Image.Image:
    """Render a page of a PDF.

    Parameters
    ----------
    path : of the file.
    number : of the page, from 1.
    dpi : of the image, :data:`DPI` when None.
    longest : pixels of its longer side, in place of ``dpi``.

    Raises
    ------
    ValueError : when the file cannot be read, has no such page, or one that is too large.
    """
    with _pdf(path) as document:
        if not 1 <= number <= len(document):
            raise ForeignFileError(
                f"{path} should have a page {number}; it has {len(document)} pages; correct "
                "the tests or the file"
            )
        sheet = document[number - 1]
        width, height = sheet.get_size()  # in points
        scale = longest / max(width, height) if longest else (dpi or DPI) / 72
        # nothing is drawn yet
        check_size(round(width * scale), round(height * scale), f"page {number} of {path}")
        return sheet.render(scale=scale).to_pil().convert("RGB")


def _pdf_page_size(path: Stored, number: int, dpi: float) -> tuple[int, int]:
    with _pdf(path) as document:
        width, height = document[number - 1].get_size()
        return round(width * dpi / 72), round(height * dpi / 72)


@contextlib.contextmanager
def _pdf(path: Stored) -> Iterator[Any]:
    pypdfium2 = import_pypdfium2()
    with foreign(str(path), "a PDF without a password"):
        content = path if isinstance(path, Path) else path.open("rb").read()
        with pypdfium2.PdfDocument(content) as document:
            yield document


def import_pypdfium2() -> Any:
    """The package that renders PDFs."""
    with extra("data", "rendering a PDF"):
        import pypdfium2
    return pypdfium2
