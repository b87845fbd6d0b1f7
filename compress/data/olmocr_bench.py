"""Folders in the layout of olmOCR-bench: tests in JSON lines, and PDFs.

``*.jsonl`` hold one test a line and give the categories their names; ``pdfs/`` the documents, in
subfolders if wanted. Source: olmocr/bench of allenai/olmocr.
"""

import json
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, Self

from PIL import Image
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from compress.common.files import is_litter, json_lines, walk, write_text
from compress.common.foreign import foreign
from compress.common.output_folder import PAGES, new_folder

PDFS = "pdfs"
# (document, page number from 1)
PageId = tuple[str, int]

# what `normalise` replaces, in this order
_MARKS = (
    (r"<br/?>", " "),
    (r"\*\*(.*?)\*\*", r"\1"),
    (r"__(.*?)__", r"\1"),
    (r"</?[bi]>", ""),
    # marks inside tags are seen now; one pass, so that the mark that opens first closes first
    (r"(\*\*|__)(.*?)\1", r"\2"),
    (r"([*_])(.*?)\1", r"\2"),
    (r"\s+", " "),
)
_PLAIN = str.maketrans(
    {
        **dict.fromkeys("‘’‚", "'"),
        **dict.fromkeys("“”„", '"'),
        **dict.fromkeys("–—‑‒−", "-"),
        "＿": "_",
        "\u00b5": "\u03bc",  # micro sign, Greek mu
    }
)


def normalise(text: str) -> str:
    """Text as olmOCR-bench compares it (``normalize_text`` of its tests.py).

    ``<br>`` and every run of white space become one space, Markdown's and HTML's marks of bold and
    italics go, Unicode is NFC, and quotes and hyphens of all shapes become ASCII.
    """
    for mark, replacement in _MARKS:
        text = re.sub(mark, replacement, text)
    return unicodedata.normalize("NFC", text).translate(_PLAIN)


def _not_blank(text: str) -> str:
    if not normalise(text).strip():
        raise ValueError("must not be empty, marks apart")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]
Name = Annotated[str, Field(min_length=1)]
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BenchTest:
    """What all tests have.

    Parameters
    ----------
    pdf : document, relative to ``pdfs/``.
    page : number of the page, from 1.
    id : unique in its file.
    max_diffs : characters that may differ in a fuzzy match.
    checked, url : notes of the annotators.
    """

    pdf: Name
    page: int
    id: Name
    max_diffs: Annotated[int, Field(ge=0)] = 0
    checked: str | None = None
    url: str | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PresenceTest(BenchTest):
    """A text must (``present``) or must not (``absent``) occur on the page.

    Parameters
    ----------
    text : what is looked for.
    case_sensitive : whether case counts.
    first_n, last_n : look only at so many characters at the beginning and the end.
    """

    type: Literal["present", "absent"]
    text: Text
    case_sensitive: bool = True
    first_n: int | None = None
    last_n: int | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OrderTest(BenchTest):
    """One text must begin before another."""

    type: Literal["order"] = "order"
    before: Text
    after: Text

    @model_validator(mode="after")
    def _few_differences(self) -> Self:
        shorter = min(len(normalise(self.before)), len(normalise(self.after)))
        if self.max_diffs > shorter // 2:
            raise ValueError("max_diffs must be at most half of either text")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TableTest(BenchTest):
    """A table must hold a cell whose neighbours or headings are as given; '' asks for nothing."""

    type: Literal["table"] = "table"
    cell: str
    up: str = ""
    down: str = ""
    left: str = ""
    right: str = ""
    top_heading: str = ""
    left_heading: str = ""
    ignore_markdown_tables: bool = False


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BaselineTest(BenchTest):
    """The page must hold text, must not end in repetition nor hold Chinese, Japanese or emoji.

    Parameters
    ----------
    max_length : only ask for at most so many letters and digits, on a page that should be blank.
    max_length_skips_image_alt_tags : do not count the texts of images for that.
    max_repeats : copies of a piece of 1 to 5 characters that the text may end with.
    check_disallowed_characters : whether Chinese, Japanese and emoji are errors.
    """

    type: Literal["baseline"] = "baseline"
    max_length: int | None = None
    max_length_skips_image_alt_tags: bool = False
    max_repeats: int = 30
    check_disallowed_characters: bool = True


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class FormatTest(BenchTest):
    """A text must occur as ``heading``, ``bold`` or ``italic``."""

    type: Literal["format"] = "format"
    text: Text
    format: Literal["heading", "bold", "italic"]
    case_sensitive: bool = True


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class FootnoteTest(BenchTest):
    """A footnote mark must occur, behind and before the texts that are given."""

    type: Literal["footnote"] = "footnote"
    marker: Annotated[str, Field(pattern="^[^ ]+$")]
    appears_before_marker: Text | Literal[""] | None = None
    appears_after_marker: Text | Literal[""] | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MathTest(BenchTest):
    """A formula must occur, compared as KaTeX renders it."""

    type: Literal["math"] = "math"
    math: str
    ignore_dollar_delimited: bool = False


