"""Pages to read and what is known about them: rendered ones, benchmark folders, plain folders."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from compress.common.files import expand, read_text, walk
from compress.data import olmocr_bench, omnidocbench
from compress.data.fonts import UNSEEN_FONT
from compress.data.page_files import OcrPage, import_pypdfium2, is_page_file, pages_of, pdf_page
from compress.data.pages import PAGE, SQUARE_PAGE, Difficulty, Page, page
from compress.data.pixels import open_image

logger = logging.getLogger(__name__)

# name after "builtin:" -> what the pages look like
RENDERED = {"pages": PAGE, "square-pages": SQUARE_PAGE}
PDF_LONGEST_SIDE = 1288  # pixels: what olmOCR renders its own pages to


@dataclass(frozen=True)
class OcrData:
    """Pages to read, and the annotations by which they are scored.

    Parameters
    ----------
    source : where they come from.
    pages : at least one.
    annotations : OmniDocBench's pages or olmOCR-bench's tests; None for pages with texts.
    """

    source: str
    pages: tuple[OcrPage, ...]
    annotations: "tuple[omnidocbench.Page, ...] | olmocr_bench.Bench | None" = None


def load_pages(
    source: str,
    samples: int = 64,
    unseen_font: bool = True,
) -> OcrData:
    """Find the pages that a source names.

    Parameters
    ----------
    source : ``builtin:pages`` or ``builtin:square-pages``, rendered pages of the test split and as
        many again in the unseen font; or a folder: of OmniDocBench, of olmOCR-bench, or of images
        and PDFs with a ``.txt`` or ``.md`` of the same name beside each, its pages separated by
        form feeds.
    samples : rendered pages of each kind; a folder is read as a whole.
    unseen_font : whether rendered pages come in the unseen font, too.

    Raises
    ------
    ValueError : for an unknown source, a folder in none of the layouts, or pages without text.
    FileNotFoundError : when the folder does not exist.
    MissingExtraError : without matplotlib for rendered pages, or pypdfium2 for PDFs.
    """
    kind, _, name = source.partition(":")
    if kind == "builtin":
        if name not in RENDERED:
            known = ", ".join(f"builtin:{n}" for n in RENDERED)
            raise ValueError(f"built-in pages are {known}; got {source!r}; name one of them")
        return OcrData(source, tuple(_rendered(RENDERED[name], samples, unseen_font)))
    folder = expand(source.removeprefix("folder:"))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"pages expected in the folder {folder}, which does not exist; give builtin:pages or a "
            "folder"
        )
    if (folder / omnidocbench.ANNOTATIONS).is_file():
        annotated = omnidocbench.read_omnidocbench(folder)
        opened = [
            OcrPage(p.image, partial(open_image, folder / "images" / p.image)) for p in annotated
        ]
        return OcrData(source, tuple(opened), tuple(annotated))
    if (folder / olmocr_bench.PDFS).is_dir():
        bench = olmocr_bench.read_olmocr_bench(folder)
        if not all(bench.image(place).is_file() for place in bench.pages):
            import_pypdfium2()  # a missing one is found before the first page is read
        documents = [
            OcrPage(page_name(place), partial(_bench_image, bench, place)) for place in bench.pages
        ]
        return OcrData(source, tuple(documents), bench)
    return OcrData(source, tuple(_pairs(folder)))


def page_name(place: olmocr_bench.PageId) -> str:
    """How a page of a PDF is called."""
    return f"{place[0]} page {place[1]}"


def _rendered(difficulty: Difficulty, samples: int, unseen_font: bool) -> Iterator[OcrPage]:
    unseen = replace(difficulty, fonts=(UNSEEN_FONT,))
    for form, other in ((difficulty, False), (unseen, True))[: 1 + unseen_font]:
        for index in range(samples):
            name = f"{'unseen font ' if other else ''}{index:04}"
            yield rendered_page(name, index, form, "test", other)


def rendered_page(
    name: str, index: int, difficulty: Difficulty, split: str, unseen_font: bool = False
) -> OcrPage:
    """A page that is drawn again whenever it is opened: many of them hold no image."""

    def drawn() -> Page:
        return page(0, index, difficulty, split)

    return OcrPage(
        name, lambda: drawn().image, drawn().text, unseen_font, size=lambda: difficulty.size
    )


def _bench_image(bench: olmocr_bench.Bench, place: olmocr_bench.PageId) -> Image.Image:
    """The lossless image beside a PDF, or the PDF's page, rendered."""
    if bench.image(place).is_file():
        return open_image(bench.image(place))
    path = bench.folder / olmocr_bench.PDFS / place[0]
    return pdf_page(path, place[1], longest=PDF_LONGEST_SIDE)


def _pairs(folder: Path) -> Iterator[OcrPage]:
    """Images and PDFs with a text of the same name beside each."""
    files = walk(folder)
    texts = {path for path in files if path.suffix in (".txt", ".md")}
    pages = [path for path in files if path not in texts and is_page_file(path)]
    if not pages:
        raise ValueError(
            f"{folder} should hold pages: {omnidocbench.ANNOTATIONS} with images/ (OmniDocBench), "
            f"*.jsonl with {olmocr_bench.PDFS}/ (olmOCR-bench), or images and PDFs with a .txt or "
            ".md beside each; it holds none of these; check the path"
        )
    described = {text.with_suffix("") for text in texts}
    others = [p for p in files if p not in texts | set(pages) and p.with_suffix("") in described]
    if others:
        logger.warning(
            "left out, as no image or PDF: %d files with a text beside them, such as %s",
            len(others),
            others[0],
        )
    taken: dict[Path, Path] = {}
    for path in pages:
        beside = [p for s in (".txt", ".md") if (p := path.with_suffix(s)) in texts]
        if len(beside) != 1:
            raise ValueError(
                f"{path} should have its text beside it, as {path.stem}.txt or {path.stem}.md; "
                f"found {len(beside)} of them; write one"
            )
        if (other := taken.setdefault(beside[0], path)) != path:
            raise ValueError(
                f"{beside[0]} should be the text of one file; {other} and {path} lie beside it; "
                "move one of them away"
            )
        inside = pages_of(path, path.relative_to(folder).as_posix())
        # a form feed ends a page, as pdftotext and tesseract write it
        whole = read_text(beside[0]).removesuffix("\f")
        parts = whole.split("\f") if len(inside) > 1 else [whole]
        if len(parts) != len(inside):
            raise ValueError(
                f"{beside[0]} should have the texts of the {len(inside)} pages of {path}, with a "
                f"form feed (U+000C) between two; it has {len(parts)}; split the one or the other"
            )
        for one, text in zip(inside, parts, strict=True):
            yield replace(one, text=text)
