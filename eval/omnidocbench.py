"""Scores by the definitions of OmniDocBench v1.5, with a matching of blocks of our own.

Sources: README and metrics of opendatalab/OmniDocBench v1.5 (arXiv 2412.07626). The aggregations
are theirs: edits of a page are summed and divided by the summed lengths of the longer texts, pages
are averaged; TEDS is averaged per page, then over the pages that have tables. README.md says what
differs, and what of it ``published`` computes as there.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from compress.common.extras import extra
from compress.data.omnidocbench import Block, Page
from compress.eval.retention import Accuracy
from compress.eval.table_similarity import html_tables, markdown_tables, table_html, teds
from compress.eval.text_metrics import Errors, edit_distance
from compress.eval.values import (
    Value,
    page_mean,
    percentile_interval,
    ratio_of_sums,
    resampled_sums,
)

with extra("ocr", "scoring pages"):
    from rapidfuzz import process
    from rapidfuzz.distance import Levenshtein

TEXT_CATEGORIES = ("text_block", "title", "code_txt", "code_txt_caption", "reference")
FORMULA = "equation_isolated"
# matched, so that a prediction of them is not held against the page, but not scored
UNSCORED_CATEGORIES = (
    "figure_caption",
    "figure_footnote",
    "table_caption",
    "table_footnote",
    "code_algorithm",
    "code_algorithm_caption",
    "header",
    "footer",
    "page_footnote",
    "page_number",
    "equation_caption",
)
# a normalised edit distance below this is the same block beyond doubt, as in quick_match
SAME_BLOCK = 0.25

_DISPLAY_FORMULA = r"\$\$.+?\$\$|\\\[.+?\\\]"
_SPECIAL = re.compile(
    rf"(?P<table><table\b.*?</table>)|(?P<formula>{_DISPLAY_FORMULA})"
    # a header, a separator line, and rows
    r"|(?P<pipes>^[^\n]*\|[^\n]*\n[ \t]*\|?[ \t]*:?-+[-:| \t]*(?:\n[^\n]*\|[^\n]*)*)",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
_FENCE = re.compile(r"^```[\w-]*[ \t]*$", re.MULTILINE)
_IMAGE = re.compile(r"!\[.*?\]\(.*?\)")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_LENGTH = r"-?[\d.]+\s*[a-z]{2}"
# a line break is one token with its options: its backslashes belong to no other command
_LATEX = re.compile(
    rf"(?P<row>\\\\\*?(?:\s*\[\s*{_LENGTH}\s*\])?)"
    rf"|(?P<space>[\s~$]|\\(?:[,;:!>/()\[\]\s]|(?:arraycolsep|[hv]skip|m?kern|mskip)\s*=?\s*{_LENGTH}))"
    r"|\\(?P<word>operatorname\*|[a-zA-Z]+)|\\?.",
    re.DOTALL,
)
# how many arguments go with a command that names, labels or sets a space
_ARGUMENTS = {"tag": 1, "label": 1, "hspace": 1, "vspace": 1, "begin": 1, "end": 1, "setlength": 2}
# commands for the look of what follows, and spaces
_LOOK = re.compile(
    r"math(?:bf|rm|normal|it|bb|cal|scr|frak|sf|tt|bfcal)|text(?:bf|rm|it|sf|tt)?"
    r"|boldmath|boldsymbol|symbf|symbfit|bm|operatorname\*?|left|right|displaystyle|scriptscriptstyle"
    r"|notag|nonumber|q?quad|enspace|nobreakspace|(?:thin|med|thick|negmed)?space"
)
# what `published_formula` removes, in this order
_PUBLISHED_FILTER = (
    *(rf"\math{font}" for font in "bf rm normal it bb cal scr frak sf tt".split()),
    *(rf"\{name}" for name in "textbf text boldmath boldsymbol operatorname bm symbfit".split()),
    *(rf"\{name}" for name in "mathbfcal symbf scriptscriptstyle notag setlength coloneqq".split()),
    *(rf"\{size}space" for size in ("", "thick", "thin", "med", "nobreak", "negmed")),
    *(rf"\{name}" for name in "quad qquad enspace substackw".split()),
    *(" ", "$$", r"\left", r"\right", r"\displaystyle", r"\text"),
)


@dataclass(frozen=True)
class Predicted:
    """One block of a predicted page: kind ``text``, ``formula`` or ``table`` (then HTML)."""

    kind: str
    content: str


@dataclass(frozen=True)
class PageResult:
    """What one page adds to the scores; None where the page has no such block.

    Parameters
    ----------
    text, formula : summed edits and lengths of its blocks, each normalised.
    teds, teds_structure : means over its tables, higher is better.
    reading_order : normalised edit distance of the order of its text blocks.
    """

    image: str
    text: Errors | None
    formula: Errors | None
    teds: float | None
    teds_structure: float | None
    reading_order: float | None


@dataclass(frozen=True)
class OmniDocBenchScores:
    """Results of each page, and metric name -> value over the pages that have such blocks.

    ``accuracy`` is the overall score once more, for retention.
    """

    pages: tuple[PageResult, ...]
    metrics: dict[str, Value]
    accuracy: Accuracy


def score_omnidocbench(
    pages: Sequence[Page],
    predictions: Mapping[str, str],
    *,
    seed: int = 0,
    published: bool = False,
) -> OmniDocBenchScores:
    """Score predicted Markdown against annotated pages.

    ``overall`` of v1.5 is ((1 - text_edit) * 100 + TEDS * 100 + CDM * 100) / 3. CDM renders
    formulas with TeX and is not computed here, so the mean is called ``overall_proxy``, with
    1 - formula_edit in its place, and terms that no page has are left out of it. Its ``how`` says
    which terms it has.

    Parameters
    ----------
    pages : from `compress.data.omnidocbench`.
    predictions : ``Page.image`` -> Markdown, one for each page; '' for a page that gave nothing.
    seed : of the bootstrap over pages.
    published : whether to normalise and sort blocks by the rules of the published script, where
        they are at odds with what a page says.

    Returns
    -------
    OmniDocBenchScores : ``text_edit``, ``formula_edit`` and ``reading_order_edit`` (mean over
        pages, called ALL_page_avg by OmniDocBench), ``text_edit_whole`` (all edits over all
        lengths, its edit_whole), ``teds`` and ``teds_structure`` in [.., 1], and
        ``overall_proxy`` in [.., 100]. Edit distances are in [0, 1], lower is better.

    Raises
    ------
    ValueError : for no pages, a page without prediction, or pages without any text, table or
        formula.
    """
    absent = [page.image for page in pages if page.image not in predictions]
    if absent or not pages:
        raise ValueError(
            f"one prediction per page expected, for at least one page; of {len(pages)} pages "
            f"{len(absent)} have none, the first is {absent[0] if absent else None}; give '' for a "
            "page that gave nothing"
        )
    results = tuple(
        score_page(page, predictions[page.image], published=published) for page in pages
    )
    rules = ", by the published script's rules" * published
    metrics = {}
    for name, values in _page_values(results).items():
        if any(value is not None for value in values):
            how = f"mean over the pages that have any{rules}"
            metrics[name] = page_mean([v for v in values if v is not None], how, seed)
    texts = [result.text for result in results if result.text]
    if texts:
        metrics["text_edit_whole"] = ratio_of_sums(
            [e.edits for e in texts],
            [e.length for e in texts],
            f"all edits / all lengths{rules}",
            seed,
        )
    overall, how = _overall(results, seed)
    interval = percentile_interval(overall.resampled, overall.n)
    metrics[overall.name] = Value(overall.value, how + rules, overall.n, interval)
    return OmniDocBenchScores(results, metrics, overall)


def score_page(page: Page, prediction: str, *, published: bool = False) -> PageResult:
    """Score one page; see `match_blocks` for how predicted blocks find theirs.

    Text is compared after `normalise_text`, formulas after `normalise_formula`, or both after
    `published_text` and `published_formula`; tables by TEDS. Annotated text and formulas are
    matched in one go, since models write formulas as text and the reverse. An annotated block
    without prediction has edit distance 1, an annotated table TEDS 0. Predicted blocks that are
    left over cost nothing, as in OmniDocBench.
    """
    text_form = published_text if published else normalise_text
    formula_form = published_formula if published else normalise_formula
    forms = {"text": text_form, "formula": formula_form}
    predicted = split_markdown(prediction)
    # place on the page, kind, and normalised content
    lines = [
        (place, block.kind, forms[block.kind](block.content))
        for place, block in enumerate(predicted)
        if block.kind in forms
    ]
    blocks = _joined_blocks(page, published)
    unscored = [text_form(b.text) for b in blocks if b.category in UNSCORED_CATEGORIES]
    lines = [
        line
        for line in lines
        if line[2] and all(edit_distance(line[2], one).rate >= SAME_BLOCK for one in unscored)
    ]
    scored = [
        (block, formula_form(block.latex) if block.category == FORMULA else text_form(block.text))
        for block in sorted(blocks, key=lambda block: block.order or 0)
        if block.category in (*TEXT_CATEGORIES, FORMULA)
    ]
    scored = [(block, content) for block, content in scored if content]
    text: list[Errors] = []
    formula: list[Errors] = []
    order_read: list[tuple[int, list[int]]] = []
    order_true = []
    for true_places, read_places in match_blocks(
        [content for _, content in scored], [content for _, _, content in lines]
    ):
        group = [scored[place][0] for place in true_places]
        read = [lines[place] for place in read_places]
        is_formula = group[0].category == FORMULA
        true_content = "".join(scored[place][1] for place in true_places)
        if published and is_formula and read and read[0][1] == "text":
            # a formula that was read as text is a text there
            is_formula = False
            true_content = text_form("".join(block.latex for block in group))
        errors = edit_distance("".join(content for _, _, content in read), true_content)
        (formula if is_formula else text).append(errors)
        if group[0].category != FORMULA:
            orders = [block.order for block in group if block.order is not None]
            order_true += orders
            if read:
                order_read.append((read[0][0], orders))
    similar = _table_scores(
        [block.html for block in blocks if block.category == "table" and html_tables(block.html)],
        [block.content for block in predicted if block.kind == "table"],
    )
    return PageResult(
        image=page.image,
        text=_sum(text),
        formula=_sum(formula),
        teds=float(np.mean([whole for whole, _ in similar])) if similar else None,
        teds_structure=float(np.mean([bare for _, bare in similar])) if similar else None,
        reading_order=edit_distance(
            [order for _, orders in sorted(order_read) for order in orders], sorted(order_true)
        ).rate
        if order_true
        else None,
    )


def split_markdown(text: str) -> list[Predicted]:
    r"""Split a predicted page into blocks, in the order of the page.

    HTML tables and pipe tables are tables, ``$$...$$`` and ``\[...\]`` formulas, and what lies
    between them is text, split at empty lines, or at every line where there is no empty one. Images
    and the marks of code fences are removed. Unlike OmniDocBench's splitter, inline formulas stay
    in their text, LaTeX tables are text (there they score 0), and runs of repeated characters are
    not shortened.
    """
    text = _FENCE.sub("", _IMAGE.sub("", text.replace("\r\n", "\n")))
    blocks: list[Predicted] = []
    separator = r"\n\s*\n" if re.search(r"\n\s*\n", text.strip()) else r"\n"

    def add_text(part: str) -> None:
        pieces = (piece.strip() for piece in re.split(separator, part))
        blocks.extend(Predicted("text", piece) for piece in pieces if piece)

    end = 0
    for match in _SPECIAL.finditer(text):
        add_text(text[end : match.start()])
        end = match.end()
        content = match.group()
        if match["formula"]:
            blocks.append(Predicted("formula", content))
        elif match["table"]:
            blocks.append(Predicted("table", content))
        else:
            blocks.extend(Predicted("table", table_html(t)) for t in markdown_tables(content))
    add_text(text[end:])
    return blocks


def normalise_text(text: str) -> str:
    """Letters, digits and underscores of all scripts; nothing else, as in OmniDocBench.

    HTML tags are removed first. LaTeX inside the text is not translated to Unicode: both sides keep
    the letters of its commands.
    """
    return re.sub(r"\W", "", _TAG.sub("", text))


def published_text(text: str) -> str:
    r"""`normalise_text` by OmniDocBench's rules (``clean_string`` of its data_preprocess.py).

    HTML tags stay, and ``\t``, ``\n``, ``/t`` and ``/n`` go wherever they stand: of ``and/not``,
    ``andot`` is left. Inline formulas, which it first translates by pylatexenc, stay LaTeX.
    """
    for mark in (r"\t", r"\n", "\t", "\n", "/t", "/n"):
        text = text.replace(mark, "")
    return re.sub(r"\W", "", text)


def normalise_formula(latex: str) -> str:
    r"""LaTeX without delimiters, white space, tags, environments and font commands, lower case.

    It is cut as TeX cuts it: a control word such as ``\alpha`` ends with its letters, a control
    symbol such as ``\,`` is one character, and ``\\`` is a line break whatever follows. A space
    stays between a control word and a letter, since ``\alpha b`` is not ``\alphab``.
    """
    kept = [""]
    arguments = depth = 0  # that are still to be dropped, and of the braces in one of them
    for token in _LATEX.finditer(latex):
        text, word = token.group(), token["word"]
        if depth or (arguments and text == "{"):
            depth += (text == "{") - (text == "}")
            arguments -= not depth
        elif token["space"]:
            continue
        elif arguments:
            arguments -= text != "*"
        elif word in _ARGUMENTS:
            arguments = _ARGUMENTS[word]
        elif not (word and _LOOK.fullmatch(word)):
            ends_in_word = kept[-1].startswith("\\") and kept[-1][-1].isalpha()
            kept += [" "] * (ends_in_word and text.isalpha()) + [r"\\" if token["row"] else text]
    return "".join(kept).strip(".").lower()


def published_formula(latex: str) -> str:
    r"""`normalise_formula` by OmniDocBench's rules (``normalized_formula`` there).

    Commands are removed one after the other wherever their letters stand, so that ``\leftarrow``
    becomes ``arrow``; ``\,`` and ``\label`` stay, and ``\alpha b`` is ``\alphab``.
    """
    latex = latex.strip().strip("$").strip("\n")
    inside = re.search(r"\\\[(.+?)(?<!\\)\\\]", latex)
    latex = inside[1].strip() if inside else latex
    for command in (r"tag\{", r"hspace\{", r"begin\{", r"end\{", "arraycolsep"):
        latex = re.sub(rf"\\{command}.*?\}}", "", latex)
    latex = latex.strip(".")
    for command in _PUBLISHED_FILTER:
        latex = latex.replace(command, "")
    return latex.lower()


def match_blocks(
    expected: Sequence[str], predicted: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Match annotated blocks with predicted ones; every annotated block occurs exactly once.

    Our own simplification of OmniDocBench's ``quick_match``, which it follows in purpose: on whole
    pages the scores are close, not equal. (1) Where a block has no partner below a normalised edit
    distance of `SAME_BLOCK`, runs of adjacent blocks of the other side that have none either are
    joined, as long as each joining brings them closer to it: a model may split a paragraph, or run
    two together. Both directions; of runs that overlap the closest wins. (2) The Hungarian method
    pairs what results with the smallest sum of normalised edit distances. There is no threshold: a
    poor pair costs what it costs.

    Parameters
    ----------
    expected, predicted : normalised texts in reading order, none empty.

    Returns
    -------
    list : pairs of places in ``expected`` and places in ``predicted``; the latter is empty where
        nothing was left.
    """
    if not expected or not predicted:
        return [([place], []) for place in range(len(expected))]
    distances = _distances(expected, predicted)
    predicted_groups = _join_runs(expected, predicted, distances)
    predicted_joined = ["".join(predicted[place] for place in group) for group in predicted_groups]
    distances = _distances(expected, predicted_joined)
    expected_groups = _join_runs(predicted_joined, expected, distances.T)
    expected_joined = ["".join(expected[place] for place in group) for group in expected_groups]
    distances = _distances(expected_joined, predicted_joined)
    partner = dict(zip(*(side.tolist() for side in linear_sum_assignment(distances)), strict=True))
    return [
        (group, predicted_groups[partner[place]] if place in partner else [])
        for place, group in enumerate(expected_groups)
    ]


