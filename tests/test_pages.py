"""Laws of rendered pages: pure functions, exact ground truth, splits that share no text."""

import random
import string
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from fontTools import agl
from fontTools.ttLib import TTFont
from PIL import ImageDraw

from compress.data.fonts import FONTS, SEEN_FONTS, UNSEEN_FONT, font_file, load_font
from compress.data.page_text import ALPHABET, PUNCTUATION, SPLITS, make_line, make_word, split_of
from compress.data.pages import DOCUMENT, LINE, PAGE, page

CLEAN = replace(DOCUMENT, wear=0.0)


def words(pages):
    """Everything between white space, without the markup."""
    return {word for p in pages for block in p.blocks for word in block.text.split()}


def ink(image, paper=255, level=0.5):
    """Where an image is darker than half-way between paper and black."""
    return np.asarray(image) < paper * level


# ---- what a page is a function of ----------------------------------------------------------


@pytest.mark.parametrize("difficulty", [LINE, PAGE, DOCUMENT], ids=["line", "page", "document"])
def test_the_same_arguments_give_the_same_page(difficulty):
    one = page(3, 5, difficulty, "train")
    random.seed(1)
    state = random.getstate(), np.random.get_state()[1].tobytes()
    two = page(3, 5, difficulty, "train")
    assert (one.image.tobytes(), one.text, one.blocks) == (
        two.image.tobytes(),
        two.text,
        two.blocks,
    )
    # the global generators are neither read nor moved
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == state
    assert one.image.mode == "L" and one.image.size == difficulty.size


def test_seed_index_and_split_each_give_another_page():
    pages = [page(s, i, LINE, split) for s in (0, 1) for i in range(5) for split in SPLITS]
    assert len({p.text for p in pages}) == len({p.image.tobytes() for p in pages}) == 30


# ---- splits --------------------------------------------------------------------------------


def test_no_word_occurs_in_two_splits():
    shown = {
        split: words(
            [page(7, i, LINE, split) for i in range(150)]
            + [page(0, i, CLEAN, split) for i in range(6)]
        )
        for split in SPLITS
    }
    assert not shown["train"] & shown["validation"]
    assert not shown["train"] & shown["test"]
    assert not shown["validation"] & shown["test"]
    assert all({split_of(word) for word in shown[split]} == {split} for split in SPLITS)
    assert min(len(s) for s in shown.values()) > 200


def test_a_tenth_of_all_words_each_is_for_validation_and_test():
    rng = random.Random(0)
    drawn = ["".join(rng.choices(ALPHABET, k=6)) for _ in range(5000)]
    share = {split: sum(split_of(w) == split for w in drawn) / 5000 for split in SPLITS}
    # a byte modulo 10 gives 26/256 to the first six; five standard errors are 0.02
    assert share == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.025)


def test_the_unseen_font_is_for_the_test_split_only():
    assert UNSEEN_FONT not in SEEN_FONTS and len(SEEN_FONTS) == len(FONTS) - 1
    assert all(d.fonts == SEEN_FONTS for d in (LINE, PAGE, DOCUMENT))
    unseen = replace(LINE, fonts=(UNSEEN_FONT,))
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match=f"{UNSEEN_FONT} is kept unseen .* '{split}'"):
            page(0, 0, unseen, split)
    seen = replace(LINE, fonts=("DejaVu Sans",))
    assert page(0, 0, unseen, "test").image.tobytes() != page(0, 0, seen, "test").image.tobytes()


# ---- words ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 9, 10, 11, 12, 20, 37])
def test_lines_have_the_length_asked_for(length):
    rng = random.Random(0)
    for _ in range(30):
        line = make_line(rng, length, "train", 0.5)
        assert len(line) == length
        assert all(2 <= len(word) <= 9 for word in line.split(" "))
        assert set(line) <= set(ALPHABET + " ")


