"""Files that hold pages: images, PDFs and folders of both, each page opened when it is needed."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from compress.common.extras import extra
from compress.common.files import walk
from compress.data.pixels import FRAMED, check_size, frame_count, is_image, open_image

MOST_DPI = 4_800
DPI = 144.0  # at which DeepSeek-OCR's own script renders a PDF


@dataclass(frozen=True)
class OcrPage:
    """A page to read.

    Parameters
    ----------
    name : of the page in this set, and of its prediction.
    open : gives the image.
    text : what stands on it; None where a benchmark has tests instead, or nobody knows.
    unseen_font : whether it is set in the font that no training page has.
    """

    name: str
    open: Callable[[], Image.Image]
    text: str | None = None
    unseen_font: bool = False


def find_pages(
    paths: Sequence[str | Path], numbers: str | None = None, dpi: float = DPI
) -> list[OcrPage]:
    """The pages of files and folders, in their order; no image is held.

    Parameters
    ----------
    paths : images, PDFs, and folders of both, nested as they like.
    numbers : of the pages that are taken of each PDF, TIFF and GIF, such as "1-3,7" or "5-"; all
        when None. Of the other images there is one page, which is taken.
    dpi : at which a PDF is rendered.

    Raises
    ------
    FileNotFoundError : when a path does not exist.
    ValueError : for a resolution beyond use, a folder without pages, numbers that cannot be read,
        or a page that a file does not have. A damaged file is one page, whose opening raises.
    MissingExtraError : without pypdfium2 for PDFs.
    """
    if not 1 <= dpi <= MOST_DPI:
        raise ValueError(f"dpi should be from 1 to {MOST_DPI}; got {dpi}; choose another")
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in walk(path) if is_page_file(file)]
            if not inside:
                raise ValueError(
                    f"{path} should hold page images or PDFs; it holds none; check the path"
                )
            files.update(dict.fromkeys(inside))
        elif path.exists():
            files[path] = None
        else:
            raise FileNotFoundError(
                f"an image, a PDF or a folder of them is expected at {path}; there is no such "
                "file; check the path"
            )
    every: list[tuple[int, int | None]] = [(1, None)]
    ranges = every if numbers is None else _ranges(numbers)
    if numbers is not None and not any(map(_may_have_pages, files)):
        raise ValueError(
            f"PDFs, TIFFs or GIFs are expected where pages are chosen ({numbers}); got none; leave "
            "the numbers out"
        )
    return [
        page
        for file in files
        for page in pages_of(file, str(file), ranges if _may_have_pages(file) else every, dpi)
    ]


def is_page_file(path: Path) -> bool:
    """Whether a file is an image or a PDF."""
    return is_pdf(path) or is_image(path)


def is_pdf(path: Path) -> bool:
    """Whether a file is a PDF, by its suffix."""
    return path.suffix.lower() == ".pdf"


def _may_have_pages(path: Path) -> bool:
    return is_pdf(path) or path.suffix.lower() in FRAMED


def pages_of(
    path: Path,
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
    try:
        count = pdf_page_count(path) if is_pdf(path) else 1
        if path.suffix.lower() in FRAMED:
            count = frame_count(path)
    except (ValueError, OSError):
        count = 1  # what is wrong, its opening says
    beyond = [n for first, last in ranges for n in (first, last or first) if n > count]
    if beyond:
        raise ValueError(
            f"{path} has {count} page{'s' * (count > 1)}, and page {beyond[0]} is asked for; "
            "choose others, or leave the last number away (2-)"
        )
    chosen = [n for n in range(1, count + 1) if any(a <= n <= (b or count) for a, b in ranges)]
    if is_pdf(path):
        return [OcrPage(f"{name}, page {n}", partial(pdf_page, path, n, dpi)) for n in chosen]
    named = count > 1
    return [
        OcrPage(f"{name}, page {n}" if named else name, partial(open_image, path, frame=n - 1))
        for n in chosen
    ]


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


def text_files(pages: Sequence[OcrPage]) -> dict[str, Path]:
    """Where the text of each page goes below a folder, by its name: laid out as the files are."""
    split = [re.fullmatch(r"(.*?)(?:, page ([0-9]+))?", page.name, re.DOTALL) for page in pages]
    files = [Path(os.path.abspath(match[1])) for match in split if match]
    common = os.path.commonpath([file.parent for file in files]) if files else ""
    named: dict[Path, str] = {}
    for page, file, match in zip(pages, files, split, strict=True):
        number = f"_page_{match[2]}" if match and match[2] else ""
        target = file.relative_to(common).with_name(f"{file.stem}{number}.md")
        if (other := named.setdefault(target, page.name)) != page.name:
            raise ValueError(
                f"each page should have a file of its own; {other} and {page.name} would both "
                f"become {target}; read them into folders of their own"
            )
    return {name: target for target, name in named.items()}


def pdf_page_count(path: Path) -> int:
    """Number of pages of a PDF."""
    with _pdf(path) as document:
        return len(document)


def pdf_page(
    path: Path, number: int, dpi: float | None = None, longest: int | None = None
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
            raise ValueError(
                f"{path} should have a page {number}; it has {len(document)} pages; correct "
                "the tests or the file"
            )
        sheet = document[number - 1]
        width, height = sheet.get_size()  # in points
        scale = longest / max(width, height) if longest else (dpi or DPI) / 72
        # nothing is drawn yet
        check_size(round(width * scale), round(height * scale), f"page {number} of {path}")
        return sheet.render(scale=scale).to_pil().convert("RGB")


@contextlib.contextmanager
def _pdf(path: Path) -> Iterator[Any]:
    pypdfium2 = import_pypdfium2()
    try:
        with pypdfium2.PdfDocument(path) as document:
            yield document
    except pypdfium2.PdfiumError as error:
        raise ValueError(
            f"{path} should be a PDF without a password; {error}; restore the file"
        ) from error


def import_pypdfium2() -> Any:
    """The package that renders PDFs."""
    with extra("data", "rendering a PDF"):
        import pypdfium2
    return pypdfium2
