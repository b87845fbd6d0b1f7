"""Folders in the layout of OmniDocBench v1.5: pages, their blocks, and one prediction per page.

``OmniDocBench.json`` is a list of pages; ``images/`` holds the files that they name. Predictions
lie in a folder of their own, one ``.md`` per page, named like its image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from compress.common.files import read_json, read_text, write_json, write_text
from compress.common.output_folder import PAGES, TEXTS, new_folder

ANNOTATIONS = "OmniDocBench.json"


@dataclass(frozen=True, kw_only=True)
class Block:
    """One annotated block of a page.

    Parameters
    ----------
    category : OmniDocBench's ``category_type``, for example ``text_block``, ``title``, ``table``.
    anno_id : number of the block, unique on its page.
    order : place in the reading order, from 1; None for blocks outside of it.
    text, html, latex : content; a table has HTML, a formula LaTeX, the rest text.
    poly : corners ``(x, y) * 4`` in pixels, clockwise from the upper left.
    ignore : whether scorers leave the block out.
    attribute : labels such as ``text_language``, kept as they are.
    """

    category: str
    anno_id: int
    order: int | None = None
    text: str = ""
    html: str = ""
    latex: str = ""
    poly: tuple[float, ...] = ()
    ignore: bool = False
    attribute: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Page:
    """One annotated page.

    Parameters
    ----------
    image : file name in ``images/``.
    width, height : of the image in pixels.
    blocks : in the order of the file.
    truncated : pairs of ``anno_id`` of blocks that are parts of one paragraph.
    page_no : number of the page in its document.
    attribute : ``page_attribute``, for example language and layout, kept as it is.
    """

    image: str
    width: int
    height: int
    blocks: tuple[Block, ...]
    truncated: tuple[tuple[int, int], ...] = ()
    page_no: int = 0
    attribute: dict[str, Any] = field(default_factory=dict)

    @property
    def prediction_name(self) -> str:
        """File name of the page's prediction."""
        return f"{Path(self.image).stem}.md"


def read_omnidocbench(folder: Path) -> list[Page]:
    """Read the annotations of a folder; images are only looked for, not opened.

    Keys that `Block` and `Page` do not name (lines, spans, masks) are skipped.

    Raises
    ------
    ValueError : naming what is missing or damaged, with the page and block where it is.
    """
    path = folder / ANNOTATIONS
    if not path.is_file():
        raise ValueError(
            f"a folder in OmniDocBench's layout holds {ANNOTATIONS}; {path} does not exist; check "
            "the path"
        )
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise ValueError(
            f"{path} should hold a list of at least one page; got {_kind(content)}; restore the "
            "file"
        )
    pages = [_page(entry, f"{path}, page {number}") for number, entry in enumerate(content)]
    missing = [page.image for page in pages if not (folder / "images" / page.image).is_file()]
    if missing:
        raise ValueError(
            f"{folder / 'images'} should hold the image of each of {len(pages)} pages; "
            f"{len(missing)} are missing, the first is {missing[0]}; complete the folder"
        )
    names = [page.prediction_name for page in pages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"predictions are told apart by the name of the image; in {path} two pages lead to "
            f"{twice[0]}; rename one of the images"
        )
    return pages


def write_omnidocbench(
    folder: Path,
    pages: Sequence[Page],
    images: Sequence[Image.Image],
    *,
    overwrite: bool = False,
) -> None:
    """Write a folder that `read_omnidocbench` and OmniDocBench's own scorer read, atomically.

    Parameters
    ----------
    folder : new or empty, or with ``overwrite`` one that was written so.
    pages : at least one; the suffix of ``Page.image`` decides the format of the file.
    images : one per page, of the size that the page states.

    Raises
    ------
    FileExistsError : when the folder holds something that is not to be replaced.
    ValueError : for unequal numbers, or an image that has not the stated size.
    """
    if len(pages) != len(images) or not pages:
        raise ValueError(
            f"one image per page expected, at least one; got {len(pages)} pages and {len(images)} "
            "images; give both in the same order"
        )
    for page, image in zip(pages, images, strict=True):
        if image.size != (page.width, page.height):
            raise ValueError(
                f"{page.image} should be {page.width}x{page.height} pixels as its page says; got "
                f"{image.width}x{image.height}; correct one of them"
            )
    with new_folder(folder, PAGES, overwrite=overwrite) as temporary:
        (temporary / "images").mkdir()
        write_json(temporary / ANNOTATIONS, [_entry(page) for page in pages])
        for page, image in zip(pages, images, strict=True):
            image.save(temporary / "images" / page.image)


