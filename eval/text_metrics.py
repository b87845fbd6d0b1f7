"""How close predicted text is to true text: per page, and over a set of pages with intervals."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from compress.common.extras import extra
from compress.eval.values import (
    Value,
    page_mean,
    percentile_interval,
    ratio_of_sums,
    resampled_sums,
    share,
)

with extra("ocr", "scoring pages"):
    import jiwer
    import snowballstemmer
    from rapidfuzz.distance import Levenshtein
    from sacrebleu.metrics.bleu import BLEU

LOOP_COPIES = 5
LOOP_CHARACTERS = 60

# the default of sacrebleu; its signature stands in `Value.how`
_PAGE_BLEU = BLEU(effective_order=True)
# nltk.translate.bleu on whitespace tokens, as Ocean-OCR calls it: no smoothing, four orders
_OCEAN_BLEU = BLEU(tokenize="none", smooth_method="none")
_STEMMER = snowballstemmer.stemmer("porter")
_IDEOGRAPH = re.compile(r"([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


@dataclass(frozen=True)
class Errors:
    """Edits against the length that they are counted in; addable over pages.

    Parameters
    ----------
    edits : insertions, deletions and substitutions, >= 0.
    length : characters or words, >= 0.
    """

    edits: int
    length: int

    @property
    def rate(self) -> float:
        """Edits / length: 0 is perfect; 0 for nothing against nothing, inf for edits alone."""
        if self.length == 0:
            return math.inf if self.edits else 0.0
        return self.edits / self.length


@dataclass(frozen=True)
class TokenScores:
    """Precision, recall and F1 of tokens, each in [0, 1], higher is better."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class TextScores:
    """Text metrics of a set of pages.

    Parameters
    ----------
    edits : of each page, Levenshtein distance against the longer text; its rate is the NED.
    characters : of each page, errors against the reference's characters; the rate is the CER.
    metrics : name -> value; ``_corpus`` behind a name means sums over all pages, else page mean.
    """

    edits: list[Errors]
    characters: list[Errors]
    metrics: dict[str, Value]


