"""Rendered pages as folders in the layouts of OmniDocBench and olmOCR-bench."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.common.output_folder import PAGES, check_replaceable, locked
from compress.data import omnidocbench
from compress.data.olmocr_bench import (
    AnyTest,
    BaselineTest,
    Bench,
    FormatTest,
    OrderTest,
    PresenceTest,
    TableTest,
    write_olmocr_bench,
)
from compress.data.pages import DOCUMENT, PAGE, SQUARE_PAGE, Block, Page
from compress.data.pages import page as render

# what a page may look like, and how a folder of them may be laid out, by name
DIFFICULTIES = {"page": PAGE, "square": SQUARE_PAGE, "document": DOCUMENT}
LAYOUTS = ("omnidocbench", "olmocr")
CATEGORIES = {"heading": "title", "paragraph": "text_block", "table": "table"}


def write_rendered_pages(
    folder: Path,
    layout: str,
    difficulty: str,
    count: int,
    seed: int,
    split: str,
    *,
    overwrite: bool = False,
) -> None:
    """Render pages and write them as a folder that ``compress eval --data`` reads.

    Parameters
    ----------
    folder : to write; new or empty, or with ``overwrite`` rendered pages of an earlier call.
    layout, difficulty : one of :data:`LAYOUTS` and of :data:`DIFFICULTIES`.
    count, seed, split : of the pages; see :func:`compress.data.pages.page`.

    Raises
    ------
    ValueError : for an unknown layout, difficulty or split.
    FileExistsError : when the folder holds something that is not to be replaced, or is in use.
    """
    if layout not in LAYOUTS or difficulty not in DIFFICULTIES:
        raise ValueError(
            f"a layout among {', '.join(LAYOUTS)} and a difficulty among "
            f"{', '.join(DIFFICULTIES)} are expected; got {layout} and {difficulty}; choose others"
        )
    check_replaceable(folder, PAGES, overwrite=overwrite)
    write = {"omnidocbench": write_pages_as_omnidocbench, "olmocr": write_pages_as_olmocr_bench}
    with locked(folder):
        made = [render(seed, number, DIFFICULTIES[difficulty], split) for number in range(count)]
        write[layout](folder, made, overwrite=overwrite)


def write_pages_as_omnidocbench(
    folder: Path, pages: Sequence[Page], *, overwrite: bool = False
) -> None:
    """Write pages and their blocks as ``page_0000.png`` and so on, with annotations."""
    annotated = [
        omnidocbench.Page(
            image=f"{_name(number)}.png",
            width=page.image.width,
            height=page.image.height,
            blocks=tuple(_annotated(block) for block in page.blocks),
            page_no=number,
            attribute={"data_source": "rendered", "language": "english"},
        )
        for number, page in enumerate(pages)
    ]
    images = [page.image for page in pages]
    omnidocbench.write_omnidocbench(folder, annotated, images, overwrite=overwrite)


def write_pages_as_olmocr_bench(
    folder: Path, pages: Sequence[Page], *, overwrite: bool = False
) -> Bench:
    """Write each page as a PDF (and PNG), with tests that its ground truth passes.

    A page gives, where it has them: presence of each paragraph's first line, order of neighbouring
    blocks, each heading, the neighbours of each table's first cell, and the baseline test. Texts
    that occur twice on a page are not asked for.
    """
    if not pages:
        raise ValueError("at least one page expected to write a folder of; got none; render some")
    tests: dict[str, list[AnyTest]] = {}
    for number, page in enumerate(pages):
        for test in _tests(f"{_name(number)}.pdf", page):
            tests.setdefault(test.type, []).append(test)
    images = {f"{_name(number)}.pdf": [page.image] for number, page in enumerate(pages)}
    return write_olmocr_bench(folder, tests, images, overwrite=overwrite)


def _name(number: int) -> str:
    return f"page_{number:04}"


def _annotated(block: Block) -> omnidocbench.Block:
    x0, y0, x1, y1 = block.box
    return omnidocbench.Block(
        category=CATEGORIES[block.kind],
        anno_id=block.order,
        order=block.order + 1,
        text="" if block.html else block.text,
        html=block.html,
        poly=(x0, y0, x1, y0, x1, y1, x0, y1),
    )


def _tests(pdf: str, page: Page) -> list[AnyTest]:
    flat = " ".join(page.text.split())
    once = [b for b in page.blocks if b.kind != "table" and flat.count(_first(b)) == 1]
    place: Any = {"pdf": pdf, "page": 1}
    tests: list[AnyTest] = [BaselineTest(**place, id=f"{pdf}_baseline")]
    for block in once:
        name, text = f"{pdf}_{block.order}", _first(block)
        if block.kind == "heading":
            tests.append(FormatTest(**place, id=f"{name}_f", text=text, format="heading"))
        tests.append(PresenceTest(**place, id=f"{name}_p", type="present", text=text))
    for one, two in itertools.pairwise(once):
        texts: Any = {"before": _first(one), "after": _first(two)}
        tests.append(OrderTest(**place, id=f"{pdf}_{one.order}_o", **texts))
    for block in page.blocks:
        if block.kind == "table":
            first, second = (row.split(" ") for row in block.text.split("\n")[:2])
            cells: Any = {"cell": first[0], "right": first[1], "down": second[0]}
            tests.append(TableTest(**place, id=f"{pdf}_{block.order}_t", **cells))
    return tests


def _first(block: Block) -> str:
    return block.text.split("\n")[0]
