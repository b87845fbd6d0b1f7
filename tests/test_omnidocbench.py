"""OmniDocBench folders and scores: hand-computed pages, round trips, and damaged folders."""

import json
import random

import pytest
from PIL import Image

from compress.data.omnidocbench import (
    Block,
    Page,
    read_omnidocbench,
    write_omnidocbench,
)
from compress.eval.omnidocbench import (
    match_blocks,
    normalise_formula,
    normalise_text,
    published_formula,
    published_text,
    score_omnidocbench,
    score_page,
    split_markdown,
)
from compress.eval.text_metrics import Errors

TABLE = "<table><tr><td>a</td><td>b</td></tr></table>"
WORSE = "<table><tr><td>a</td><td>x</td></tr></table>"


def page(*blocks, image="one.png", truncated=()):
    return Page(image=image, width=8, height=6, blocks=blocks, truncated=truncated)


def block(text, order, category="text_block", **rest):
    return Block(category=category, anno_id=order, order=order, text=text, **rest)


PAGE = page(
    block("A heading", 1, "title"),
    block("The first paragraph of it.", 2),
    Block(category="table", anno_id=3, order=3, html=TABLE),
    Block(category="equation_isolated", anno_id=4, order=4, latex="\\[ x^2 \\]"),
    block("The last words are here.", 5),
    Block(category="page_number", anno_id=6, text="17"),
)
PERFECT = (
    f"# A heading\n\nThe first paragraph of it.\n\n{TABLE}\n\n$$x^2$$\n\nThe last words are here."
)


def test_a_perfect_page():
    result = score_page(PAGE, PERFECT)
    assert result.text.edits == result.formula.edits == result.reading_order == 0
    assert result.text.length == len("AheadingThefirstparagraphofitThelastwordsarehere")
    assert result.teds == result.teds_structure == 1


def test_an_empty_prediction_is_as_wrong_as_can_be():
    result = score_page(PAGE, "")
    assert result.text.rate == result.formula.rate == result.reading_order == 1
    assert result.teds == result.teds_structure == 0


def test_page_sums_and_page_averages_by_hand():
    pages = [
        page(block("abcdefgh", 1), block("ij", 2), image="a.png"),
        page(block("klmn", 1), image="b.png"),
    ]
    # page a: 1 of 8 and 2 of 2, page b: 0 of 4
    found = score_omnidocbench(pages, {"a.png": "abcdefgX\n\nYZ", "b.png": "klmn"}).metrics
    assert found["text_edit"].value == pytest.approx((3 / 10 + 0) / 2)
    assert found["text_edit_whole"].value == pytest.approx(3 / 14)
    assert found["text_edit"].n == 2 and found["text_edit"].ci95 == pytest.approx((0, 0.3))


def test_tables_are_averaged_per_page_first():
    def tables(image, count):
        blocks = [
            Block(category="table", anno_id=i, order=i, html=TABLE.replace("b", "b" * i))
            for i in range(1, count + 1)
        ]
        return page(*blocks, image=image)

    predictions = {
        "a.png": "\n".join(TABLE.replace("b", "b" * i) for i in (1, 2, 3)),
        "b.png": WORSE,
        "c.png": "text",
    }
    pages = [tables("a.png", 3), tables("b.png", 1), page(block("text", 1), image="c.png")]
    found = score_omnidocbench(pages, predictions).metrics
    # 1 row, 2 cells: one cell wrong costs 1 of 3
    assert found["teds"].value == pytest.approx((1 + 2 / 3) / 2) and found["teds"].n == 2
    assert found["teds_structure"].value == 1


def test_overall_is_called_a_proxy_without_cdm():
    pages, predictions = (
        [PAGE],
        {"one.png": PERFECT.replace("x^2", "y^2").replace("b</td>", "</td>")},
    )
    proxy = score_omnidocbench(pages, predictions).metrics
    assert "overall" not in proxy
    # the formula x^2 has 3 characters, one wrong
    assert proxy["formula_edit"].value == pytest.approx(1 / 3)
    assert proxy["overall_proxy"].value == pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 3)
    assert "1 - formula_edit (in place of CDM)" in proxy["overall_proxy"].how


def test_the_proxy_leaves_out_what_no_page_has():
    found = score_omnidocbench([page(block("abcd", 1))], {"one.png": "abcX"}).metrics
    assert found["overall_proxy"].value == pytest.approx(75)
    assert found["overall_proxy"].how == "mean of 1 - text_edit"
    assert "teds" not in found and "formula_edit" not in found


