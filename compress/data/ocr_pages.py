"""Pages to read and what is known about them: rendered ones, benchmark folders, plain folders."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from compress.common.extras import extra
from compress.data import olmocr_bench, omnidocbench
from compress.data.fonts import UNSEEN_FONT
from compress.data.pages import PAGE, SQUARE_PAGE, Difficulty, page

# name after "builtin:" -> what the pages look like
RENDERED = {"pages": PAGE, "square-pages": SQUARE_PAGE}
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
PDF_LONGEST_SIDE = 1288  # pixels: what olmOCR renders its own pages to


@dataclass(frozen=True)
class OcrPage:
    """A page to read.

    Parameters
    ----------
    name : of the page in this set, and of its prediction.
    open : gives the image.
    text : what stands on it; None where a benchmark has tests instead.
    unseen_font : whether it is set in the font that no training page has.
    """

    name: str
    open: Callable[[], Image.Image]
    text: str | None = None
    unseen_font: bool = False


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
    open_image: Callable[[Path], Image.Image],
    samples: int = 64,
    unseen_font: bool = True,
) -> OcrData:
    """Find the pages that a source names.

    Parameters
    ----------
    source : ``builtin:pages`` or ``builtin:square-pages``, rendered pages of the test split and as
        many again in the unseen font; or a folder: of OmniDocBench, of olmOCR-bench, or of images
        with a ``.txt`` or ``.md`` of the same name beside each.
    open_image : reads an image file.
    samples : rendered pages of each kind; a folder is read as a whole.
    unseen_font : whether rendered pages come in the unseen font, too.

    Raises
    ------
    ValueError : for an unknown source, a folder in none of the layouts, or images without text.
    FileNotFoundError : when the folder does not exist.
    MissingExtraError : without matplotlib for rendered pages, or pypdfium2 for PDFs.
    """
    kind, _, name = source.partition(":")
    if kind == "builtin":
        if name not in RENDERED:
            known = ", ".join(f"builtin:{n}" for n in RENDERED)
            raise ValueError(f"built-in pages are {known}; got {source!r}; name one of them")
        pages = _rendered(RENDERED[name], samples)
        return OcrData(source, tuple(p for p in pages if unseen_font or not p.unseen_font))
    folder = Path(source.removeprefix("folder:")).expanduser()
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
            _import_pypdfium2()  # a missing one is found before the first page is read
        documents = [
            OcrPage(page_name(place), partial(_bench_image, bench, place, open_image))
            for place in bench.pages
        ]
        return OcrData(source, tuple(documents), bench)
    return OcrData(source, tuple(_pairs(folder, open_image)))


def page_name(place: olmocr_bench.PageId) -> str:
    """How a page of a PDF is called."""
    return f"{place[0]} page {place[1]}"


def _rendered(difficulty: Difficulty, samples: int) -> Iterator[OcrPage]:
    unseen = replace(difficulty, fonts=(UNSEEN_FONT,))
    for form, other in ((difficulty, False), (unseen, True)):
        for index in range(samples):
            made = page(0, index, form, "test")
            name = f"{'unseen font ' if other else ''}{index:04}"
            yield OcrPage(name, partial(_same, made.image), made.text, other)


def _same(image: Image.Image) -> Image.Image:
    return image


def _bench_image(
    bench: olmocr_bench.Bench, place: olmocr_bench.PageId, open_image: Callable[[Path], Image.Image]
) -> Image.Image:
    """The lossless image beside a PDF, or the PDF's page, rendered."""
    if bench.image(place).is_file():
        return open_image(bench.image(place))
    return pdf_page(bench.folder / olmocr_bench.PDFS / place[0], place[1])


def pdf_page(path: Path, number: int) -> Image.Image:
    """Render a page of a PDF, its longest side ``PDF_LONGEST_SIDE`` pixels.

    Parameters
    ----------
    path : of the file.
    number : of the page, from 1.

    Raises
    ------
    ValueError : when the file cannot be read or has no such page.
    """
    pypdfium2 = _import_pypdfium2()
    try:
        with pypdfium2.PdfDocument(path) as document:
            if not 1 <= number <= len(document):
                raise ValueError(
                    f"{path} should have a page {number}; it has {len(document)} pages; correct "
                    "the tests or the file"
                )
            sheet = document[number - 1]
            scale = PDF_LONGEST_SIDE / max(sheet.get_size())
            return sheet.render(scale=scale).to_pil().convert("RGB")
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"{path} should be a PDF; {error}; restore the file") from error


def _import_pypdfium2() -> Any:
    with extra("data", "rendering a PDF"):
        import pypdfium2
    return pypdfium2


def _pairs(folder: Path, open_image: Callable[[Path], Image.Image]) -> Iterator[OcrPage]:
    """Images with a text of the same name beside each."""
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not images:
        raise ValueError(
            f"{folder} should hold pages: {omnidocbench.ANNOTATIONS} with images/ (OmniDocBench), "
            f"*.jsonl with {olmocr_bench.PDFS}/ (olmOCR-bench), or images with a .txt or .md "
            "beside each; it holds none of these; check the path"
        )
    for path in images:
        texts = [p for s in (".txt", ".md") if (p := path.with_suffix(s)).is_file()]
        if len(texts) != 1:
            raise ValueError(
                f"{path} should have its text beside it, as {path.stem}.txt or {path.stem}.md; "
                f"found {len(texts)} of them; write one"
            )
        try:
            text = texts[0].read_text(encoding="utf8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{texts[0]} should be UTF-8 text; decoding fails at byte {error.start}; write it "
                "again"
            ) from error
        name = path.relative_to(folder).as_posix()
        yield OcrPage(name, partial(open_image, path), text)
