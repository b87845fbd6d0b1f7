r"""Scores by the definitions of olmOCR-bench; formulas are skipped, since they need KaTeX.

Source: olmocr/bench/{tests,benchmark,table_parsing}.py of allenai/olmocr, written afresh from their
definitions. A test passes or fails; the score is the mean over the JSON lines files of the share of
tests passed in each. What differs from the script unless ``published`` is set: README.md.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.common.extras import extra
from compress.data.olmocr_bench import (
    AnyTest,
    BaselineTest,
    Bench,
    FootnoteTest,
    FormatTest,
    MathTest,
    OrderTest,
    PageId,
    PresenceTest,
    TableTest,
    normalise,
)
from compress.eval.retention import Accuracy
from compress.eval.table_similarity import Table, html_tables, markdown_tables
from compress.eval.text_metrics import is_empty, tail_copies
from compress.eval.values import Value, percentile_interval, resampled_sums, share

with extra("ocr", "scoring pages"):
    from rapidfuzz import fuzz

BASELINE = "baseline"

_DISALLOWED = re.compile(
    "[\u4e00-\u9fff\u3040-\u309f\u30a0-\u30ff"
    "\U0001f600-\U0001f64f\U0001f300-\U0001f5ff\U0001f680-\U0001f6ff\U0001f1e0-\U0001f1ff]"
)
_ATTRIBUTES = r"(?:\s[^>]*)?"
_FORMATS = {
    "heading": (r"(?m)^#{1,6}\s+(.+?)$", r"(?is)<h[1-6][^>]*>(.*?)</h[1-6]>"),
    "bold": (
        r"(?s)\*\*(.*?)\*\*",
        r"(?s)__(.*?)__",
        rf"(?is)<b{_ATTRIBUTES}>(.*?)</b>",
        rf"(?is)<strong{_ATTRIBUTES}>(.*?)</strong>",
    ),
    "italic": (
        r"(?s)(?<!\*)\*(?!\*)(.*?)(?<!\*)\*(?!\*)",
        r"(?s)(?<!_)_(?!_)(.*?)(?<!_)_(?!_)",
        rf"(?is)<i{_ATTRIBUTES}>(.*?)</i>",
        rf"(?is)<em{_ATTRIBUTES}>(.*?)</em>",
    ),
}
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
# how far around a footnote mark its neighbours are looked for, in characters
FOOTNOTE_REACH = 200


@dataclass(frozen=True)
class Outcome:
    """Result of one test; ``passed`` is None when it was skipped, ``why`` says what went wrong."""

    passed: bool | None
    why: str = ""


@dataclass(frozen=True)
class OlmOCRScores:
    """Scores of one candidate.

    Parameters
    ----------
    outcomes : file -> id of the test -> outcome; ``baseline`` holds the tests that are added.
    skipped : file -> number of its tests that were skipped, files without any left out.
    metrics : ``score``, or ``score_without_math`` where tests were skipped, and ``pass_rate_FILE``
        of each file with tests that ran; shares in [0, 1], higher is better.
    accuracy : the score once more, for retention.
    """

    outcomes: dict[str, dict[str, Outcome]]
    skipped: dict[str, int]
    metrics: dict[str, Value]
    accuracy: Accuracy


def score_olmocr_bench(
    bench: Bench,
    outputs: Mapping[PageId, Sequence[str]],
    seed: int = 0,
    *,
    published: bool = False,
) -> OlmOCRScores:
    """Run all tests on what a candidate read.

    As in olmOCR's script, documents without a ``baseline`` test of their own get one for page 1 in
    a file called ``baseline``; of several repeats of a page, more than half must pass; the interval
    resamples the tests of each file. Tests of formulas are skipped: they count neither as passed
    nor as failed, and the score then has another name, since published ones are not comparable.

    Parameters
    ----------
    bench : the tests.
    outputs : page -> texts, at least one for each of ``bench.pages``.
    seed : of the bootstrap.
    published : whether to keep to the script where it is at odds with what a test means.

    Raises
    ------
    ValueError : for a page without text, or when no test runs.
    """
    missing = [page for page in bench.pages if not outputs.get(page)]
    if missing:
        raise ValueError(
            f"at least one text for each of {len(bench.pages)} pages expected; {len(missing)} have "
            f"none, the first is page {missing[0][1]} of {missing[0][0]}; give '' for a page that "
            "gave nothing"
        )
    outcomes: dict[str, dict[str, Outcome]] = defaultdict(dict)
    for name, tests in _with_baselines(bench).items():
        for test in tests:
            outcomes[name][test.id] = _of_repeats(test, outputs[test.pdf, test.page], published)
    ran = {
        name: [outcome.passed for outcome in results.values() if outcome.passed is not None]
        for name, results in outcomes.items()
    }
    skipped = {name: len(results) - len(ran[name]) for name, results in outcomes.items()}
    skipped = {name: count for name, count in skipped.items() if count}
    ran = {name: passed for name, passed in ran.items() if passed}
    if not ran:
        raise ValueError(
            f"a score needs a test that can run; all {sum(skipped.values())} are skipped; add "
            "tests that do not need KaTeX"
        )
    rates = [sum(passed) / len(passed) for passed in ran.values()]
    resampled = np.mean(
        [
            resampled_sums(np.array(passed, float)[:, None], seed + place)[:, 0] / len(passed)
            for place, passed in enumerate(ran.values())
        ],
        axis=0,
    )
    tests_run = sum(map(len, ran.values()))
    how = f"mean over {len(ran)} files of the share of tests passed"
    how += ", by the published script's rules" * published
    if skipped:
        how += f"; {sum(skipped.values())} tests of formulas skipped, they need KaTeX"
    interval = percentile_interval(resampled, tests_run)
    score = "score_without_math" if skipped else "score"
    accuracy = Accuracy(
        score, float(np.mean(rates)), resampled, tests_run, "the tests of each file"
    )
    metrics = {score: Value(accuracy.value, how, tests_run, interval)}
    for name, passed in ran.items():
        metrics[f"pass_rate_{name}"] = share(sum(passed), len(passed), "share of tests passed")
    return OlmOCRScores(dict(outcomes), skipped, metrics, accuracy)


def run_test(test: AnyTest, text: str, *, published: bool = False) -> Outcome:
    """Run one test on the Markdown of its page; ``published`` as in `score_olmocr_bench`."""
    match test:
        case PresenceTest():
            return _presence(test, text, published)
        case OrderTest():
            return _order(test, text)
        case TableTest():
            return _table(test, text)
        case BaselineTest():
            return _baseline(test, text)
        case FormatTest():
            return _format(test, text, published)
        case FootnoteTest():
            return _footnote(test, text, published)
        case MathTest():
            return Outcome(None, "skipped: formulas are compared as KaTeX renders them")


def near_matches(expected: str, text: str, max_diffs: int) -> list[int]:
    """Find where a text occurs with at most ``max_diffs`` insertions, deletions and substitutions.

    Sellers, "The theory and computation of evolutionary distances" (1980). Of matches that overlap
    only the one with the fewest differences counts, of equals the longest. olmOCR calls fuzzysearch
    for this, which finds a match in the same texts; where ``expected`` is shorter than
    ``3 (max_diffs + 1)`` characters or repeats itself, its match may begin elsewhere.

    Returns
    -------
    list[int] : where the matches begin, in ascending order. Exact matches may overlap.
    """
    if max_diffs == 0:
        return [match.start() for match in re.finditer(f"(?={re.escape(expected)})", text)]
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    ends = np.arange(len(text) + 1)
    # of the best match of a beginning of `expected` with each end in the text: its differences
    # times `difference`, plus its start, so that the smallest has the fewest differences, then the
    # most characters
    difference = len(text) + 1
    best = ends
    for letter in expected:
        without = best + difference
        without[1:] = np.minimum(without[1:], best[:-1] + difference * (letters != ord(letter)))
        best = np.minimum.accumulate(without - difference * ends) + difference * ends
    differences, starts = np.divmod(best, difference)
    groups: list[list[tuple[int, int, int]]] = []
    reach = 0
    ends_there = np.flatnonzero(differences <= max_diffs)
    for start, end in sorted(zip(starts[ends_there].tolist(), ends_there.tolist(), strict=True)):
        if start >= reach:
            groups.append([])
        groups[-1].append((int(differences[end]), start - end, start))
        reach = max(reach, end)
    return [min(group)[2] for group in groups]


def _with_baselines(bench: Bench) -> dict[str, tuple[AnyTest, ...]]:
    files = dict(bench.files)
    have = {test.pdf for tests in files.values() for test in tests if test.type == "baseline"}
    added = tuple(
        BaselineTest(pdf=pdf, page=1, id=f"{pdf}_baseline") for pdf in bench.pdfs if pdf not in have
    )
    if added:
        # a file of the same name stays a file of its own
        files[f"{BASELINE}_added" if BASELINE in files else BASELINE] = added
    return files


def _of_repeats(test: AnyTest, texts: Sequence[str], published: bool) -> Outcome:
    outcomes = [run_test(test, text, published=published) for text in texts]
    if outcomes[0].passed is None:
        return outcomes[0]
    passed = sum(bool(outcome.passed) for outcome in outcomes)
    if 2 * passed > len(outcomes):
        return Outcome(True)
    why = next(outcome.why for outcome in outcomes if not outcome.passed)
    return Outcome(
        False, why if len(outcomes) == 1 else f"{passed} of {len(outcomes)} passed: {why}"
    )


def _threshold(max_diffs: int, text: str) -> float:
    """Least similarity in [0, 1] that counts as a match; in the script's order of rounding."""
    return 1.0 - max_diffs / max(len(text), 1)