def test_prose_is_the_share_of_words():
    rng = random.Random(0)
    letters = set(string.ascii_letters)
    prose = [make_word(rng, 6, "train", 1.0) for _ in range(400)]
    assert all(set(word) <= letters and word[1:].islower() for word in prose)
    assert {"should", "namely"} & {word.lower() for word in prose}
    strings = "".join(make_word(rng, 6, "train", 0.0) for _ in range(2000))
    shares = [sum(c in kind for c in strings) / 12000 for kind in (string.digits, PUNCTUATION)]
    # what the splits refuse does not depend on the kind; 0.02 is six standard errors
    assert shares == pytest.approx([0.15, 0.10], abs=0.02)
    assert set(strings) == set(ALPHABET)


# ---- fonts ---------------------------------------------------------------------------------


def wrong_glyphs(file):
    """Characters of the alphabet whose glyph has the name of another one."""
    with TTFont(file, lazy=True) as font:
        names = font.getBestCmap()
    return {c for c in ALPHABET if agl.toUnicode(names.get(ord(c), ".notdef")) != c}


@pytest.mark.parametrize("bold", [False, True])
@pytest.mark.parametrize("family", FONTS)
def test_every_font_draws_the_character_that_the_ground_truth_says(family, bold):
    assert not wrong_glyphs(font_file(family, bold))
    font = load_font(family, 24, bold)
    drawn = {bytes(font.getmask(c)) + str(font.getbbox(c)).encode() for c in ALPHABET}
    assert len(drawn) == len(ALPHABET), "two characters look exactly alike"


def test_the_glyph_check_finds_false_glyphs():
    cmr10 = font_file("DejaVu Sans").with_name("cmr10.ttf")
    assert cmr10.is_relative_to(matplotlib.get_data_path())
    assert wrong_glyphs(cmr10) >= {'"'}


# ---- ground truth --------------------------------------------------------------------------


