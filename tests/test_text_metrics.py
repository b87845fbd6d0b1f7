"""Text metrics: laws, hand-computed cases, and other libraries as independent references."""

import math
import random

import jiwer
import numpy as np
import pytest
from nltk.translate.meteor_score import single_meteor_score
from rapidfuzz.distance import Levenshtein
from sacrebleu.metrics.bleu import BLEU
from scipy import stats

from compress.eval.text_metrics import (
    Errors,
    _page_bleu,
    character_errors,
    edit_distance,
    is_empty,
    is_loop,
    meteor_exact_stem,
    normalise,
    ocean_scores,
    tail_copies,
    text_scores,
    token_multiset_scores,
    token_set_scores,
    tokens,
    word_errors,
)
from compress.eval.values import page_mean, percentile_interval, ratio_of_sums, resampled_sums

WORDS = "the cat sat mat dog runs running runner connect connected quick brown Fox".split()


def sentence(generator, longest=12):
    return " ".join(generator.choices(WORDS, k=generator.randint(1, longest)))


@pytest.fixture
def pairs():
    generator = random.Random(0)
    return [(sentence(generator), sentence(generator)) for _ in range(60)]


class NoWordNet:
    def synsets(self, word):
        return []


def test_equal_texts_are_perfect(pairs):
    for text, _ in pairs:
        assert edit_distance(text, text).rate == 0
        assert character_errors(text, text).rate == word_errors(text, text).rate == 0
        assert _page_bleu(text, text)[0] == pytest.approx(1)
        assert token_set_scores(text, text).f1 == token_multiset_scores(text, text).f1 == 1
        assert meteor_exact_stem(text, text) == pytest.approx(1 - 0.5 / len(text.split()) ** 3)


def test_bounds_and_symmetry(pairs):
    for a, b in pairs:
        assert edit_distance(a, b).rate == edit_distance(b, a).rate
        assert 0 <= edit_distance(a, b).rate <= 1
        assert 0 <= _page_bleu(a, b)[0] <= 1 and 0 <= meteor_exact_stem(a, b) < 1
        for score in (token_set_scores, token_multiset_scores):
            there, back = score(a, b), score(b, a)
            assert there.precision == back.recall and there.recall == back.precision
            assert there.f1 == pytest.approx(back.f1)
            if there.precision + there.recall:
                harmonic = 2 / (1 / there.precision + 1 / there.recall)
                assert there.f1 == pytest.approx(harmonic)


def test_jiwer_and_rapidfuzz_agree_on_random_strings():
    generator = random.Random(1)
    for _ in range(200):
        a, b = ("".join(generator.choices("abc d", k=generator.randint(1, 30))) for _ in "ab")
        a, b = normalise(a), normalise(b)
        assert character_errors(a, b).edits == edit_distance(a, b).edits
        assert word_errors(a, b).edits == Levenshtein.distance(a.split(), b.split())
        if b:
            assert character_errors(a, b).rate == pytest.approx(jiwer.cer(b, a))
            assert word_errors(a, b).rate == pytest.approx(jiwer.wer(b, a))


def test_by_hand():
    # kitten -> sitting: 2 substitutions and 1 insertion
    assert edit_distance("kitten", "sitting") == Errors(3, 7)
    assert character_errors("kitten", "sitting") == Errors(3, 7)
    assert character_errors("sitting", "kitten") == Errors(3, 6)
    assert word_errors("a c d", "a b") == Errors(2, 2)
    assert word_errors("w x y z", "a").rate == 4


def test_empty_texts():
    assert edit_distance("", "").rate == character_errors("", "").rate == 0
    assert edit_distance("ab", "").rate == edit_distance("", "ab").rate == 1
    assert character_errors("ab", "") == Errors(2, 0)
    assert character_errors("ab", "").rate == word_errors("ab", "").rate == math.inf
    assert _page_bleu("", "")[0] == meteor_exact_stem("", "") == token_set_scores("", "").f1 == 1
    assert _page_bleu("", "a")[0] == meteor_exact_stem("", "a") == token_set_scores("", "a").f1 == 0
    assert meteor_exact_stem("a", "") == token_multiset_scores("a", "").f1 == 0


def test_normalise():
    assert normalise(" e\u0301\tb\r\n\n c ") == "\u00e9 b c"
    assert normalise("Case, and # marks") == "Case, and # marks"


