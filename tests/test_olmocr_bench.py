"""olmOCR-bench folders and tests: the definitions by hand, round trips, and damaged folders."""

import json
import random
import string
from dataclasses import replace
from typing import get_args

import pytest
from PIL import Image
from rapidfuzz.distance import Levenshtein

from compress.data.olmocr_bench import (
    AnyTest,
    BaselineTest,
    FootnoteTest,
    FormatTest,
    MathTest,
    OrderTest,
    PresenceTest,
    TableTest,
    normalise,
    read_olmocr_bench,
    write_olmocr_bench,
)
from compress.eval.olmocr_bench import near_matches, run_test, score_olmocr_bench

COMMON = {"pdf": "a.pdf", "page": 1, "id": "t"}


def present(text, **rest):
    return PresenceTest(**COMMON, type="present", text=text, **rest)


def absent(text, **rest):
    return PresenceTest(**COMMON, type="absent", text=text, **rest)


def order(before, after, **rest):
    return OrderTest(**COMMON, type="order", before=before, after=after, **rest)


def baseline(**rest):
    return BaselineTest(**COMMON, type="baseline", **rest)


def table(cell, **rest):
    return TableTest(**COMMON, type="table", cell=cell, **rest)


def form(text, kind, **rest):
    return FormatTest(**COMMON, type="format", text=text, format=kind, **rest)


def footnote(marker, **rest):
    return FootnoteTest(**COMMON, type="footnote", marker=marker, **rest)


MATH = MathTest(**COMMON, type="math", math="x^2")
MARKDOWN = "Text\n\n| | Q1 | Q2 |\n|---|---|---|\n| north | 10 | 20 |\n| south | 30 | 40 |\n"
SPANS = (
    "<table><thead><tr><th rowspan='2'>area</th><th colspan='2'>year</th></tr>"
    "<tr><th>2001</th><th>2002</th></tr></thead>"
    "<tr><td>north</td><td>10</td><td>20</td></tr><tr><td>south</td><td>30</td><td>40</td></tr>"
    "</table>"
)


def test_normalise():
    assert normalise("a<br/>b\n\n c") == "a b c"
    assert normalise("**bold** __bold__ *it* _it_ <b>b</b> <i>i</i>") == "bold bold it it b i"
    assert normalise("\u2018q\u2019 \u201cq\u201d a\u2014b\u2212c \uff3f \u00b5") == (
        "'q' \"q\" a-b-c _ \u03bc"
    )
    assert normalise("e\u0301") == "\u00e9"
    assert normalise("2 * 3\n4 * 5") == "2 * 3 4 * 5"