def test_reading_order_is_the_order_of_the_prediction():
    text = "The last words are here.\n\nThe first paragraph of it.\n\n# A heading"
    result = score_page(PAGE, text)
    assert result.text.edits == 0
    # 5, 2, 1 for 1, 2, 5
    assert result.reading_order == pytest.approx(2 / 3)


def test_a_split_paragraph_and_two_run_together():
    text = "# A heading\n\nThe first\n\nparagraph of it.\n\nThe last words are here."
    assert score_page(PAGE, text).text.edits == 0
    joined = page(block("One short line of text.", 1), block("And a second line of it.", 2))
    result = score_page(joined, "One short line of text. And a second line of it.")
    assert result.text.edits == 0 and result.reading_order == 0


def test_truncated_blocks_are_one():
    parts = (block("The first half of", 1), block("a sentence.", 3), block("Between them.", 2))
    text = "The first half of a sentence.\n\nBetween them."
    joined = score_page(page(*parts, truncated=((1, 3),)), text)
    assert joined.text.edits == 0 and joined.reading_order == 0


def test_headers_and_ignored_blocks_are_not_held_against_a_page():
    blocks = (
        block("Chapter seven of the book", 1, "header"),
        block("The only text.", 2),
        Block(category="text_block", anno_id=3, order=3, text="Illegible", ignore=True),
    )
    text = "Chapter seven of the book\n\nThe only text."
    assert score_page(page(*blocks), text).text == Errors(0, len("Theonlytext"))


def test_surplus_blocks_cost_nothing():
    result = score_page(page(block("The only text.", 1)), "The only text.\n\nAnd something else")
    assert result.text.edits == 0


def test_matching():
    assert match_blocks(["aaaa", "bbbb"], ["bbbb", "aaaa"]) == [([0], [1]), ([1], [0])]
    assert match_blocks(["aaaa", "bbbb"], ["bbbx"]) == [([0], []), ([1], [0])]
    assert match_blocks(["aaaabbbb"], ["aaaa", "bbbb"]) == [([0], [0, 1])]
    assert match_blocks(["aaaa", "bbbb"], ["aaaabbbb"]) == [([0, 1], [0])]
    assert match_blocks([], ["a"]) == [] and match_blocks(["a"], []) == [([0], [])]


def test_splitting_markdown():
    text = (
        "```markdown\n# Head\n\n![alt](image.png)\nOne\nline $x$.\n\n| a | b |\n|---|---|\n"
        "| 1 | 2 |\n\n\\[y\n= 1\\]\nmore\n<TABLE><tr><td>\n\nc</td></tr></TABLE>end\n```"
    )
    assert [(b.kind, b.content) for b in split_markdown(text)] == [
        ("text", "# Head"),
        ("text", "One\nline $x$."),
        (
            "table",
            "<table><tr><th>a</th><th>b</th></tr><tr><th>1</th><td>2</td></tr></table>",
        ),
        ("formula", "\\[y\n= 1\\]"),
        ("text", "more"),
        ("table", "<TABLE><tr><td>\n\nc</td></tr></TABLE>"),
        ("text", "end"),
    ]
    assert [b.content for b in split_markdown("one\ntwo")] == ["one", "two"]
    assert split_markdown(" \n\n ") == []


def test_normalising():
    assert normalise_text("**A** <b>b</b>, c-d_1 \u00e9\u4e2d!\n") == "Abcd_1\u00e9\u4e2d"
    assert normalise_text("1 < 2 and 3 > 2") == "12and32"
    assert normalise_formula("$$ \\mathrm{A} \\left( x \\right) \\tag{3} . $$") == "{a}(x)"
    assert normalise_formula("\\[\\textstyle\\]") == "\\textstyle"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"a \\ b", r"a \\b"),
        (r"a \\ , b", r"a\\,b"),
        (r"a \\[2pt] b", r"a\\b"),
        (r"a \\* [ -1.5 ex ] b", r"a\\b"),
        (r"a\,b\;c\!d\ e~f\quad g", "abcdefg"),
        (r"\{ a \}", r"\{a\}"),
        (r"\alpha b", "\\alpha\nb"),
        (r"\alpha\, b", r"\alpha b"),
        (r"\alpha 2", r"\alpha2"),
        (r"\left\{ a \right)", r"\{a)"),
        (r"\mathrm{A} \bm x", r"{A}x"),
        (r"\operatorname*{max} x", r"{max}x"),
        (r"\begin{aligned} a \tag*{3} \label{eq:a_{1}} \end{aligned}", "a"),
        (r"\setlength{\arraycolsep}{2pt} a", "a"),
        (r"\setlength\arraycolsep{2pt}\arraycolsep=1.4pt a\hspace*{1em}\mkern-3mu b", "ab"),
        (r"\[ x \]", "$$x$$"),
        (r"\[[a, b]\]", r"\([a,b]\)"),
        ("x^2 .", "$x^2$"),
    ],
)
def test_formulas_that_are_equal_in_tex(one, other):
    assert normalise_formula(one) == normalise_formula(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\alpha b", r"\alphab"),
        (r"a \\ b", r"a b"),
        (r"a\\,b", r"a\,b"),
        (r"a\\quad", r"a\quad"),
        (r"\leftarrow", r"arrow"),
        (r"\rightarrow", r"\leftarrow"),
        (r"\textstyle a", "stylea"),
        (r"\{a\}", "{a}"),
        (r"\\[x]y", r"\\y"),
        (r"a \% b", r"a b"),
        ("a * b", "ab"),
        ("(a)", r"\(a\)"),
    ],
)
def test_formulas_that_differ_in_tex(one, other):
    assert normalise_formula(one) != normalise_formula(other)


