"""All generated tables, and the documents that they stand in."""

import functools
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from compress.eval.metrics import metric
from compress.eval.tables import Row, markdown
from compress.methods.base import Method
from compress.methods.registry import METHODS
from compress.tables import bench, diffusion, processes, reader
from compress.tables.table import Table, has

PLACE = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table:\2 -->)", re.DOTALL)


def all_tables(results: Path, runs: Path) -> dict[str, Table]:
    """All generated tables by name.

    Parameters
    ----------
    results : folder of the rows, with ``tables.yaml``.
    runs : folder in which runs are that can go on.
    """
    declared = yaml.safe_load((results / "tables.yaml").read_text(encoding="utf8"))
    measured = [
        *(
            diffusion.table(name, content, results)
            for name, content in declared["diffusion"].items()
        ),
        processes.table(results, runs),
        reader.readers(results, runs),
        *reader.recipe_tables(results, runs),
        *(
            reader.collection(name, content, results)
            for name, content in declared["collections"].items()
        ),
        *(reader.curves(name, content, results) for name, content in declared["curves"].items()),
        *bench.tables(results),
    ]
    tables = {table.name: table for table in measured}
    headline = Table("headline", lambda _: _headline(declared["headline"], tables))
    return {
        "headline": headline,
        "aims": Table("aims", lambda _: _aims(declared["aims"], tables)),
        "methods": Table("methods", lambda _: _methods(METHODS)),
        **tables,
    }


def read_documents(paths: Sequence[Path], names: Collection[str]) -> dict[Path, str]:
    """The texts of documents that have a place for each of these tables.

    A place is ``<!-- table:NAME -->`` to ``<!-- /table:NAME -->``.
    """
    texts = {path: path.read_text(encoding="utf8") for path in paths}
    places = {place[2] for text in texts.values() for place in PLACE.finditer(text)}
    if lost := [name for name in names if name not in places]:
        raise ValueError(
            f"places such as <!-- table:{lost[0]} --> and <!-- /table:{lost[0]} --> are expected "
            f"in {', '.join(map(str, paths))} for {', '.join(lost)}; add the marks"
        )
    return texts


def fill(text: str, tables: Mapping[str, str]) -> str:
    """A document with these tables in their places."""
    return PLACE.sub(
        lambda place: (
            f"{place[1]}{tables[place[2]]}\n{place[3]}" if place[2] in tables else place[0]
        ),
        text,
    )


def _headline(headline: Mapping[str, Any], tables: Mapping[str, Table]) -> str:
    """The declared claims in Markdown: a line of another table each, and its best rivals."""
    lines = []
    for claim in headline["claims"]:
        table = tables[claim["table"]]
        measured = table.lines(table.rows())
        line = next(filter(has(**claim["line"]), measured), None)
        others = [other for other in measured if other is not line]
        rivals = [list(filter(has(**facts), others)) for facts in claim.get("rivals", ())]
        if line is None or not all(rivals):
            missing = f"not measured yet: `compress tables {claim['table']}`"
            unknown = dict.fromkeys(("measured", "best rival", "n"), missing)
            lines.append({"claim": claim["claim"]} | unknown)
            continue
        best = [_best(some, claim["best"]) for some in rivals] or [line]
        lines.append(
            {
                "claim": claim["claim"],
                "measured": claim["measured"].format_map(line),
                "best rival": "; ".join(claim["rival"].format_map(rival) for rival in best),
                "n": claim["n"].format_map(line),
            }
        )
    return f"{markdown(lines)}\n\n{headline['note']}"


def _best(lines: Sequence[Row], by: str) -> Row:
    """The best of the lines."""

    def value(line: Row) -> float:
        return float(functools.reduce(operator.getitem, by.split("."), line))  # type: ignore[arg-type]

    choose = min if metric(by.partition(".")[0]).better == "lower" else max
    return choose(lines, key=value)


def _aims(aims: Sequence[Mapping[str, Any]], tables: Mapping[str, Table]) -> str:
    """The declared aims in Markdown: how many rows of a table reach each, and what they say."""
    lines = []
    for aim in aims:
        table = tables[aim["table"]]
        measured = [
            line
            for line in table.lines(table.rows())
            if has(**aim["rows"])(line)
            and all(line[size] >= least for size, least in aim.get("from", {}).items())
        ]
        cells = {"aim": aim["aim"]}
        for place, on_cpu in (("on a GPU", False), ("on a CPU", True)):
            values = [
                _fact(line, aim["fact"]) for line in measured if on_cpu == (line["device"] == "cpu")
            ]
            cells[place] = "not measured"
            if values:
                reached = sum(
                    value >= aim["least"] if "least" in aim else value <= aim["most"]
                    for value in values
                )
                ends = dict.fromkeys(aim["format"].format(end(values)) for end in (min, max))
                cells[place] = f"reached in {reached} of {len(values)} rows: {' to '.join(ends)}"
        lines.append(cells)
    return markdown(lines)


def _fact(line: Row, name: str) -> float:
    """What a line says; of several ways, of ours."""
    value = line[name]
    return float(value[line["ours"]] if isinstance(value, Mapping) else value)


def _methods(methods: Mapping[str, type[Method]]) -> str:
    """What each method is, in Markdown."""
    return markdown(
        [
            {
                "method": f"`{name}`",
                "what it compresses": method.serves,
                "what it keeps fewer of": method.keeps,
                "paper": _linked(method.paper),
            }
            for name, method in methods.items()
        ]
    )


def _linked(paper: str) -> str:
    """A title with a link to arXiv where it ends in an id."""
    return re.sub(r", (\d{4}\.\d{5})$", r", [arXiv \1](https://arxiv.org/abs/\1)", paper)
