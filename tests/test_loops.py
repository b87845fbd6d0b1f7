"""Answers that repeat themselves: found as the definition says, and stopped one by one."""

import random
from functools import partial

import pytest
import torch

from builders import vlm
from compress.models.loops import COPIES, LONGEST, ends_in_loop
from compress.models.reading import read_pages


def repeats(row, least):
    """The definition, read off word by word."""
    for period in range(1, LONGEST + 1):
        covered = max(COPIES * period, least)
        ending = row[-covered:]
        if covered <= len(row) and all(
            ending[i] == ending[i - period] for i in range(period, covered)
        ):
            return True
    return False


def test_loops_are_found_as_defined():
    draw, seen = random.Random(0), set()
    for _ in range(300):
        count, least = draw.randrange(60), draw.choice([2, 5, 12, 30])
        rows = []
        for _ in range(3):
            piece = [draw.randrange(3) for _ in range(draw.randint(1, 9))]
            begin = [draw.randrange(3) for _ in range(draw.randint(0, count))]
            row = (begin + piece * 60)[:count]
            if row and draw.random() < 0.3:
                row[draw.randrange(count)] = 7
            rows.append(row)
        expected = [repeats(row, least) for row in rows]
        assert ends_in_loop(torch.tensor(rows).reshape(3, count), least).tolist() == expected
        seen |= set(expected)
    assert seen == {True, False}


def test_the_longest_piece():
    piece = list(range(LONGEST + 1))
    for longer in (0, 1):
        tokens = torch.tensor([piece[: LONGEST + longer] * COPIES])
        assert ends_in_loop(tokens, 16).tolist() == [not longer]


@pytest.fixture(scope="module")
def read():
    """Two pages, of which a random model ends one and repeats itself on the other."""
    model, processor = vlm.build("qwen2_5_vl")
    images = [vlm.page(56, 84, seed) for seed in (1, 2)]
    return partial(read_pages, model, processor, images, max_new_tokens=100)


def test_a_page_that_loops_is_stopped_and_the_other_is_read_to_its_end(read):
    ended, looping = read()
    assert ended.ended and not looping.ended and looping.new_tokens == 100

    again, stopped = read(loop_tokens=32)
    assert again == ended
    assert stopped.loop and not stopped.ended and stopped.new_tokens == 48
    assert looping.text.startswith(stopped.text) and not looping.loop
    copies = stopped.text.split(".")
    assert len(copies) > COPIES and set(copies[:-1]) == {"W z : L N ", " W z : L N "}
    # what a sequence is padded with after its end repeats itself, too
    assert read(loop_tokens=16)[0] == ended


def test_no_piece_twice(read):
    words = [answer.text.split() for answer in read(no_repeat_ngram=3)]
    for answer in words:
        pieces = list(zip(answer, answer[1:], answer[2:], strict=False))
        assert len(pieces) > 5 and len(set(pieces)) == len(pieces)