def _join_runs(
    targets: Sequence[str], pieces: Sequence[str], distances: NDArray[np.float64]
) -> list[list[int]]:
    """Group adjacent pieces that together come closer to a target than each alone."""
    free_targets = np.flatnonzero(distances.min(axis=1) >= SAME_BLOCK).tolist()
    free = set(np.flatnonzero(distances.min(axis=0) >= SAME_BLOCK).tolist())
    candidates = []
    for target in free_targets:
        for start in free:
            text, best = pieces[start], float(distances[target, start])
            end = start + 1
            while end in free:
                text += pieces[end]
                distance = edit_distance(text, targets[target]).rate
                if distance >= min(best, float(distances[target, end])):
                    break
                best, end = distance, end + 1
            if end > start + 1:
                candidates.append((best, start, end, target))
    group_of: dict[int, list[int]] = {}
    served = set()
    for _, start, end, target in sorted(candidates):
        run = list(range(start, end))
        if target not in served and not any(place in group_of for place in run):
            served.add(target)
            group_of |= {place: run for place in run}
    groups = (group_of.get(place, [place]) for place in range(len(pieces)))
    return [group for place, group in enumerate(groups) if group[0] == place]


def _distances(rows: Sequence[str], columns: Sequence[str]) -> NDArray[np.float64]:
    return process.cdist(
        rows, columns, scorer=Levenshtein.normalized_distance, dtype=np.float64, workers=1
    )