# what OmniDocBench makes of them (`normalized_formula` of utils/data_preprocess.py)
@pytest.mark.parametrize(
    ("latex", "expected"),
    [
        (r"a \\ b", r"a\\b"),
        (r"\alpha b", r"\alphab"),
        (r"a\,b", r"a\,b"),
        (r"x \label{e} \tag{3}", r"x\label{e}"),
        (r"a \leftarrow b \rightarrow c", "aarrowbarrowc"),
        (r"\textstyle X", "stylex"),
        (r"$$\[ x \]$$", "x"),
        (r"\[ x \]", "x"),
        (r"a \\[2pt] b \]", "2pt]b"),
        ("x^2 .", "x^2"),
        ("x^2.", "x^2"),
        (r"\begin{array}{cc} a & b \end{array}", "{cc}a&b"),
        (r"\mathbfcal{A}", "cal{a}"),
        (r"\te xt", ""),
    ],
)
def test_published_formulas(latex, expected):
    assert published_formula(latex) == expected


def test_published_text():
    assert published_text("and/not a/t the\tend") == "andotatheend"
    assert published_text(r"\theta, \nu") == "hetau"
    assert published_text("<b>x</b> 1") == "bxb1"
    assert normalise_text("and/not <b>x</b>") == "andnotx"


def test_published_rules_on_a_page():
    formula = Block(category="equation_isolated", anno_id=2, order=2, latex="x^2+y")
    one = page(block("The first paragraph.", 1), formula)
    text = "The first paragraph.\n\nx^2+z"
    corrected, published = (score_page(one, text, published=p) for p in (False, True))
    # the formula is read as a text: x2z for x^2+y, or for x2y
    assert corrected.formula == Errors(3, 5) and corrected.text == Errors(0, 17)
    assert published.formula is None and published.text == Errors(1, 17 + 3)
    assert published.reading_order == corrected.reading_order == 0
    as_formula = score_page(one, text.replace("x^2+z", "$$x^2+z$$"), published=True)
    assert as_formula.formula == Errors(1, 5) and as_formula.text == Errors(0, 17)
    lost = score_page(one, "The first paragraph.", published=True)
    assert lost.formula == Errors(5, 5)

    hidden = page(block("abcd", 1), block("efgh", 2, ignore=True))
    assert score_page(hidden, "abcd").text == Errors(0, 4)
    assert score_page(hidden, "abcd", published=True).text == Errors(4, 8)


@pytest.mark.parametrize(
    ("relations", "corrected", "published"),
    [
        ([(1, 2)], ["ab", "c", "d"], ["ab", "c", "d"]),
        ([(2, 1)], ["ab", "c", "d"], ["ab", "c", "d"]),
        # the part that two relations name is there twice
        ([(1, 2), (2, 3)], ["abc", "d"], ["abbc", "d"]),
        # a relation goes to both groups that it touches, and joins none
        ([(1, 2), (3, 4), (2, 3)], ["abcd"], ["abbc", "bccd"]),
    ],
)
def test_truncated_parts(relations, corrected, published):
    texts = ["a" * 9, "b" * 9, "c" * 9, "d" * 9]
    one = page(*(block(t, i) for i, t in enumerate(texts, 1)), truncated=tuple(relations))
    for rules, expected in ((False, corrected), (True, published)):
        whole = ["".join(letter * 9 for letter in group) for group in expected]
        result = score_page(one, "\n\n".join(whole), published=rules)
        assert result.text == Errors(0, sum(map(len, whole)))


def test_ignored_parts_are_not_read_with_the_others():
    parts = (block("The first half", 1), block("unreadable", 2, ignore=True))
    one = page(*parts, truncated=((1, 2),))
    assert score_page(one, "The first half").text == Errors(0, 12)