def test_meteor_by_hand():
    # three pairs in two chunks ("the cat" and "mat"), 4 words each: P = R = 3/4
    expected = (1 - 0.5 * (2 / 3) ** 3) * 0.75
    assert meteor_exact_stem("the cat x mat", "the cat y mat") == (pytest.approx(expected))
    # a stem pair counts like an exact one: connected, connect; one chunk of two
    assert meteor_exact_stem("it connected", "it connect") == pytest.approx(1 - 0.5 / 8)


def test_meteor_is_that_of_nltk_without_wordnet(pairs):
    for a, b in pairs:
        expected = single_meteor_score(b.split(), a.split(), wordnet=NoWordNet())
        assert meteor_exact_stem(a, b) == pytest.approx(expected)


def test_tokens():
    assert tokens("a  b\nc") == ["a", "b", "c"]
    assert tokens("ab\u4e2d\u6587 c") == ["ab", "\u4e2d", "\u6587", "c"]


def test_sets_forgive_repetition_and_multisets_do_not():
    sets = token_set_scores("a a a b", "a b c")
    assert (sets.precision, sets.recall, sets.f1) == pytest.approx((1, 2 / 3, 0.8))
    counts = token_multiset_scores("a a a b", "a b c")
    assert (counts.precision, counts.recall, counts.f1) == pytest.approx((2 / 4, 2 / 3, 4 / 7))


def test_reading_order():
    assert edit_distance([1, 2, 3], [1, 2, 3]).rate == edit_distance([], []).rate == 0
    assert edit_distance([1, 3], [1, 2, 3]).rate == pytest.approx(1 / 3)
    # two neighbours swapped: a deletion and an insertion, or two substitutions
    assert edit_distance([2, 1, 3, 4], [1, 2, 3, 4]).rate == 0.5


def test_tail_copies():
    assert [tail_copies("xababab", size) for size in (1, 2, 3, 4, 7, 8)] == [1, 3, 1, 1, 1, 0]
    assert tail_copies("aaaa", 1) == 4 and tail_copies("aaaaa", 2) == 2


def test_loops():
    line = "The same line again. "
    assert is_loop("A page that begins well. " + line * 5)
    assert is_loop("A page. " + line * 6 + line[:9])  # cut off in the middle
    assert is_loop("x" + "." * 60) and not is_loop("x" + "." * 59)
    assert not is_loop("A page. " + line * 4)
    assert not is_loop("ab " * 10)  # too short to be a loop
    assert not is_loop(line * 6 + "But then it went on to the end.")
    assert not is_loop("")


def test_empty_means_no_letter_or_digit():
    assert is_empty("") and is_empty(" \n---\u2026") and not is_empty("- 7")


@pytest.mark.parametrize("published", [False, True])
def test_ocean_order(published):
    found = ocean_scores("a b b c", "a b d e f", published_order=published)
    precision, recall = (2 / 5, 2 / 3) if published else (2 / 3, 2 / 5)
    assert (found["precision"], found["recall"]) == pytest.approx((precision, recall))
    assert found["f1"] == pytest.approx(0.5)
    assert found["edit_distance"] == pytest.approx(
        Levenshtein.normalized_distance("a b b c", "a b d e f")
    )


def test_ocean_order_swaps_bleu_and_meteor(pairs):
    reference = "the quick brown fox jumps over the lazy dog today"
    prediction = "the quick brown fox jumps over it"
    straight = ocean_scores(prediction, reference, published_order=False)
    swapped = ocean_scores(reference, prediction, published_order=True)
    assert straight == swapped
    published = ocean_scores(prediction, reference, published_order=True)
    assert (
        published["edit_distance"] == straight["edit_distance"]
        and published["f1"] == straight["f1"]
    )
    assert published["meteor_exact_stem"] != pytest.approx(straight["meteor_exact_stem"])
    # 6, 5, 4, 3 of 7, 6, 5, 4 n-grams, and 7 words for 10
    precision = math.prod([6 / 7, 5 / 6, 4 / 5, 3 / 4]) ** 0.25
    assert straight["bleu"] == pytest.approx(precision * math.exp(1 - 10 / 7))
    # 6, 5, 4, 3 of 10, 9, 8, 7, and no penalty for length
    assert published["bleu"] == pytest.approx(math.prod([6 / 10, 5 / 9, 4 / 8, 3 / 7]) ** 0.25)


