"""Folders in the layout of olmOCR-bench: tests in JSON lines, single-page PDFs, candidates' texts.

``*.jsonl`` hold one test a line and give the categories their names; ``pdfs/`` the documents, in
subfolders if wanted; every other folder is a candidate and holds, for the document ``a/b.pdf``,
``a/b_pg1_repeat1.md`` and so on. Source: olmocr/bench of allenai/olmocr.
"""

import json
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from compress.common.files import is_litter, json_lines, read_text, walk, write_text
from compress.common.output_folder import PAGES, TEXTS, new_folder

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


@dataclass(frozen=True, kw_only=True)
class BenchTest:
    """What all tests have.

    Parameters
    ----------
    pdf : document, relative to ``pdfs/``.
    page : number of the page, from 1.
    id : unique in its file.
    type : kind of test, one of `KINDS`.
    max_diffs : characters that may differ in a fuzzy match, >= 0.
    checked, url : notes of the annotators.
    """

    types: ClassVar[tuple[str, ...]] = ()

    pdf: str
    page: int
    id: str
    type: str
    max_diffs: int = 0
    checked: str | None = None
    url: str | None = None

    def __post_init__(self) -> None:
        _check(bool(self.pdf and self.id), "pdf and id must not be empty", self)
        _check(self.type in self.types, f"type must be one of {list(self.types)}", self)
        _check(self.max_diffs >= 0, "max_diffs must be at least 0", self)


@dataclass(frozen=True, kw_only=True)
class PresenceTest(BenchTest):
    """A text must (``present``) or must not (``absent``) occur on the page.

    Parameters
    ----------
    text : what is looked for.
    case_sensitive : whether case counts.
    first_n, last_n : look only at so many characters at the beginning and the end.
    """

    types = ("present", "absent")

    text: str
    case_sensitive: bool = True
    first_n: int | None = None
    last_n: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_text(self.text, "text", self)


@dataclass(frozen=True, kw_only=True)
class OrderTest(BenchTest):
    """One text must begin before another."""

    types = ("order",)

    before: str
    after: str

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_text(self.before, "before", self)
        _check_text(self.after, "after", self)
        shorter = min(len(normalise(self.before)), len(normalise(self.after)))
        _check(
            self.max_diffs <= shorter // 2, "max_diffs must be at most half of either text", self
        )


@dataclass(frozen=True, kw_only=True)
class TableTest(BenchTest):
    """A table must hold a cell whose neighbours or headings are as given; '' asks for nothing."""

    types = ("table",)

    cell: str
    up: str = ""
    down: str = ""
    left: str = ""
    right: str = ""
    top_heading: str = ""
    left_heading: str = ""
    ignore_markdown_tables: bool = False


@dataclass(frozen=True, kw_only=True)
class BaselineTest(BenchTest):
    """The page must hold text, must not end in repetition nor hold Chinese, Japanese or emoji.

    Parameters
    ----------
    max_length : only ask for at most so many letters and digits, on a page that should be blank.
    max_length_skips_image_alt_tags : do not count the texts of images for that.
    max_repeats : copies of a piece of 1 to 5 characters that the text may end with.
    check_disallowed_characters : whether Chinese, Japanese and emoji are errors.
    """

    types = ("baseline",)

    max_length: int | None = None
    max_length_skips_image_alt_tags: bool = False
    max_repeats: int = 30
    check_disallowed_characters: bool = True


@dataclass(frozen=True, kw_only=True)
class FormatTest(BenchTest):
    """A text must occur as ``heading``, ``bold`` or ``italic``."""

    types = ("format",)

    text: str
    format: str
    case_sensitive: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_text(self.text, "text", self)
        formats = ("heading", "bold", "italic")
        _check(self.format in formats, f"format must be one of {list(formats)}", self)


@dataclass(frozen=True, kw_only=True)
class FootnoteTest(BenchTest):
    """A footnote mark must occur, behind and before the texts that are given."""

    types = ("footnote",)

    marker: str
    appears_before_marker: str | None = None
    appears_after_marker: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = bool(self.marker) and " " not in self.marker
        _check(valid, "marker must be neither empty nor hold spaces", self)
        for name in ("appears_before_marker", "appears_after_marker"):
            if getattr(self, name):
                _check_text(getattr(self, name), name, self)


@dataclass(frozen=True, kw_only=True)
class MathTest(BenchTest):
    """A formula must occur, compared as KaTeX renders it."""

    types = ("math",)

    math: str
    ignore_dollar_delimited: bool = False