def normalise(text: str) -> str:
    """Make a text comparable: Unicode NFC, every run of white space one space, ends stripped.

    Case, punctuation and Markdown are kept. All pages of `text_scores` pass through here; the
    functions for one pair of texts compare what they are given.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def tokens(text: str) -> list[str]:
    """Words between white space, and each Chinese character by itself.

    Ocean-OCR cuts texts that hold Chinese with jieba instead; ours needs no dictionary.
    """
    return _IDEOGRAPH.sub(r" \1 ", text).split()


def edit_distance(prediction: Sequence[Hashable], reference: Sequence[Hashable]) -> Errors:
    """Levenshtein distance against the longer length; the rate is in [0, 1] and symmetric.

    Its rate is the normalised edit distance (NED), 0 for equal, also for two empty sequences.
    Works on text and on sequences of anything hashable.
    """
    edits = Levenshtein.distance(prediction, reference)
    return Errors(edits, max(len(prediction), len(reference)))


def character_errors(prediction: str, reference: str) -> Errors:
    """Edits against the reference's characters, by jiwer; the rate is the CER, which may exceed 1.

    White space at the ends of both texts does not count.
    """
    return _errors(jiwer.process_characters(reference, prediction))


def word_errors(prediction: str, reference: str) -> Errors:
    """Edits against the reference's words, by jiwer; the rate is the WER, which may exceed 1.

    Words lie between spaces, so the WER of Chinese says nothing.
    """
    return _errors(jiwer.process_words(reference, prediction))


def _errors(result: jiwer.CharacterOutput | jiwer.WordOutput) -> Errors:
    edits = result.substitutions + result.deletions + result.insertions
    return Errors(edits, len(result.references[0]))


def meteor_exact_stem(prediction: str, reference: str) -> float:
    """METEOR with exact and stem matches only, in [0, 1), higher is better.

    Banerjee and Lavie, "METEOR: An automatic metric for MT evaluation" (2005), with NLTK's
    constants and its greedy alignment from the end of the texts: lower-cased tokens are paired
    first by form, then by Porter stem. With m pairs in c chunks of adjacent pairs, P = m / tokens
    predicted, R = m / tokens of the reference: (1 - 0.5 (c/m)^3) P R / (0.9 P + 0.1 R). Equal texts
    of n tokens score 1 - 0.5 / n^3. Two empty texts score 1, no pair scores 0.

    Differs from METEOR: no WordNet synonyms, whose data is a download. Differs from NLTK: the
    original Porter stems, without NLTK's extensions.
    """
    predicted = [token.lower() for token in tokens(prediction)]
    expected = [token.lower() for token in tokens(reference)]
    if not predicted and not expected:
        return 1.0
    pairs = _pair_equal(predicted, expected, {})
    pairs |= _pair_equal(_STEMMER.stemWords(predicted), _STEMMER.stemWords(expected), pairs)
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / len(predicted), len(pairs) / len(expected)
    chunks = sum(pairs.get(i - 1, -2) + 1 != j for i, j in pairs.items())
    penalty = 0.5 * (chunks / len(pairs)) ** 3
    return (1 - penalty) * precision * recall / (0.9 * precision + 0.1 * recall)


def token_set_scores(prediction: str, reference: str) -> TokenScores:
    """Precision, recall and F1 of the sets of `tokens`, as in Ocean-OCR: repetition is free.

    Two empty texts score 1, an empty and a full one 0.
    """
    predicted, expected = set(tokens(prediction)), set(tokens(reference))
    return _token_scores(len(predicted & expected), len(predicted), len(expected))


def token_multiset_scores(prediction: str, reference: str) -> TokenScores:
    """Precision, recall and F1 of the multisets of `tokens`: the third copy of two is wrong."""
    predicted, expected = Counter(tokens(prediction)), Counter(tokens(reference))
    return _token_scores((predicted & expected).total(), predicted.total(), expected.total())


def tail_copies(text: str, size: int) -> int:
    """How often the last ``size`` characters stand behind each other at the end; at least 1.

    0 when the text is shorter than ``size``.
    """
    if len(text) < size:
        return 0
    unit, end = text[-size:], len(text)
    while end >= size and text[end - size : end] == unit:
        end -= size
    return (len(text) - end) // size


def is_loop(text: str) -> bool:
    """Whether a text ends in a loop, as generation that no longer stops does.

    Our own definition: for some period, the text ends in at least `LOOP_COPIES` exact copies of
    one piece of that length, and they cover at least `LOOP_CHARACTERS` characters. A copy cut off
    by the length limit does no harm, since the piece may begin anywhere. Copies that count
    upwards ("1. The, 2. The, ...") do not count.
    """
    text = normalise(text)
    for size in range(1, len(text) // LOOP_COPIES + 1):
        copies = tail_copies(text, size)
        if copies >= LOOP_COPIES and copies * size >= LOOP_CHARACTERS:
            return True
    return False


def is_empty(text: str) -> bool:
    """Whether a text holds neither a letter nor a digit."""
    return not any(character.isalnum() for character in text)


def text_scores(predictions: Sequence[str], references: Sequence[str], seed: int = 0) -> TextScores:
    """Score predicted pages against true ones.

    Parameters
    ----------
    predictions, references : texts paired by index, at least one; `normalise` is applied to both.
    seed : of the bootstrap over pages.

    Returns
    -------
    TextScores : metrics ``ned``, ``ned_corpus``, ``cer_corpus``, ``wer_corpus``, ``loop_rate``,
        ``empty_page_rate``, ``worst_page_ned`` (lower is better), ``bleu``, ``bleu_corpus``,
        ``meteor_exact_stem``, ``token_precision``, ``token_recall``, ``token_f1``,
        ``token_multiset_f1`` (higher is better), and ``cer`` and ``wer`` over the pages whose
        reference is not empty. Those that divide by the length of the references are left out where
        all references are empty. ``loop_rate`` leaves out pages whose reference loops by our
        definition too; ``empty_page_rate`` is the share of empty predictions among pages whose
        reference is not empty.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(
            "predictions and references are paired pages, at least one; got "
            f"{len(predictions)} and {len(references)}; give one prediction per page, '' for none"
        )
    pairs = [
        (normalise(prediction), normalise(reference))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    edits = [edit_distance(*pair) for pair in pairs]
    characters = [character_errors(*pair) for pair in pairs]
    ned, n = [page.rate for page in edits], len(pairs)
    worst = int(np.argmax(ned))
    metrics = {
        "ned": page_mean(ned, "page mean, rapidfuzz", seed),
        "ned_corpus": _corpus(edits, "rapidfuzz", seed),
        "worst_page_ned": Value(ned[worst], f"page {worst} of {n}, rapidfuzz", n),
    }
    for name, errors in (
        ("cer", characters),
        ("wer", [word_errors(*pair) for pair in pairs]),
    ):
        rates = [page.rate for page in errors if page.length]
        if rates:
            metrics[name] = page_mean(rates, "page mean, jiwer", seed)
            metrics[f"{name}_corpus"] = _corpus(errors, "jiwer", seed)
    bleus = [_page_bleu(*pair) for pair in pairs]
    how = f"page mean, sacrebleu {_PAGE_BLEU.get_signature()}"
    metrics["bleu"] = page_mean([value for value, _ in bleus], how, seed)
    metrics["bleu_corpus"] = _corpus_bleu(np.array([counts for _, counts in bleus]), seed)
    how = "page mean, exact and Porter stem matches, no WordNet"
    meteors = [meteor_exact_stem(*pair) for pair in pairs]
    metrics["meteor_exact_stem"] = page_mean(meteors, how, seed)
    sets = [asdict(token_set_scores(*pair)) for pair in pairs]
    for name in ("precision", "recall", "f1"):
        how = "page mean, sets of tokens"
        metrics[f"token_{name}"] = page_mean([page[name] for page in sets], how, seed)
    multisets = [token_multiset_scores(*pair).f1 for pair in pairs]
    metrics["token_multiset_f1"] = page_mean(multisets, "page mean, multisets of tokens", seed)
    loops = [is_loop(prediction) for prediction, reference in pairs if not is_loop(reference)]
    if loops:
        how = f"share of pages, {LOOP_COPIES} copies over {LOOP_CHARACTERS} characters at the end"
        metrics["loop_rate"] = share(sum(loops), len(loops), how)
    lost = [is_empty(prediction) for prediction, reference in pairs if not is_empty(reference)]
    if lost:
        how = "share of pages without a letter or digit"
        metrics["empty_page_rate"] = share(sum(lost), len(lost), how)
    return TextScores(edits, characters, metrics)


def ocean_scores(prediction: str, reference: str, *, published_order: bool) -> dict[str, float]:
    """The six numbers of Ocean-OCR's script (eval_internvl2_5.py of guoxy25/Ocean-OCR) in [0, 1].

    Texts are compared as they are; tokens are `tokens`, where theirs come from jieba if either
    text holds Chinese; BLEU is unsmoothed over four orders; METEOR is `meteor_exact_stem`, where
    theirs has WordNet.

    Parameters
    ----------
    prediction, reference : one text each.
    published_order : whether to hand the two over as their script does, the label as prediction
        and the answer as reference. Published numbers are made that way: precision and recall
        trade places, BLEU and METEOR change, edit distance and F1 do not.
    """
    if published_order:
        prediction, reference = reference, prediction
    sets = token_set_scores(prediction, reference)
    predicted, expected = (" ".join(tokens(text)) for text in (prediction, reference))
    return {
        "edit_distance": edit_distance(prediction, reference).rate,
        "bleu": _OCEAN_BLEU.corpus_score([predicted], [[expected]]).score / 100,
        "meteor_exact_stem": meteor_exact_stem(prediction, reference),
        **asdict(sets),
    }


def _page_bleu(prediction: str, reference: str) -> tuple[float, list[int]]:
    """Sentence BLEU of one page in [0, 1], 1 for two empty texts, and what a corpus sums up.

    sacrebleu with its defaults: tokenisation 13a, case kept, exponential smoothing, and for texts
    shorter than 4 tokens only the orders that they have.
    """
    result = _PAGE_BLEU.sentence_score(prediction, [reference])
    value = result.score / 100 if prediction.strip() or reference.strip() else 1.0
    return value, [*result.counts, *result.totals, result.sys_len, result.ref_len]


def _corpus_bleu(counts: np.ndarray, seed: int) -> Value:
    """BLEU from summed n-gram counts; a resample of pages is a sum too."""

    def score(sums: np.ndarray) -> float:
        whole = [int(value) for value in sums]
        result = BLEU.compute_bleu(whole[:4], whole[4:8], whole[8], whole[9], smooth_method="exp")
        return result.score / 100

    resampled = [score(sums) for sums in resampled_sums(counts, seed)]
    how = f"all pages together, sacrebleu {_PAGE_BLEU.get_signature()}".replace("eff:yes", "eff:no")
    n = len(counts)
    return Value(score(counts.sum(axis=0)), how, n, percentile_interval(resampled, n))


def _corpus(errors: Sequence[Errors], tool: str, seed: int) -> Value:
    edits, lengths = [e.edits for e in errors], [e.length for e in errors]
    if not any(lengths):
        # every page empty on both sides
        return page_mean([error.rate for error in errors], f"all pages together, {tool}", seed)
    return ratio_of_sums(edits, lengths, f"all pages together, {tool}", seed)


def _pair_equal(
    predicted: Sequence[str], expected: Sequence[str], taken: dict[int, int]
) -> dict[int, int]:
    """Pair equal tokens that are not ``taken`` yet, from the end; predicted index -> expected."""
    used = set(taken.values())
    places: dict[str, list[int]] = {}
    for j, token in enumerate(expected):
        if j not in used:
            places.setdefault(token, []).append(j)
    pairs = {}
    for i in range(len(predicted) - 1, -1, -1):
        if i not in taken and places.get(predicted[i]):
            pairs[i] = places[predicted[i]].pop()
    return pairs


def _token_scores(common: int, predicted: int, expected: int) -> TokenScores:
    if predicted == expected == 0:
        return TokenScores(1.0, 1.0, 1.0)
    return TokenScores(
        precision=common / predicted if predicted else 0.0,
        recall=common / expected if expected else 0.0,
        f1=2 * common / (predicted + expected),
    )