@pytest.mark.parametrize(
    ("test", "text", "passes"),
    [
        (present("the \u201cquick\u201d fox"), 'So **the**  "quick"\nfox ran', True),
        (present("the quick fox"), "the quick box", False),
        # one letter of 11 differs: 2 of 22 edits by insertion and deletion, 10/11 >= 10/11
        (present("a quick fox", max_diffs=1), "a quick box", True),
        (present("the quick fox", max_diffs=1), "the quirk box", False),
        (present("The"), "the", False),
        (present("The", case_sensitive=False), "the", True),
        (present("end", first_n=5), "begin and end", False),
        (present("end", last_n=5), "begin and end", True),
        (present("b a", first_n=1, last_n=2), "b x a", True),
        (present("and", first_n=4, last_n=4), "begin and end", False),
        # a blank page holds a space, as does the text
        (present("a long text", max_diffs=2), "\n", False),
        (absent("a long text"), "\n", True),
        (absent("page 7"), "The page  7", False),
        (absent("page 7"), "The page 8", True),
        (absent("page 7", max_diffs=1), "The page 8", False),
        (absent("page 7", last_n=5), "page 7 and much more", True),
        (order("first", "second"), "first, then second", True),
        (order("second", "first"), "first, then second", False),
        (order("first", "second"), "first only", False),
        (order("first", "second", max_diffs=1), "frst, then secnd", True),
        (order("first", "second"), "second first second", True),
        (baseline(), "Some text.", True),
        (baseline(), " --- \n", False),
        (baseline(), "text " + "ab" * 30, True),
        (baseline(), "text " + "ab" * 31, False),
        (baseline(max_repeats=40), "text " + "ab" * 31, True),
        # pieces of more than 5 characters may repeat
        (baseline(), "text " + "abcdef" * 40, True),
        (baseline(), "text \u4e2d", False),
        (baseline(), "text \U0001f600", False),
        (baseline(check_disallowed_characters=False), "text \u4e2d", True),
        (baseline(max_length=3), "abc --", True),
        (baseline(max_length=3), "abcd", False),
        (baseline(max_length=0), "![alt](a.png)", False),
        (baseline(max_length=0, max_length_skips_image_alt_tags=True), "![alt](a.png)", True),
        (form("Title", "heading"), "## The Title\ntext", True),
        (form("text", "heading"), "## The Title\ntext", False),
        (form("title", "heading", case_sensitive=False), "<H2 id=1>The\nTitle</H2>", True),
        (form("strong", "bold"), "a **strong** word", True),
        (form("strong", "bold"), "a <strong>strong</strong> word", True),
        (form("strong", "bold"), "a *strong* word", False),
        (form("line", "bold"), "one<br>line</b>", False),
        (form("slanted", "italic"), "a _slanted_ word", True),
        (form("slanted", "italic"), "a **slanted** word", False),
        (form("slantet", "italic", max_diffs=1), "a <em>slanted</em> word", True),
        (footnote("3"), "word[^3] and more", True),
        (footnote("3"), "[^3]: the note", False),
        (footnote("3"), "word<sup>3</sup>", True),
        (footnote("12"), "word\u00b9\u00b2", True),
        (footnote("*"), "word<sup>*</sup>", True),
        (footnote("3"), "word 3", False),
        (footnote("3", appears_before_marker="a word"), "Here: A  word.[^3] more", True),
        (footnote("3", appears_before_marker="a word"), "more[^3] a word", False),
        # not next to the mark
        (footnote("3", appears_before_marker="a word"), "a word, and long after it[^3]", False),
        (footnote("3", appears_after_marker="a word"), "text[^3], and long after it a word", False),
        (footnote("3", appears_after_marker="and more"), "word[^3] and more", True),
        (footnote("3", appears_after_marker="and more"), "and more[^3] word", False),
    ],
)
def test_definitions(test, text, passes):
    outcome = run_test(test, text)
    assert outcome.passed is passes
    assert bool(outcome.why) is not passes


# what the script's `normalize_text` (olmocr/bench/tests.py at f7cfe4c) makes of them
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("_ *it* _", " *it* "),
        ("* _it_ *", " _it_ "),
        ("*a_b*c_d", "a_bc_d"),
        ("**a __b** c__", "a b c"),
        ("*<b>*x**</b>", "x"),
        ("_<i>_u__</i>", "u"),
        ("***x***", "x"),
        ("__", ""),
        ("a*b\nc*d", "a*b c*d"),
    ],
)
def test_marks_close_in_the_order_of_the_script(text, expected):
    assert normalise(text) == expected


# letters and differences of which the script's floats say no: 91.66666666666666 / 100 is
# 0.9166666666666665, and 1 - 1 / 12 is 0.9166666666666666; in per cent both are equal
@pytest.mark.parametrize(
    ("letters", "differences", "passes"),
    [(12, 1, False), (15, 1, False), (24, 2, False), (36, 3, False)]
    + [(10, 1, True), (14, 1, True), (20, 2, True), (22, 2, True)],
)
def test_the_threshold_is_compared_in_the_floats_of_the_script(letters, differences, passes):
    text = string.ascii_letters[:letters]
    middle = letters // 2
    read = text[:middle] + "#" * differences + text[middle + differences :]
    rest = {"max_diffs": differences}
    assert run_test(present(text, **rest), read).passed is passes
    assert run_test(absent(text, **rest), read).passed is not passes
    assert run_test(form(text, "bold", **rest), f"**{read}**").passed is passes
    cells = f"<table><tr><td>{read}</td><td>{text}</td></tr></table>"
    assert run_test(table(text, left=text, **rest), cells).passed is passes
    marked = f"[^1]{read.replace('#', '0')}"
    assert run_test(footnote("1", appears_after_marker=text, **rest), marked).passed is passes