def read_predictions(folder: Path, pages: Sequence[Page]) -> dict[str, str]:
    """Read one Markdown file per page; image name -> text.

    OmniDocBench's own scorer skips pages without a file, which raises the score; here each page
    needs one.

    Raises
    ------
    ValueError : when files are missing, or one is not UTF-8.
    """
    missing = [p.prediction_name for p in pages if not (folder / p.prediction_name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} should hold a prediction for each of {len(pages)} pages; {len(missing)} are "
            f"missing, the first is {missing[0]}; predict them, or write an empty file for a page "
            "that gave nothing"
        )
    predictions = {}
    for page in pages:
        predictions[page.image] = read_text(folder / page.prediction_name)
    return predictions


def write_predictions(
    folder: Path, predictions: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Write image name -> Markdown as files that `read_predictions` finds.

    Parameters
    ----------
    folder : new or empty, or with ``overwrite`` one that was written so.
    predictions : by image.
    overwrite : replace what is there.

    Raises
    ------
    FileExistsError : when the folder holds something that is not to be replaced.
    """
    with new_folder(folder, TEXTS, overwrite=overwrite) as temporary:
        for image, text in predictions.items():
            write_text(temporary / f"{Path(image).stem}.md", text)


def _page(entry: Any, where: str) -> Page:
    info = _get(entry, "page_info", dict, where)
    relations = _get(entry.get("extra") or {}, "relation", list, where, [])
    blocks = tuple(
        _block(block, f"{where}, block {number}")
        for number, block in enumerate(_get(entry, "layout_dets", list, where))
    )
    truncated = tuple(
        (
            _get(relation, "source_anno_id", int, where),
            _get(relation, "target_anno_id", int, where),
        )
        for relation in relations
        if _get(relation, "relation_type", str, where) == "truncated"
    )
    known = {block.anno_id for block in blocks}
    strangers = [number for pair in truncated for number in pair if number not in known]
    if strangers:
        raise ValueError(
            f"{where}: a truncated relation should name blocks of its page; anno_id {strangers[0]} "
            "is none of them; restore the file"
        )
    return Page(
        # some copies of the set write a path; the file lies in images/ all the same
        image=Path(_get(info, "image_path", str, where)).name,
        width=_get(info, "width", int, where),
        height=_get(info, "height", int, where),
        blocks=blocks,
        truncated=truncated,
        page_no=_get(info, "page_no", int, where, 0),
        attribute=_get(info, "page_attribute", dict, where, {}),
    )


def _block(entry: Any, where: str) -> Block:
    return Block(
        category=_get(entry, "category_type", str, where),
        anno_id=_get(entry, "anno_id", int, where),
        order=_get(entry, "order", int, where, None),
        text=_get(entry, "text", str, where, ""),
        html=_get(entry, "html", str, where, ""),
        latex=_get(entry, "latex", str, where, ""),
        poly=tuple(_get(entry, "poly", list, where, [])),
        ignore=_get(entry, "ignore", bool, where, False),
        attribute=_get(entry, "attribute", dict, where, {}),
    )


_REQUIRED: Any = object()


def _get(entry: Any, key: str, kind: type, where: str, default: Any = _REQUIRED) -> Any:
    """Value of a key; the default also stands for null."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} should be a JSON object; got {_kind(entry)}; restore the file")
    value = entry.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if not isinstance(value, kind):
        raise ValueError(
            f"{where}: {key} should be of type {kind.__name__}; got "
            f"{_kind(value) if key in entry else 'no such key'}; restore the file"
        )
    return value


def _kind(value: Any) -> str:
    return f"an empty {type(value).__name__}" if value in ([], {}) else type(value).__name__


def _entry(page: Page) -> dict[str, Any]:
    relations = [
        {"source_anno_id": source, "target_anno_id": target, "relation_type": "truncated"}
        for source, target in page.truncated
    ]
    return {
        "layout_dets": [_block_entry(block) for block in page.blocks],
        "page_info": {
            "page_no": page.page_no,
            "height": page.height,
            "width": page.width,
            "image_path": page.image,
            "page_attribute": page.attribute,
        },
        "extra": {"relation": relations},
    }


def _block_entry(block: Block) -> dict[str, Any]:
    contents = {"text": block.text, "html": block.html, "latex": block.latex}
    return {
        "category_type": block.category,
        "poly": list(block.poly),
        "ignore": block.ignore,
        "order": block.order,
        "anno_id": block.anno_id,
        **{key: content for key, content in contents.items() if content},
        "attribute": block.attribute,
        "line_with_spans": [],
    }