def _similarity(expected: str, text: str, max_diffs: int, published: bool) -> float:
    """Share of ``expected`` in the stretch of ``text`` that is most like it.

    The measure is symmetric: one space would match any text that holds a space. A text that is too
    short to hold ``expected`` therefore has a similarity of 0 unless the script is to be followed.
    """
    if len(text) < len(expected) - max_diffs and not published:
        return 0.0
    return fuzz.partial_ratio(expected, text) / 100


def _presence(test: PresenceTest, text: str, published: bool) -> Outcome:
    expected, text = normalise(test.text), normalise(text)
    if not test.case_sensitive:
        expected, text = expected.lower(), text.lower()
    if test.first_n or test.last_n:
        head = text[: test.first_n] if test.first_n else ""
        text = head + (text[-test.last_n :] if test.last_n else "")
    best = _similarity(expected, text, test.max_diffs, published)
    there = best >= _threshold(test.max_diffs, expected)
    if there == (test.type == "present"):
        return Outcome(True)
    state = "found" if there else "not found"
    return Outcome(False, f"{_short(expected)} {state}: best match {best:.1%}")


def _order(test: OrderTest, text: str) -> Outcome:
    text = normalise(text)
    starts = []
    for expected in (normalise(test.before), normalise(test.after)):
        matches = near_matches(expected, text, test.max_diffs)
        if not matches:
            return Outcome(False, f"{_short(expected)} not found with {test.max_diffs} differences")
        starts.append(matches)
    if min(starts[0]) < max(starts[1]):
        return Outcome(True)
    return Outcome(False, f"{_short(test.before)} never begins before {_short(test.after)}")