@pytest.mark.parametrize(
    ("test", "text", "corrected", "published"),
    [
        # the similarity is symmetric: a space matches any text with a space
        (present("a long text", max_diffs=2), "\n", False, True),
        (absent("a long text"), "\n", True, False),
        (form("a long text", "bold"), "**a**", False, True),
        (footnote("3", appears_before_marker="a long text"), "a[^3]", False, True),
        # <br> and <img> begin like <b> and <i>
        (form("line", "bold"), "one<br>line</b>", False, True),
        (form("line", "italic"), "<img src=x>line</i>", False, True),
        (form("line", "bold"), "<b class=x>line</b>", True, True),
        (present("a long text"), "It is a long text.", True, True),
        (footnote("3", appears_after_marker="a long text"), "[^3] a long text", True, True),
    ],
)
def test_where_the_script_is_at_odds_with_what_a_test_means(test, text, corrected, published):
    assert run_test(test, text).passed is corrected
    assert run_test(test, text, published=True).passed is published


@pytest.mark.parametrize(
    ("test", "text", "passes"),
    [
        (table("40"), "no table", False),
        (table("50"), MARKDOWN, False),
        (table("40", up="20", left="30"), MARKDOWN, True),
        (table("10", down="30", right="20"), MARKDOWN, True),
        (table("10", up="20"), MARKDOWN, False),
        (table("10", up="**"), MARKDOWN, True),
        (table("10", up="Q1"), MARKDOWN, True),
        (table("40", up="Q2"), MARKDOWN, False),
        (table("40", top_heading="Q2", left_heading="south"), MARKDOWN, True),
        (table("40", top_heading="Q1"), MARKDOWN, False),
        (table("40"), MARKDOWN.replace("40", "**40**"), True),
        (table("40", ignore_markdown_tables=True), MARKDOWN, False),
        # a cell has several neighbours where one of them spans
        (table("area", right="year"), SPANS, True),
        (table("area", right="2001"), SPANS, True),
        (table("year", down="2002"), SPANS, True),
        (table("2002", up="year", left="2001"), SPANS, True),
        # all headings all the way up, but none beside
        (table("40", top_heading="2002"), SPANS, True),
        (table("40", top_heading="year"), SPANS, True),
        (table("40", top_heading="2001"), SPANS, False),
        # no cell is marked on the left, so the last one counts
        (table("40", left_heading="south"), SPANS, True),
        (table("40", left_heading="30"), SPANS, False),
        (table("south", max_diffs=1), SPANS.replace("south", "sauth"), True),
        (table("south"), SPANS.replace("south", "sauth"), False),
        # at least half must agree, however many differences are allowed
        (table("40", max_diffs=2), "<table><tr><td>51</td></tr></table>", False),
    ],
)
def test_tables(test, text, passes):
    assert run_test(test, text).passed is passes


def every_match(wanted, text, max_diffs):
    """For each end in the text the match with the fewest differences, of equals the longest."""
    matches = []
    for end in range(1, len(text) + 1):
        edits, start = min(
            (Levenshtein.distance(wanted, text[start:end]), start) for start in range(end + 1)
        )
        if edits <= max_diffs:
            matches.append((edits, start - end, start))
    return matches