def _joined_blocks(page: Page, published: bool) -> list[Block]:
    """Blocks of a page that count, those that are parts of one paragraph joined.

    The published script does not look at ``ignore``, joins a relation to every group that it
    touches without joining the groups, and repeats the text of a part that two relations name.
    """
    blocks = {b.anno_id: b for b in page.blocks if published or not b.ignore}
    groups: list[list[int]] = []
    for relation in page.truncated:
        parts = [number for number in relation if number in blocks]
        touched = [group for group in groups if set(group) & set(parts)]
        if published:
            for group in touched:
                group += parts
            groups += [] if touched else [parts]
        else:
            groups = [group for group in groups if group not in touched]
            groups.append(sorted(set(parts).union(*touched)))
    joined = []
    for group in filter(None, groups):
        whole = sorted((blocks[number] for number in group), key=lambda part: part.order or 0)
        text, latex = ("".join(getattr(part, name) for part in whole) for name in ("text", "latex"))
        joined.append(replace(whole[0], text=text, latex=latex))
    alone = blocks.keys() - {number for group in groups for number in group}
    return [block for number, block in blocks.items() if number in alone] + joined


def _table_scores(expected: Sequence[str], predicted: Sequence[str]) -> list[tuple[float, float]]:
    """TEDS and structure-only TEDS of each annotated table with the predicted one paired to it."""
    partner: dict[int, str] = {}
    if expected and predicted:
        rows, columns = linear_sum_assignment(_distances(expected, predicted))
        partner = {row: predicted[column] for row, column in zip(rows, columns, strict=True)}
    return [
        (teds(partner.get(i, ""), html), teds(partner.get(i, ""), html, structure_only=True))
        for i, html in enumerate(expected)
    ]