def _baseline(test: BaselineTest, text: str) -> Outcome:
    if test.max_length is not None:
        counted = text
        if test.max_length_skips_image_alt_tags:
            counted = re.sub(r"!\[.*?\]\(.*?\)", "", text)
        length = sum(character.isalnum() for character in counted)
        if length <= test.max_length:
            return Outcome(True)
        return Outcome(False, f"{length} letters and digits on a page that should be blank")
    if is_empty(text):
        return Outcome(False, "neither a letter nor a digit")
    spaced = re.sub(r"\s+", " ", text)
    for size in range(1, 6):
        copies = tail_copies(spaced, size)
        if copies > test.max_repeats:
            return Outcome(False, f"ends in {copies} copies of {spaced[-size:]!r}")
    disallowed = _DISALLOWED.search(text) if test.check_disallowed_characters else None
    if disallowed:
        return Outcome(False, f"holds the disallowed character {disallowed.group()!r}")
    return Outcome(True)


def _format(test: FormatTest, text: str, published: bool) -> Outcome:
    expected = normalise(test.text)
    patterns = _FORMATS[test.format]
    if published:
        # <b> is also the beginning of <br>, <i> of <img>
        patterns = tuple(pattern.replace(_ATTRIBUTES, "[^>]*") for pattern in patterns)
    pieces = [normalise(piece) for pattern in patterns for piece in re.findall(pattern, text)]
    if not test.case_sensitive:
        expected, pieces = expected.lower(), [piece.lower() for piece in pieces]
    threshold = _threshold(test.max_diffs, expected)
    if any(_similarity(expected, p, test.max_diffs, published) >= threshold for p in pieces):
        return Outcome(True)
    return Outcome(False, f"{_short(expected)} not among {len(pieces)} texts in {test.format}")


def _footnote(test: FootnoteTest, text: str, published: bool) -> Outcome:
    marker = re.escape(test.marker)
    patterns = [rf"\[\^{marker}\](?!:)", rf"(?i)<sup[^>]*>{marker}</sup>"]
    if re.fullmatch("[0-9]+", test.marker):
        patterns.append(re.escape(test.marker.translate(_SUPERSCRIPTS)))
    spans = [match.span() for pattern in patterns for match in re.finditer(pattern, text)]
    if not spans:
        return Outcome(False, f"footnote mark {test.marker!r} not found")
    before = [text[max(0, start - FOOTNOTE_REACH) : start] for start, _ in spans]
    after = [text[end : end + FOOTNOTE_REACH] for _, end in spans]
    for expected, places, side in (
        (test.appears_before_marker, before, "before"),
        (test.appears_after_marker, after, "after"),
    ):
        if expected and not any(
            _beside(normalise(expected), place, test.max_diffs, side, published) for place in places
        ):
            return Outcome(False, f"{_short(expected)} not found {side} mark {test.marker!r}")
    return Outcome(True)