def test_near_matches_are_the_best_of_those_that_overlap():
    rng = random.Random(0)
    for _ in range(300):
        letters = rng.choice(("ab", "abc", "abcdefgh "))
        text = "".join(rng.choices(letters, k=rng.randrange(25)))
        wanted = "".join(rng.choices(letters, k=rng.randrange(3, 10)))
        max_diffs = rng.randrange(1, len(wanted) // 2 + 1)
        left, starts = every_match(wanted, text, max_diffs), []
        while left:
            group, size = [left.pop(0)], 0
            while size != len(group):
                size = len(group)
                for match in list(left):
                    _, length, start = match
                    if any(s < start - length and start < s - n for _, n, s in group):
                        group.append(match)
                        left.remove(match)
            starts.append(min(group)[2])
        assert near_matches(wanted, text, max_diffs) == sorted(starts), (wanted, text, max_diffs)


# what fuzzysearch 0.8.1 finds
@pytest.mark.parametrize(
    ("wanted", "text", "max_diffs", "starts"),
    [
        ("PATTERN", "---PATERN---PATTERN", 1, [3, 12]),
        ("aa", "aaaa", 0, [0, 1, 2]),
        ("a.b", "axb a.b", 0, [4]),
        ("the quick brown fox", "a teh quikc brown fox, the quick brown fax", 4, [2, 23]),
        ("the quick brown fox", "a teh quikc brown fox", 3, []),
        ("\u4e2d\u6587\u6587\u672c", "x \u4e2d\u6587\u672c", 1, [2]),
        ("word", "", 1, []),
    ],
)
def test_near_matches_agree_with_fuzzysearch(wanted, text, max_diffs, starts):
    assert near_matches(wanted, text, max_diffs) == starts


def test_formulas_are_skipped_and_never_passed(bench):
    assert run_test(MATH, "$x^2$").passed is None
    files = {"math": (MATH,), "mixed": (present("a"), replace(MATH, id="m"))}
    found = score_olmocr_bench(replace(bench, files=files), {("a.pdf", 1): ["a $x^2$"]})
    assert found.skipped == {"math": 1, "mixed": 1}
    # the files mixed and baseline
    assert set(found.metrics) == {"score_without_math", "pass_rate_mixed", "pass_rate_baseline"}
    assert found.metrics["score_without_math"].n == 2
    assert "2 tests of formulas skipped" in found.metrics["score_without_math"].how
    only = replace(bench, files={"math": (MATH, replace(baseline(), pdf="b.pdf"))}, pdfs=())
    with pytest.raises(ValueError, match="all 1 are skipped"):
        score_olmocr_bench(replace(only, files={"math": (MATH,)}), {("a.pdf", 1): ["a"]})


def test_score_is_the_mean_over_files_not_over_tests(bench):
    ids = iter(range(100))

    def tests(*texts):
        return tuple(replace(present(text), id=str(next(ids))) for text in texts)

    files = {"one": tests("a", "b", "x", "y"), "two": tests("a"), "baseline": (baseline(),)}
    found = score_olmocr_bench(replace(bench, files=files), {("a.pdf", 1): ["a b"]})
    assert found.metrics["score"].value == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert found.metrics["score"].n == 6 and found.skipped == {}
    assert found.metrics["pass_rate_one"].value == 0.5
    low, high = found.metrics["score"].ci95
    # only the first file varies: between 0 and 4 of 4
    assert low == pytest.approx((0 + 2) / 3) and high == pytest.approx((1 + 2) / 3)
    assert {t for t, o in found.outcomes["one"].items() if not o.passed} == {"2", "3"}


@pytest.mark.parametrize(
    ("texts", "passed"),
    [(["a"], True), (["b"], False), (["a", "b"], False), (["a", "b", "a"], True)],
)
def test_more_than_half_of_the_repeats_must_pass(bench, texts, passed):
    files = {"one": (present("a"),)}
    found = score_olmocr_bench(replace(bench, files=files), {("a.pdf", 1): texts})
    assert found.outcomes["one"]["t"].passed is passed


def test_a_file_called_baseline_is_not_the_tests_that_are_added(bench):
    files = {"baseline": (replace(present("a"), id="1"), replace(present("b"), id="2"))}
    scores = score_olmocr_bench(replace(bench, files=files), {("a.pdf", 1): ["a"]})
    assert scores.metrics["score"].value == (1 / 2 + 1) / 2
    assert set(scores.outcomes) == {"baseline", "baseline_added"}


def test_documents_without_a_baseline_test_get_one(bench):
    found = score_olmocr_bench(replace(bench, files={"one": (present("a"),)}), {("a.pdf", 1): [""]})
    assert found.outcomes["baseline"]["a.pdf_baseline"].passed is False
    own = {"one": (baseline(),)}
    found = score_olmocr_bench(replace(bench, files=own), {("a.pdf", 1): ["a"]})
    assert "baseline" not in found.outcomes


ALL_KINDS = (
    replace(present("a", first_n=3), id="1", url="https://example.org", checked="verified"),
    replace(absent("b", case_sensitive=False), id="2"),
    replace(order("abc", "def", max_diffs=1), id="3"),
    replace(table("\u00e9", up="x"), id="4"),
    replace(baseline(max_length=3), id="5"),
    replace(form("a", "bold"), id="6"),
    replace(footnote("1", appears_after_marker="x"), id="7"),
    replace(MATH, id="8"),
)


@pytest.fixture
def bench(tmp_path):
    tests = {"all_kinds": ALL_KINDS}
    return write_olmocr_bench(tmp_path / "bench", tests, {"a.pdf": [Image.new("L", (40, 60))]})


def test_folder_round_trip(bench, tmp_path):
    assert {type(test) for test in ALL_KINDS} == set(get_args(AnyTest))
    assert bench.files == {"all_kinds": ALL_KINDS} and bench.pdfs == ("a.pdf",)
    assert read_olmocr_bench(tmp_path / "bench") == bench
    assert (tmp_path / "bench" / "pdfs" / "a.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(bench.image(("a.pdf", 1))) as image:
        assert image.size == (40, 60)


def test_documents_in_subfolders(tmp_path):
    tests = {"one": [replace(present("x"), pdf="sub/b.pdf", page=2)]}
    images = [Image.new("RGB", (20, 20))] * 2
    bench = write_olmocr_bench(tmp_path / "bench", tests, {"sub/b.pdf": images})
    assert bench.pages == (("sub/b.pdf", 1), ("sub/b.pdf", 2))
    outputs = {("sub/b.pdf", 1): ("one",), ("sub/b.pdf", 2): ("x", "\u00e9", "x")}
    assert score_olmocr_bench(bench, outputs).metrics["score"].value == 1
    with pytest.raises(ValueError, match="1 have none, the first is page 1 of sub/b.pdf"):
        score_olmocr_bench(bench, {("sub/b.pdf", 2): ["x"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "presence"}, "tag 'presence' found .*does not match any of the expected tags"),
        ({"threshold": 0.9}, "present.threshold: Unexpected keyword argument"),
        ({"text": None}, "present.text: .*valid string, got None"),
        ({"max_diffs": "1"}, "max_diffs: .*valid integer, got '1'"),
        ({"max_diffs": True}, "max_diffs: .*valid integer, got True"),
        ({"max_diffs": -1}, "max_diffs: .*greater than or equal to 0, got -1"),
        ({"text": " "}, "text: .*must not be empty"),
        ({"id": ""}, "present.id: .*at least 1 character"),
        ({"pdf": "z.pdf"}, "z.pdf of test 1 in all_kinds.jsonl is not there"),
    ],
)
def test_damaged_tests(bench, change, message):
    path = bench.folder / "all_kinds.jsonl"
    entry = json.loads(path.read_text().splitlines()[0]) | change
    path.write_text("\n" + json.dumps(entry))
    with pytest.raises(ValueError, match=message) as raised:
        read_olmocr_bench(bench.folder)
    assert "pdf" in change and change["pdf"] or "all_kinds.jsonl, line 2" in str(raised.value)


def test_damaged_folders(bench, tmp_path):
    path = bench.folder / "all_kinds.jsonl"
    line = path.read_text().splitlines()[0]
    path.write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match="line 2: ids should be unique in a file; '1'"):
        read_olmocr_bench(bench.folder)
    entry = json.loads(line)
    del entry["text"]
    path.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match="line 1 .*present.text: Field required"):
        read_olmocr_bench(bench.folder)
    path.write_bytes(b"{\xff")
    with pytest.raises(ValueError, match="all_kinds.jsonl should be UTF-8 .* at byte 1"):
        read_olmocr_bench(bench.folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"found 0 and 1 of them"):
        read_olmocr_bench(bench.folder)
    with pytest.raises(ValueError, match=r"found 0 and 0 of them in .*nowhere"):
        read_olmocr_bench(tmp_path / "nowhere")


