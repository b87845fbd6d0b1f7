"""TEDS: laws, hand-computed cases, and a brute-force tree edit distance as reference."""

import random
from functools import cache

import pytest
from rapidfuzz.distance import Levenshtein

from compress.eval.table_similarity import (
    Cell,
    html_tables,
    markdown_tables,
    table_html,
    teds,
)


def table(*rows):
    return table_html(tuple(tuple(Cell(text) for text in row) for row in rows))


def random_table(generator):
    def cell():
        text = "".join(generator.choices("abc", k=generator.randint(0, 3)))
        return Cell(text, generator.choice((1, 1, 2)), generator.choice((1, 1, 3)))

    rows = [
        [cell() for _ in range(generator.randint(1, 3))] for _ in range(generator.randint(1, 3))
    ]
    return tuple(map(tuple, rows))


def brute_force(one, two, structure_only):
    """Edit distance of ordered forests by its recursive definition, without a library."""

    def tree(given):
        return (
            ("table",),
            "",
            tuple(
                (
                    ("tr",),
                    "",
                    tuple(
                        (("td", c.rowspan, c.colspan), "" if structure_only else c.text, ())
                        for c in row
                    ),
                )
                for row in given
            ),
        )

    @cache
    def size(forest):
        return sum(1 + size(node[2]) for node in forest)

    @cache
    def distance(a, b):
        if not a or not b:
            return size(a) + size(b)
        x, y = a[-1], b[-1]
        exchange = 1.0 if x[0] != y[0] else Levenshtein.normalized_distance(x[1], y[1])
        return min(
            distance(a[:-1] + x[2], b) + 1,
            distance(a, b[:-1] + y[2]) + 1,
            distance(a[:-1], b[:-1]) + distance(x[2], y[2]) + exchange,
        )

    one, two = tree(one), tree(two)
    return 1 - distance((one,), (two,)) / (max(size((one,)), size((two,))) - 1)


@pytest.mark.parametrize("structure_only", [False, True])
def test_teds_is_that_of_the_definition(structure_only):
    generator = random.Random(0)
    for _ in range(40):
        one, two = random_table(generator), random_table(generator)
        found = teds(table_html(one), table_html(two), structure_only=structure_only)
        assert found == pytest.approx(brute_force(one, two, structure_only))
        back = teds(table_html(two), table_html(one), structure_only=structure_only)
        assert found == pytest.approx(back) and found <= 1


def test_equal_tables():
    generator = random.Random(1)
    for _ in range(10):
        given = table_html(random_table(generator))
        assert teds(given, given) == teds(given, given, structure_only=True) == 1


def test_by_hand():
    whole = table("ab", "cd"), table("ab", "cx")
    # 2 rows and 4 cells, one of which has another letter
    assert teds(*whole) == pytest.approx(1 - 1 / 6)
    # half of the letters of one cell of one row
    assert teds(table(["ab"]), table(["ax"])) == pytest.approx(1 - 0.5 / 2)
    assert teds(*whole, structure_only=True) == 1
    # a row of two cells is missing: 3 of 6 nodes
    assert teds(table("ab"), table("ab", "cd")) == pytest.approx(0.5)
    # a cell with another span is another node
    spans = "<table><tr><td colspan='2'>a</td></tr></table>"
    assert teds(spans, table("a")) == pytest.approx(0.5)


def test_headings_and_sections_count_like_cells():
    dressed = (
        "<table border='1'><thead><tr><th>a</th></tr></thead>"
        "<tbody><tr><td> <b>b</b>\n c</td></tr></tbody></table>"
    )
    assert teds(dressed, "<table><tr><td>a</td></tr><tr><td>b c</td></tr></table>") == 1


def test_a_prediction_without_a_table():
    for text in ("", "no table", "<table></table>", "<table><tr></tr></table>", "\x00<"):
        assert teds(text, table("a")) == 0
    with pytest.raises(ValueError, match="must hold an HTML <table>.*'no table'"):
        teds(table("a"), "no table")


def test_reading_html():
    [outer, inner] = html_tables(
        "Text <table><thead><tr><td rowspan='2'>a<br>b</td><td colspan=x>&lt;c</td></tr></thead>"
        "<tr><td rowspan=0>d<table><tr><th>in</th></tr></table></td></tr><tr></tr></table> end"
    )
    assert outer == (
        (Cell("a\nb", 2, 1, True), Cell("<c", 1, 1, True)),
        (Cell("din", 2, 1),),
        (),
    )
    assert inner == ((Cell("in", heading=True),),)


def test_spans_are_bounded():
    [found] = html_tables("<table><tr><td colspan='999999999' rowspan='-3'>a</td></tr></table>")
    assert found == ((Cell("a", 1, 1000),),)


def test_reading_markdown():
    text = "| h | i |\n|---|:-:|\n| 1 | 2 |\n\nx | y\nnot a row\na | b\nc | d | e"
    first, second = markdown_tables(text)
    assert first == (
        (Cell("h", heading=True), Cell("i", heading=True)),
        (Cell("1", heading=True), Cell("2")),
    )
    assert [[cell.text for cell in row] for row in second] == [["a", "b"], ["c", "d", "e"]]
    assert markdown_tables("|---|\n|---|") == markdown_tables("") == []


def test_writing_and_reading():
    generator = random.Random(2)
    given = (*random_table(generator), (Cell("<a> & b\nc", heading=True),))
    assert html_tables(table_html(given)) == [given]