def test_ocean_bleu_is_not_smoothed():
    assert ocean_scores("a b", "a b", published_order=False)["bleu"] == 0


def test_scores_of_a_set_of_pages():
    references = ["a b c d", "kitten", "", "one two three"]
    predictions = ["a b c d", "sitting", "", ""]
    scores = text_scores(predictions, references)
    value = {name: found.value for name, found in scores.metrics.items()}
    assert value["ned"] == pytest.approx((0 + 3 / 7 + 0 + 1) / 4)
    assert value["ned_corpus"] == pytest.approx((3 + 13) / (7 + 7 + 13))
    assert value["cer"] == pytest.approx((0 + 3 / 6 + 1) / 3)
    assert value["cer_corpus"] == pytest.approx((3 + 13) / (7 + 6 + 13))
    assert value["wer_corpus"] == pytest.approx((1 + 3) / (4 + 1 + 3))
    assert value["token_f1"] == value["token_multiset_f1"] == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert value["empty_page_rate"] == pytest.approx(1 / 3) and value["loop_rate"] == 0
    assert value["worst_page_ned"] == 1 and "page 3 of 4" in scores.metrics["worst_page_ned"].how
    assert scores.metrics["ned"].n == 4 and scores.metrics["cer"].n == 3
    assert scores.metrics["empty_page_rate"].n == 3
    for name, found in scores.metrics.items():
        if name != "worst_page_ned":
            assert found.ci95[0] <= found.value <= found.ci95[1], name


def test_corpus_bleu_is_that_of_sacrebleu(pairs):
    predictions, references = zip(*pairs, strict=True)
    expected = BLEU().corpus_score(list(predictions), [list(references)]).score / 100
    found = text_scores(predictions, references).metrics["bleu_corpus"]
    assert found.value == pytest.approx(expected)
    assert "tok:13a" in found.how and "eff:no" in found.how


def test_loop_rate_leaves_out_pages_that_loop_in_truth():
    dots = "Contents " + "." * 100
    scores = text_scores([dots, "b " * 100, "c"], [dots, "b", "c"])
    assert scores.metrics["loop_rate"].value == 0.5 and scores.metrics["loop_rate"].n == 2


def test_blank_pages_only():
    scores = text_scores(["", ""], ["", ""])
    assert scores.metrics["ned"].value == scores.metrics["ned_corpus"].value == 0
    assert "cer" not in scores.metrics and "empty_page_rate" not in scores.metrics


def test_the_seed_decides_the_intervals(pairs):
    predictions, references = zip(*pairs, strict=True)
    one, same, other = (text_scores(predictions, references, seed).metrics for seed in (0, 0, 1))
    assert one == same
    assert one["ned"].value == other["ned"].value and one["ned"].ci95 != other["ned"].ci95


def test_one_page_has_no_interval():
    assert text_scores(["a"], ["b"]).metrics["ned"].ci95 is None


def test_bootstrap_is_that_of_scipy():
    values = np.random.default_rng(0).normal(size=200)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999)
    low, high = page_mean(values, "").ci95
    # both are Monte Carlo: the ends of 2000 draws scatter by about 4% of the width
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.1 * width)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.1 * width)


def test_resamples_draw_rows_together():
    sums = resampled_sums([[1, 2], [10, 20], [100, 200]])
    assert np.array_equal(2 * sums[:, 0], sums[:, 1])
    assert len(set(sums[:, 0])) == 10  # multisets of 3 out of 3


def test_ratios_without_denominator_are_left_out():
    found = ratio_of_sums([1, 5], [4, 0], "")
    # half of the resamples hold page 0 once, a quarter twice, a quarter not at all
    assert found.value == 6 / 4 and found.ci95 == pytest.approx((1 / 4, 6 / 4))
    assert percentile_interval([math.inf, math.nan], 2) is None


@pytest.mark.parametrize("rows", [([], []), ([1, 2], [1]), ([1], [0])])
def test_ratios_that_do_not_exist(rows):
    with pytest.raises(ValueError, match="positive sum of denominators"):
        ratio_of_sums(*rows, "")


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"])])
def test_pages_that_do_not_pair(predictions, references):
    with pytest.raises(ValueError, match=f"{len(predictions)} and {len(references)}"):
        text_scores(predictions, references)