def _sum(errors: Sequence[Errors]) -> Errors | None:
    if not errors:
        return None
    return Errors(sum(e.edits for e in errors), sum(e.length for e in errors))


def _page_values(results: Sequence[PageResult]) -> dict[str, list[float | None]]:
    return {
        "text_edit": [r.text.rate if r.text else None for r in results],
        "formula_edit": [r.formula.rate if r.formula else None for r in results],
        "teds": [r.teds for r in results],
        "teds_structure": [r.teds_structure for r in results],
        "reading_order_edit": [r.reading_order for r in results],
    }


def _overall(results: Sequence[PageResult], seed: int) -> tuple[Accuracy, str]:
    """The overall score, and of what it is made."""
    values = _page_values(results)
    terms = {
        "1 - text_edit": [None if v is None else 1 - v for v in values["text_edit"]],
        "TEDS": values["teds"],
        "1 - formula_edit (in place of CDM)": [
            None if v is None else 1 - v for v in values["formula_edit"]
        ],
    }
    terms = {name: term for name, term in terms.items() if any(v is not None for v in term)}
    if not terms:
        raise ValueError(
            "an overall score is a mean over text, tables and formulas; no page has any of them; "
            "score pages that do"
        )
    # a sum and a count for each term, so that a resample of pages is a mean of means again
    columns = np.array(
        [
            [number for v in page for number in ((0.0, 0.0) if v is None else (v, 1.0))]
            for page in zip(*terms.values(), strict=True)
        ]
    )

    def combine(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return 100 * (sums[:, 0::2] / sums[:, 1::2]).mean(axis=1)

    value = float(combine(columns.sum(axis=0, keepdims=True))[0])
    resampled = combine(resampled_sums(columns, seed))
    return Accuracy("overall_proxy", value, resampled, len(results)), f"mean of {', '.join(terms)}"