_CLASSES = (
    PresenceTest,
    OrderTest,
    TableTest,
    BaselineTest,
    FormatTest,
    FootnoteTest,
    MathTest,
)
KINDS: dict[str, type[BenchTest]] = {kind: cls for cls in _CLASSES for kind in cls.types}


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
    files: dict[str, tuple[BenchTest, ...]]
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
    files: Mapping[str, Sequence[BenchTest]],
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


def read_candidate(bench: Bench, name: str) -> dict[PageId, tuple[str, ...]]:
    """Read what a candidate made of each page; a page may have been read several times.

    Raises
    ------
    ValueError : when a page of ``bench.pages`` is missing, or a file is not UTF-8.
    """
    folder = bench.folder / name
    by_page: dict[PageId, dict[int, str]] = {}
    for path in walk(folder):
        match = re.fullmatch(r"(.+)_pg(\d+)_repeat(\d+)\.md", path.relative_to(folder).as_posix())
        if not match:
            continue
        text = read_text(path)
        by_page.setdefault((f"{match[1]}.pdf", int(match[2])), {})[int(match[3])] = text
    missing = [page for page in bench.pages if page not in by_page]
    if missing:
        raise ValueError(
            f"{folder} should hold a text for each of {len(bench.pages)} pages; {len(missing)} are "
            f"missing, the first is {_file_name(missing[0], 1)}; predict them, or write an empty "
            "file for a page that gave nothing"
        )
    return {page: tuple(texts[n] for n in sorted(texts)) for page, texts in by_page.items()}


def write_candidate(
    bench: Bench,
    name: str,
    outputs: Mapping[PageId, Sequence[str]],
    *,
    overwrite: bool = False,
) -> None:
    """Write a candidate's texts, each page's repeats numbered from 1, for `read_candidate`.

    Parameters
    ----------
    bench : the benchmark, in whose folder the candidate's is.
    name : of the candidate; its folder is new or empty, or with ``overwrite`` was written so.
    outputs : by page, one text or more.
    overwrite : replace what is there.

    Raises
    ------
    FileExistsError : when the folder holds something that is not to be replaced.
    """
    with new_folder(bench.folder / name, TEXTS, overwrite=overwrite) as temporary:
        for page, texts in outputs.items():
            for repeat, text in enumerate(texts, start=1):
                path = temporary / _file_name(page, repeat)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, text)


def _file_name(page: PageId, repeat: int) -> str:
    pdf, number = page
    return f"{Path(pdf).with_suffix('').as_posix()}_pg{number}_repeat{repeat}.md"


def _check_documents(
    files: Mapping[str, Sequence[BenchTest]], pdfs: Collection[str], folder: Path
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


def _read_tests(path: Path) -> tuple[BenchTest, ...]:
    tests: dict[str, BenchTest] = {}
    for number, line in json_lines(path):
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where} should hold a test as JSON but does not parse: {error}; restore the file"
            ) from error
        try:
            test = _test(entry)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if test.id in tests:
            raise ValueError(
                f"{where}: ids should be unique in a file; {test.id!r} stands there twice; rename "
                "one"
            )
        tests[test.id] = test
    return tuple(tests.values())


def _test(entry: Any) -> BenchTest:
    kind = entry.get("type") if isinstance(entry, dict) else None
    if kind not in KINDS:
        raise ValueError(
            f"a test should be an object whose type is one of {list(KINDS)}; got {kind!r}; correct "
            "the line"
        )
    cls = KINDS[kind]
    known = {field.name: field for field in fields(cls)}
    unknown = sorted(entry.keys() - known.keys())
    missing = [n for n, f in known.items() if f.default is MISSING and n not in entry]
    if unknown or missing:
        raise ValueError(
            f"a test of type {kind} has the keys {list(known)}; missing: {missing or 'none'}, "
            f"unknown: {unknown or 'none'}; correct the line"
        )
    for name, value in entry.items():
        # the annotations are kept as text: "str", "int", "bool", "str | None", "int | None"
        allowed = _ALLOWED[str(getattr(known[name].type, "__name__", known[name].type))]
        if type(value) not in allowed:
            raise ValueError(
                f"{name} should be of type {allowed[0].__name__}; got {value!r}; correct the line"
            )
    return cls(**entry)


_ALLOWED: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
}


def _check(holds: bool, rule: str, test: BenchTest) -> None:
    if not holds:
        raise ValueError(f"{rule}; got {test}; correct the test")


def _check_text(text: str, name: str, test: BenchTest) -> None:
    _check(bool(normalise(text).strip()), f"{name} must not be empty, marks apart", test)