@pytest.mark.parametrize("difficulty", [LINE, PAGE, DOCUMENT], ids=["line", "page", "document"])
def test_the_ground_truth_has_exactly_what_was_drawn(difficulty, monkeypatch):
    drawn = []
    real = ImageDraw.ImageDraw.text

    def record(self, xy, text, *args, **kwargs):
        drawn.append(text)
        return real(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    for index in range(8):
        drawn.clear()
        made = page(1, index, difficulty, "train")
        texts = []
        for block in made.blocks:
            rows = block.text.split("\n")
            texts += sum((row.split(" ") for row in rows), []) if block.html else rows
        assert texts == drawn
        assert made.text == "\n\n".join(block.markdown for block in made.blocks)


def test_without_wear_boxes_lie_in_the_page_and_hold_all_the_ink():
    for index in range(12):
        made = page(2, index, CLEAN, "train")
        dark = ink(made.image)
        for block in made.blocks:
            x0, y0, x1, y1 = block.box
            assert 0 <= x0 < x1 <= CLEAN.size[0] and 0 <= y0 < y1 <= CLEAN.size[1]
            inside = np.asarray(made.image)[y0:y1, x0:x1] < 255
            # the box is tight but for the advance of the last character
            assert inside[:3].any() and inside[-3:].any()
            assert inside[:, :3].any() and inside[:, -22:].any()
            dark[y0:y1, x0:x1] = False
        assert not dark.any()


def test_boxes_follow_the_tilt():
    turned = 0
    for index in range(12):
        made = page(2, index, DOCUMENT, "train")
        straight = page(2, index, CLEAN, "train")
        paper = np.median(np.asarray(made.image))
        dark = ink(made.image, paper)
        for block in made.blocks:
            x0, y0, x1, y1 = block.box
            assert 0 <= x0 < x1 <= CLEAN.size[0] and 0 <= y0 < y1 <= CLEAN.size[1]
            assert dark[y0:y1, x0:x1].any()
            dark[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = False
        assert not dark.any()
        assert made.text == straight.text
        turned += [b.box for b in made.blocks] != [b.box for b in straight.blocks]
    assert turned >= 10


def test_wear_lightens_ink_darkens_paper_and_adds_noise():
    worn = [np.asarray(page(0, i, replace(LINE, wear=1.0), "train").image) for i in range(20)]
    clean = [np.asarray(page(0, i, LINE, "train").image) for i in range(20)]
    assert {int(np.median(image)) for image in clean} == {255} and min(i.min() for i in clean) == 0
    papers = [np.median(image) for image in worn]
    assert min(papers) < 230 and min(papers) >= 205
    assert max(image.min() for image in worn) > 30
    assert sum(len(np.unique(image[:3])) > 3 for image in worn) >= 15


def test_tables_parse_and_hold_their_text():
    tables = 0
    for index in range(12):
        for block in page(4, index, CLEAN, "train").blocks:
            assert bool(block.html) == (block.kind == "table")
            if block.html:
                tables += 1
                rows = [[cell.text for cell in row] for row in ElementTree.fromstring(block.html)]
                assert [" ".join(row) for row in rows] == block.text.split("\n")
                assert len({len(row) for row in rows}) == 1 and len(rows[0]) in (2, 3)
    assert tables >= 5


def test_kinds_columns_and_reading_order():
    two = replace(CLEAN, columns=(2, 2))
    kinds = set()
    for index in range(8):
        blocks = page(5, index, two, "train").blocks
        kinds |= {block.kind for block in blocks}
        assert [block.order for block in blocks] == list(range(len(blocks)))
        sides = [block.box[0] > two.size[0] / 2 for block in blocks]
        assert sides == sorted(sides) and len(set(sides)) == 2
        for side in (False, True):
            tops = [b.box[1] for b, s in zip(blocks, sides, strict=True) if s == side]
            assert tops == sorted(tops)
        assert all(b.box[2] <= two.size[0] / 2 or b.box[0] >= two.size[0] / 2 for b in blocks)
    assert kinds == {"heading", "paragraph", "table"}


def test_difficulty_sets_lines_and_characters():
    for index in range(40):
        lines = page(6, index, PAGE, "train").text.replace("\n\n", "\n").split("\n")
        assert 12 <= len(lines) <= 16 and all(12 <= len(line) <= 18 for line in lines)
        assert 8 <= len(page(6, index, LINE, "train").text) <= 12


@pytest.mark.parametrize("difficulty", [LINE, PAGE, DOCUMENT], ids=["line", "page", "document"])
def test_the_difficulties_always_fit(difficulty):
    for index in range(15):
        assert page(8, index, difficulty, "validation").text


# ---- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fonts": ("Comic Sans",)}, "fonts must be among DejaVu Sans, .*Comic Sans"),
        ({"fonts": ()}, "fonts must be among"),
        ({"characters": (1, 5)}, r"at least 2 characters; got characters=\(1, 5\)"),
        ({"lines": (3, 2)}, r"lines must be .* got \(3, 2\)"),
        ({"font_sizes": (0, 2)}, r"font_sizes must be .* got \(0, 2\)"),
        ({"wear": 2}, "wear must be between 0 and 1; got 2"),
        ({"headings": -0.5}, "headings must be between 0 and 1; got -0.5"),
        ({"columns": (1, 3)}, r"columns must be .* got \(1, 3\)"),
    ],
)
def test_impossible_difficulties_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(LINE, **change)


def test_pages_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="splits are train, validation, test; got 'dev'"):
        page(0, 0, LINE, "dev")
    with pytest.raises(ValueError, match="9 lines of 14 pixels do not fit a page 32 pixels high"):
        page(0, 0, replace(LINE, lines=(9, 9)), "train")
    with pytest.raises(ValueError, match="40 characters of .* do not fit"):
        page(0, 0, replace(LINE, characters=(40, 40)), "train")