AnyTest = PresenceTest | OrderTest | TableTest | BaselineTest | FormatTest | FootnoteTest | MathTest
_TEST: TypeAdapter[AnyTest] = TypeAdapter(Annotated[AnyTest, Field(discriminator="type")])


@dataclass(frozen=True)
class Bench:
    """A folder of tests.

    Parameters
    ----------
    folder : where it lies.
    files : name of the JSON lines file without suffix -> its tests, both sorted as found.
    pdfs : documents, relative to ``pdfs/``.
    """

    folder: Path
    files: dict[str, tuple[AnyTest, ...]]
    pdfs: tuple[str, ...]

    @property
    def pages(self) -> tuple[PageId, ...]:
        """Pages that a candidate must have read: those of the tests, and the first of each PDF."""
        named = {(test.pdf, test.page) for tests in self.files.values() for test in tests}
        return tuple(sorted(named | {(pdf, 1) for pdf in self.pdfs}))

    def image(self, page: PageId) -> Path:
        """Where `write_olmocr_bench` puts a lossless image of a page; the real set has none."""
        pdf, number = page
        return self.folder / PDFS / f"{Path(pdf).with_suffix('')}_pg{number}.png"


def read_olmocr_bench(folder: Path) -> Bench:
    """Read the tests of a folder; the PDFs are only looked for, not opened.

    Raises
    ------
    ValueError : naming what is missing, or the file and line of a damaged test.
    """
    paths = sorted(p for p in folder.glob("*.jsonl") if not is_litter(p.name))
    documents = sorted(p for p in walk(folder / PDFS) if p.suffix == ".pdf")
    if not paths or not documents:
        raise ValueError(
            f"a folder in olmOCR-bench's layout holds *.jsonl files and {PDFS}/ with PDFs; found "
            f"{len(paths)} and {len(documents)} of them in {folder}; check the path"
        )
    pdfs = tuple(path.relative_to(folder / PDFS).as_posix() for path in documents)
    files = {path.stem: _read_tests(path) for path in paths}
    _check_documents(files, pdfs, folder)
    return Bench(folder, files, pdfs)


def write_olmocr_bench(
    folder: Path,
    files: Mapping[str, Sequence[AnyTest]],
    pages: Mapping[str, Sequence[Image.Image]],
    *,
    overwrite: bool = False,
) -> Bench:
    """Write a folder that `read_olmocr_bench` and olmOCR's own script read, atomically.

    Parameters
    ----------
    folder : new or empty, or with ``overwrite`` one that was written so.
    files : name without suffix -> tests.
    pages : document, with the suffix ``.pdf`` -> images of its pages. Beside each PDF, which holds
        them as JPEG, the pages also lie as PNG, see `Bench.image`.

    Raises
    ------
    FileExistsError : when the folder holds something that is not to be replaced.
    ValueError : for a test without document, or a document without pages or suffix.
    """
    for pdf, images in pages.items():
        if not pdf.endswith(".pdf") or not images:
            raise ValueError(
                "documents are called *.pdf and have at least one page; got "
                f"{pdf!r} with {len(images)}; rename it or give its pages"
            )
    _check_documents(files, pages, folder)
    with new_folder(folder, PAGES, overwrite=overwrite) as temporary:
        bench = Bench(temporary, {}, ())
        for pdf, images in pages.items():
            path = temporary / PDFS / pdf
            path.parent.mkdir(parents=True, exist_ok=True)
            images[0].save(path, save_all=True, append_images=list(images[1:]))
            for number, image in enumerate(images, start=1):
                image.save(bench.image((pdf, number)))
        for name, tests in files.items():
            lines = [json.dumps(asdict(test), ensure_ascii=False) + "\n" for test in tests]
            write_text(temporary / f"{name}.jsonl", "".join(lines))
    return read_olmocr_bench(folder)


def _check_documents(
    files: Mapping[str, Sequence[AnyTest]], pdfs: Collection[str], folder: Path
) -> None:
    """See that every test belongs to a document."""
    known = set(pdfs)
    unknown = [(name, t) for name, tests in files.items() for t in tests if t.pdf not in known]
    if unknown:
        name, test = unknown[0]
        raise ValueError(
            f"every test should name a PDF in {folder / PDFS}; {test.pdf} of test {test.id} in "
            f"{name}.jsonl is not there, nor are those of {len(unknown) - 1} others; complete the "
            "folder"
        )


def _read_tests(path: Path) -> tuple[AnyTest, ...]:
    tests: dict[str, AnyTest] = {}
    for number, line in json_lines(path):
        where = f"{path}, line {number}"
        with foreign(where, "a test of olmOCR-bench", "correct the line"):
            test = _TEST.validate_json(line)
        if test.id in tests:
            raise ValueError(
                f"{where}: ids should be unique in a file; {test.id!r} stands there twice; rename "
                "one"
            )
        tests[test.id] = test
    return tuple(tests.values())