def test_published_scores_say_so():
    scores = score_omnidocbench([PAGE], {"one.png": PERFECT}, published=True).metrics
    assert all("the published script's rules" in value.how for value in scores.values())


def test_formulas_agree_with_a_scanner_that_goes_letter_by_letter():
    rng = random.Random(0)
    pieces = ["a", "b", "2", " ", "{", "}", "\\", "\\\\", r"\alpha", r"\left", r"\,", "^", ",", "["]
    for _ in range(500):
        latex = "".join(rng.choices(pieces, k=rng.randrange(12)))
        assert normalise_formula(latex) == by_letters(latex), latex


def by_letters(latex):
    """An independent reading of `normalise_formula` for formulas without arguments."""
    kept, place = [], 0
    while place < len(latex):
        end = place + 1
        if latex[place] == "\\" and end < len(latex):
            end += 1
            while latex[place + 1].isalpha() and latex[end : end + 1].isalpha():
                end += 1
        token, place = latex[place:end], end
        if token.isspace() or token in (r"\left", r"\,", "\\ ", r"\["):
            continue
        if kept and kept[-1][1:].isalpha() and kept[-1][0] == "\\" and token.isalpha():
            kept.append(" ")
        kept.append(token)
    return "".join(kept).strip(".").lower()


def test_folder_round_trip(tmp_path):
    pages = [
        PAGE,
        page(block("x", 1, poly=(0.0, 0.5, 1.0, 2.0)), image="two.jpg", truncated=((1, 1),)),
    ]
    images = [Image.new("RGB", (8, 6), colour) for colour in ("white", "black")]
    write_omnidocbench(tmp_path / "set", pages, images)
    assert read_omnidocbench(tmp_path / "set") == pages
    with Image.open(tmp_path / "set" / "images" / "one.png") as image:
        assert image.size == (8, 6)
    predictions = {"one.png": "a\r\n\u00e9", "two.jpg": ""}
    assert score_omnidocbench(pages, predictions).metrics["teds"].value == 0


@pytest.fixture
def folder(tmp_path):
    write_omnidocbench(tmp_path / "set", [PAGE], [Image.new("L", (8, 6))])
    return tmp_path / "set"


def test_what_is_null_is_not_known(folder):
    path = folder / "OmniDocBench.json"
    [page] = json.loads(path.read_text())
    page["page_info"].update(page_no=None, page_attribute=None)
    page["extra"]["relation"] = None
    path.write_text(json.dumps([page]))
    [found] = read_omnidocbench(folder)
    assert (found.page_no, found.attribute, found.truncated) == (0, {}, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[0].pop("page_info"), r"0.page_info.image_path: Field required"),
        (lambda d: d[0]["page_info"].update(width="8"), "width: .*integer, got '8'"),
        (lambda d: d[0]["layout_dets"][2].pop("anno_id"), "0.layout_dets.2.anno_id: Field"),
        (lambda d: d[0]["layout_dets"].insert(0, 3), "0.layout_dets.0: .*got 3"),
        (lambda d: d[0]["page_info"].update(image_path="b.png"), "1 are missing.*b.png"),
        (lambda d: d.append(d[0]), "2 pages lead to one.md"),
        (lambda d: d.clear(), "at least 1 item"),
        (
            lambda d: d[0]["extra"]["relation"].append(
                {"source_anno_id": 1, "target_anno_id": 99, "relation_type": "truncated"}
            ),
            "anno_id 99 is none of them",
        ),
    ],
)
def test_damaged_annotations(folder, change, message):
    path = folder / "OmniDocBench.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_omnidocbench(folder)


def test_missing_and_corrupt_files(folder, tmp_path):
    with pytest.raises(ValueError, match=r"OmniDocBench.json; .*nowhere.* does not exist"):
        read_omnidocbench(tmp_path / "nowhere")
    (folder / "OmniDocBench.json").write_text("[{")
    with pytest.raises(ValueError, match="OmniDocBench.json should hold .*Invalid JSON"):
        read_omnidocbench(folder)


def test_impossible_folders_and_scores(tmp_path):
    with pytest.raises(ValueError, match="1 pages and 0 images"):
        write_omnidocbench(tmp_path / "a", [PAGE], [])
    with pytest.raises(ValueError, match="one.png should be 8x6.*got 8x8"):
        write_omnidocbench(tmp_path / "a", [PAGE], [Image.new("L", (8, 8))])
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="of 1 pages 1 have none, the first is one.png"):
        score_omnidocbench([PAGE], {})
    bare = page(block("a", 1, "header"))
    with pytest.raises(ValueError, match="no page has any of them"):
        score_omnidocbench([bare], {"one.png": ""})
