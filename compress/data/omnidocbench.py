"""Folders in the layout of OmniDocBench v1.5: pages and their blocks.

``OmniDocBench.json`` is a list of pages; ``images/`` holds the files that they name.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Self

from PIL import Image
from pydantic import (
    AfterValidator,
    AliasGenerator,
    AliasPath,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    model_validator,
)
from pydantic.dataclasses import dataclass

from compress.common.files import write_json
from compress.common.foreign import foreign
from compress.common.output_folder import PAGES, new_folder

ANNOTATIONS = "OmniDocBench.json"


# names of ours -> where OmniDocBench has them
_PATHS = {
    "category": AliasPath("category_type"),
    "image": AliasPath("page_info", "image_path"),
    "blocks": AliasPath("layout_dets"),
    "truncated": AliasPath("extra", "relation"),
    **{name: AliasPath("page_info", name) for name in ("width", "height", "page_no")},
}


def _truncated(relations: Any) -> Any:
    """The pairs of those relations that join the parts of one paragraph."""
    relations = relations or ()
    if not all(isinstance(relation, dict) for relation in relations):
        return relations
    ends = ("source_anno_id", "target_anno_id")
    chosen = [r for r in relations if r.get("relation_type") == "truncated"]
    return tuple(tuple(relation.get(end) for end in ends) for relation in chosen)


_CONFIG = ConfigDict(
    alias_generator=AliasGenerator(validation_alias=lambda name: _PATHS.get(name, name)),
    validate_by_name=True,
    strict=True,
)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
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
    poly: Annotated[tuple[float, ...], Field(strict=False)] = ()
    ignore: bool = False
    attribute: dict[str, Any] = field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, entry: Any) -> Any:
        """Nothing is known of what is null: the default stands for it."""
        return {k: v for k, v in entry.items() if v is not None} if type(entry) is dict else entry


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
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

    # some copies of the set write a path; the file lies in images/ all the same
    image: Annotated[str, AfterValidator(lambda path: Path(path).name)]
    width: int
    height: int
    blocks: tuple[Block, ...]
    truncated: Annotated[tuple[tuple[int, int], ...], BeforeValidator(_truncated)] = ()
    page_no: Annotated[int, BeforeValidator(lambda number: number or 0)] = 0
    attribute: Annotated[
        dict[str, Any],
        BeforeValidator(lambda known: {} if known is None else known),
        Field(validation_alias=AliasPath("page_info", "page_attribute")),
    ] = field(default_factory=dict)

    @model_validator(mode="after")
    def _relations_fit(self) -> Self:
        known = {block.anno_id for block in self.blocks}
        for number in itertools.chain(*self.truncated):
            if number not in known:
                raise ValueError(
                    "a truncated relation should name blocks of its page; anno_id "
                    f"{number} is none of them"
                )
        return self


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
    with foreign(path, "a list of annotated pages"):
        pages = _PAGES.validate_json(path.read_bytes())
    missing = [page.image for page in pages if not (folder / "images" / page.image).is_file()]
    if missing:
        raise ValueError(
            f"{folder / 'images'} should hold the image of each of {len(pages)} pages; "
            f"{len(missing)} are missing, the first is {missing[0]}; complete the folder"
        )
    [(name, count)] = Counter(Path(page.image).stem for page in pages).most_common(1)
    if count > 1:
        raise ValueError(
            f"predictions are told apart by the name of the image; in {path} {count} pages lead to "
            f"{name}.md; rename all but one of the images"
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


_PAGES = TypeAdapter(Annotated[list[Page], Field(min_length=1)])


def _entry(page: Page) -> dict[str, Any]:
    relations = [
        {"source_anno_id": source, "target_anno_id": target, "relation_type": "truncated"}
        for source, target in page.truncated
    ]
    return {
        "layout_dets": [
            {
                "category_type": block.category,
                "poly": list(block.poly),
                "ignore": block.ignore,
                "order": block.order,
                "anno_id": block.anno_id,
                **{n: text for n in ("text", "html", "latex") if (text := getattr(block, n))},
                "attribute": block.attribute,
                "line_with_spans": [],
            }
            for block in page.blocks
        ],
        "page_info": {
            "page_no": page.page_no,
            "height": page.height,
            "width": page.width,
            "image_path": page.image,
            "page_attribute": page.attribute,
        },
        "extra": {"relation": relations},
    }