def test_impossible_tests_and_folders(tmp_path):
    with pytest.raises(ValueError, match="at most half of either text"):
        order("abcd", "abcdef", max_diffs=3)
    # valid as it is written, and empty for the script, which normalises first
    with pytest.raises(ValueError, match="(?s)text.*must not be empty"):
        present("__")
    with pytest.raises(ValueError, match="(?s)before.*must not be empty"):
        order("<b></b>", "abc")
    with pytest.raises(ValueError, match="at most half of either text"):
        order("**abcd**", "abcdef", max_diffs=3)
    with pytest.raises(ValueError, match="(?s)appears_after_marker.*must not be empty"):
        footnote("1", appears_after_marker="**")
    with pytest.raises(ValueError, match="(?s)format.*'heading', 'bold' or 'italic'"):
        form("a", "underlined")
    with pytest.raises(ValueError, match="(?s)marker.*match pattern"):
        footnote("a b")
    for pages in ({"a.pdf": []}, {"a.png": [Image.new("L", (2, 2))]}):
        with pytest.raises(ValueError, match=r"called \*.pdf and have at least one page"):
            write_olmocr_bench(tmp_path / "bench", {"one": [present("a")]}, pages)
    with pytest.raises(ValueError, match="z.pdf of test t in one.jsonl"):
        tests = {"one": [replace(present("a"), pdf="z.pdf")]}
        write_olmocr_bench(tmp_path / "bench", tests, {"a.pdf": [Image.new("L", (2, 2))]})
    assert not (tmp_path / "bench").exists()
