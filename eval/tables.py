"""Measured rows (JSON lines) and the Markdown tables that are generated from them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.common.files import json_lines
from compress.common.foreign import foreign

Row = dict[str, Any]
Cell = Callable[[Row], str]


def read_rows(path: Path) -> list[Row]:
    """All rows of a results file; none where there is no file."""
    if not path.exists():
        return []
    rows = []
    for number, line in json_lines(path):
        with foreign(f"{path}, line {number}", "a JSON object", "remove the line"):
            rows.append(dict(json.loads(line)))
    return rows


def cell_table(rows: Sequence[Row], columns: Mapping[str, Cell]) -> str:
    """A Markdown table, a line for each row; a column has a heading and what it says of a row."""
    return markdown([{name: cell(row) for name, cell in columns.items()} for row in rows])


def markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of lines with the same headings."""
    cells = [list(lines[0]), *(list(line.values()) for line in lines)]
    first, *others = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([first, "|" + "---|" * len(cells[0]), *others])
