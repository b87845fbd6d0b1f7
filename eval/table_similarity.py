"""Tables in HTML and Markdown, and the tree-edit similarity of two of them (TEDS)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from compress.common.extras import extra

with extra("ocr", "scoring pages"):
    import apted
    from apted import APTED
    from lxml import etree, html
    from rapidfuzz.distance import Levenshtein

# what HTML allows; a model that writes more must not fill the memory
MAX_SPAN = 1000
_UNPARSABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Parameters
    ----------
    text : its plain text, white space at the ends stripped, ``<br>`` a line break.
    rowspan, colspan : rows and columns that it covers, 1 to `MAX_SPAN`.
    heading : whether it is a ``<th>`` or stands in a ``<thead>``.
    """

    text: str
    rowspan: int = 1
    colspan: int = 1
    heading: bool = False


# rows of cells, as they are written: a cell stands in the row where it begins
Table = tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class _Node:
    """A node of the tree that is edited: the table, a row or a cell."""

    label: tuple[str, int, int]
    text: str = ""
    children: list["_Node"] = field(default_factory=list)


class _Costs(apted.Config):
    """Costs of the edits: 1 for a node, a share of 1 for the text of a cell."""

    def rename(self, node1: _Node, node2: _Node) -> float:
        if node1.label != node2.label:
            return 1.0
        return Levenshtein.normalized_distance(node1.text, node2.text)


def teds(prediction: str, reference: str, *, structure_only: bool = False) -> float:
    """Tree-edit-distance-based similarity of two HTML tables, higher is better, 1 for equal ones.

    Zhong et al., "Image-based table recognition: data, model, and evaluation" (arXiv 1911.10683):
    1 - distance / max(nodes of either), where a table is a tree of rows and cells, inserting or
    deleting a node costs 1, exchanging one for another costs 1 if kind, rowspan or colspan differ
    and else the normalised edit distance of the cells' characters. The tree edit distance is
    apted's. By this definition two tables of very different shape may score a little below 0.

    As in OmniDocBench, ``<th>`` counts as ``<td>`` and ``<thead>`` and ``<tbody>`` are looked
    through. We differ from both in that cells are compared by their plain text with white space
    collapsed: ``<b>`` and the like are neither compared nor counted.

    Parameters
    ----------
    prediction, reference : HTML; the first table in each is compared. A prediction without a
        table scores 0.
    structure_only : compare no text, only rows, cells and spans (TEDS-S).

    Raises
    ------
    ValueError : when there is no table in the reference.
    """
    expected = html_tables(reference)
    if not expected:
        raise ValueError(
            "a reference for TEDS must hold an HTML <table> with rows; got "
            f"{reference[:60]!r}; correct the ground truth"
        )
    predicted = html_tables(prediction)
    if not predicted:
        return 0.0
    nodes = max(sum(1 + len(row) for row in table) for table in (predicted[0], expected[0]))
    trees = (_tree(table, structure_only) for table in (predicted[0], expected[0]))
    return 1 - APTED(*trees, _Costs()).compute_edit_distance() / nodes


def html_tables(markup: str) -> list[Table]:
    """Read all tables with at least one cell from HTML, or from text that holds some.

    Rows without cells are kept, since they count as rows. A table inside a cell is a table of its
    own, and its text is also part of that cell. Spans that are no positive number count as 1;
    ``rowspan="0"`` reaches to the end of the table.
    """
    document = html.document_fromstring(
        f"<html><body>{_UNPARSABLE.sub(' ', markup)}</body></html>",
        parser=html.HTMLParser(huge_tree=True, remove_comments=True, remove_pis=True),
    )
    for line_break in document.iter("br"):
        line_break.tail = "\n" + (line_break.tail or "")
    tables = []
    for element in document.iter("table"):
        rows = [row for row in element.iter("tr") if next(row.iterancestors("table")) is element]
        table = tuple(
            tuple(_cell(cell, len(rows) - place) for cell in row if cell.tag in ("td", "th"))
            for place, row in enumerate(rows)
        )
        if any(table):
            tables.append(table)
    return tables


def markdown_tables(text: str) -> list[Table]:
    """Read pipe tables: two or more adjacent lines that hold ``|``.

    Lines of dashes, colons and pipes only are separators. The first row and the first column
    count as headings.
    """
    tables = []
    for run in _runs_with_pipes(text.split("\n")):
        lines = [line for line in run if not line.strip() or set(line) - set("|-: \t\r")]
        rows: list[tuple[Cell, ...]] = []
        for line in lines:
            parts = [part.strip() for part in line.split("|")]
            parts = parts[1:] if parts[0] == "" else parts
            parts = parts[:-1] if parts and parts[-1] == "" else parts
            if parts:
                rows.append(
                    tuple(
                        Cell(part, heading=not rows or not column)
                        for column, part in enumerate(parts)
                    )
                )
        if len(run) >= 2 and rows:
            tables.append(tuple(rows))
    return tables


def table_html(table: Table) -> str:
    """Write a table as HTML without white space between its tags."""
    rows = []
    for row in table:
        cells = []
        for cell in row:
            tag = "th" if cell.heading else "td"
            spans = f' rowspan="{cell.rowspan}"' if cell.rowspan > 1 else ""
            spans += f' colspan="{cell.colspan}"' if cell.colspan > 1 else ""
            content = escape(cell.text, quote=False).replace("\n", "<br>")
            cells.append(f"<{tag}{spans}>{content}</{tag}>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _tree(table: Table, structure_only: bool) -> _Node:
    rows = []
    for row in table:
        cells = [
            _Node(
                ("td", cell.rowspan, cell.colspan),
                "" if structure_only else " ".join(cell.text.split()),
            )
            for cell in row
        ]
        rows.append(_Node(("tr", 1, 1), children=cells))
    return _Node(("table", 1, 1), children=rows)


def _cell(element: etree._Element, rows_left: int) -> Cell:
    return Cell(
        text="".join(element.itertext()).strip(),
        rowspan=rows_left if element.get("rowspan", "").strip() == "0" else _span(element, "row"),
        colspan=_span(element, "col"),
        heading=element.tag == "th" or next(element.iterancestors("thead"), None) is not None,
    )


def _span(element: etree._Element, direction: str) -> int:
    span = element.get(f"{direction}span", "1").strip()
    return min(int(span), MAX_SPAN) if re.fullmatch(r"0*[1-9][0-9]{0,8}", span) else 1


def _runs_with_pipes(lines: Sequence[str]) -> Iterator[list[str]]:
    run: list[str] = []
    for line in [*lines, ""]:
        if "|" in line:
            run.append(line)
        elif run:
            yield run
            run = []