def _beside(expected: str, text: str, max_diffs: int, side: str, published: bool) -> bool:
    """Whether a text stands next to a footnote mark, by letters and digits alone."""
    letters, near = (
        "".join(c for c in one if c.isalnum()).lower() for one in (expected, normalise(text))
    )
    reach = 2 * len(letters) or len(near)
    near = near[-reach:] if side == "before" else near[:reach]
    similarity = _similarity(letters, near, max_diffs, published)
    return bool(near) and similarity >= _threshold(max_diffs, expected)


def _table(test: TableTest, text: str) -> Outcome:
    tables = [] if test.ignore_markdown_tables else markdown_tables(text)
    tables += html_tables(text)
    if not tables:
        return Outcome(False, "no table on the page")
    why = f"no cell like {_short(test.cell)}"
    expected = normalise(test.cell)
    for table in tables:
        grid = _Grid(table)
        for cell in grid.texts:
            if not _like(expected, grid.texts[cell], test.max_diffs):
                continue
            wrong = _wrong_neighbour(test, grid, cell)
            if wrong is None:
                return Outcome(True)
            why = f"{wrong} of {_short(test.cell)} is not {_short(getattr(test, wrong))}"
    return Outcome(False, why)


def _wrong_neighbour(test: TableTest, grid: "_Grid", cell: tuple[int, int]) -> str | None:
    for side in ("up", "down", "left", "right", "left_heading", "top_heading"):
        expected = normalise(getattr(test, side))
        if expected and not any(
            _like(expected, grid.texts[other], test.max_diffs) for other in grid.at(side, cell)
        ):
            return side
    return None


def _like(expected: str, text: str, max_diffs: int) -> bool:
    return fuzz.ratio(expected, normalise(text)) / 100 >= max(0.5, _threshold(max_diffs, expected))


class _Grid:
    """A table laid out on rows and columns, cells named by their upper left corner."""

    steps = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

    def __init__(self, table: Table) -> None:
        self.texts: dict[tuple[int, int], str] = {}
        self.headings: set[tuple[int, int]] = set()
        self.covered: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.owner: dict[tuple[int, int], tuple[int, int]] = {}
        for row, cells in enumerate(table):
            column = 0
            for cell in cells:
                while (row, column) in self.owner:
                    column += 1
                corner = (row, column)
                self.texts[corner] = cell.text
                if cell.heading:
                    self.headings.add(corner)
                self.covered[corner] = [
                    (r, c)
                    for r in range(row, min(row + cell.rowspan, len(table)))
                    for c in range(column, column + cell.colspan)
                ]
                self.owner |= dict.fromkeys(self.covered[corner], corner)
                column += cell.colspan
        self.width = 1 + max((column for _, column in self.owner), default=-1)
        self.height = len(table)

    def at(self, side: str, cell: tuple[int, int]) -> set[tuple[int, int]]:
        """Neighbours on a side; for a heading the marked cells all the way there, else the last."""
        if not side.endswith("_heading"):
            return self._next_to(cell, side)
        direction = "up" if side == "top_heading" else "left"
        seen, waiting, ends = {cell}, [cell], set()
        while waiting:
            current = waiting.pop()
            further = self._next_to(current, direction)
            if not further:
                ends.add(current)
            waiting += further - seen
            seen |= further
        return (self.headings & seen) - {cell} or ends - {cell}

    def _next_to(self, cell: tuple[int, int], direction: str) -> set[tuple[int, int]]:
        """The nearest other cell from each place that a cell covers."""
        return {
            neighbour
            for place in self.covered[cell]
            if (neighbour := next(self._walk(place, direction, cell), None)) is not None
        }

    def _walk(
        self, place: tuple[int, int], direction: str, cell: tuple[int, int]
    ) -> Iterator[tuple[int, int]]:
        down, right = self.steps[direction]
        row, column = place[0] + down, place[1] + right
        while 0 <= row < self.height and 0 <= column < self.width:
            owner = self.owner.get((row, column))
            if owner is not None and owner != cell:
                yield owner
            row, column = row + down, column + right


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
