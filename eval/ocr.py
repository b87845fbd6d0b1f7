"""The OCR suite: let a model read pages, keep what it read, and score it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compress.data.ocr_pages import OcrData, OcrPage, page_name
from compress.data.olmocr_bench import Bench
from compress.eval.olmocr_bench import score_olmocr_bench
from compress.eval.omnidocbench import score_omnidocbench
from compress.eval.text_metrics import character_errors, normalise, text_scores
from compress.eval.values import Value, page_mean, percentile_interval, resampled_sums, share

UNSEEN = "_unseen_font"
HIGHER = {
    "bleu",
    "bleu_corpus",
    "meteor_exact_stem",
    "token_precision",
    "token_recall",
    "token_f1",
    "token_multiset_f1",
    "teds",
    "teds_structure",
    "overall",
    "overall_proxy",
    "score",
    "score_without_math",
    "ended_rate",
}


@dataclass(frozen=True)
class Prediction:
    """What was read on one page.

    Parameters
    ----------
    page : its name.
    text : what was read.
    new_tokens, visual_tokens : generated, and of the page in the prompt.
    ended : whether the model ended by itself, rather than at the length limit.
    facts : what run-time methods counted while the page's batch was read, by method; on the first
        page of a batch only.
    """

    page: str
    text: str
    new_tokens: int
    visual_tokens: int
    ended: bool
    facts: dict[str, Any] | None = None


# images, with their names, to what a model reads on them
Read = Callable[[Sequence[str], Sequence[Image.Image]], Sequence[Prediction]]


def predict(data: OcrData, read: Read, batch: int, file: Path) -> Iterator[int]:
    """Read the pages that ``file`` lacks, and append to it after every batch.

    Parameters
    ----------
    data : the pages.
    read : the model.
    batch : pages that are read together.
    file : JSON lines, one `Prediction` each.

    Yields
    ------
    Number of pages read so far, those of earlier sittings counted.

    Raises
    ------
    ValueError : for a damaged file.
    """
    done = {prediction.page for prediction in read_predictions(file)}
    left = [page for page in data.pages if page.name not in done]
    count = len(data.pages) - len(left)
    yield count
    for first in range(0, len(left), batch):
        chosen = left[first : first + batch]
        found = read([page.name for page in chosen], [page.open() for page in chosen])
        lines = [json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in found]
        with file.open("a", encoding="utf8") as out:
            out.write("".join(lines))
        count += len(chosen)
        yield count


def read_predictions(file: Path) -> list[Prediction]:
    """Predictions of a file, none if there is none; a last line that a kill cut off is removed.

    Raises
    ------
    ValueError : naming the damaged line.
    """
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as out:
            out.truncate(len(whole))
    found = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            found.append(Prediction(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number}, should be a prediction; {error}; remove the line or the "
                "file"
            ) from error
    return found


def score(data: OcrData, predictions: Sequence[Prediction], seed: int = 0) -> dict[str, Value]:
    """Score what was read, each set by its own definitions.

    Parameters
    ----------
    data : the pages and what is known about them.
    predictions : one of each page.
    seed : of the bootstrap over pages.

    Returns
    -------
    dict : metric -> value. Pages with texts have those of
        :func:`compress.eval.text_metrics.text_scores`, and once more with ``_unseen_font`` where
        there are such pages; benchmarks have their own. ``visual_tokens`` and ``new_tokens`` are
        means per page, ``ended_rate`` the share of pages at whose end the model stopped by itself.

    Raises
    ------
    ValueError : for a page without prediction.
    """
    by_page = {prediction.page: prediction for prediction in predictions}
    missing = [page.name for page in data.pages if page.name not in by_page]
    if missing:
        raise ValueError(
            f"one prediction per page expected; {len(missing)} of {len(data.pages)} pages have "
            f"none, the first is {missing[0]}; read the rest first"
        )
    found: dict[str, Value] = {}
    if isinstance(data.annotations, Bench):
        outputs = {place: (by_page[page_name(place)].text,) for place in data.annotations.pages}
        found |= score_olmocr_bench(data.annotations, outputs, seed).metrics
    elif data.annotations is not None:
        texts = {name: prediction.text for name, prediction in by_page.items()}
        found |= score_omnidocbench(data.annotations, texts, seed=seed).metrics
    else:
        for suffix, pages in (
            ("", [page for page in data.pages if not page.unseen_font]),
            (UNSEEN, [page for page in data.pages if page.unseen_font]),
        ):
            if pages:
                scores = text_scores(*_texts(pages, by_page), seed)
                found |= {f"{name}{suffix}": value for name, value in scores.metrics.items()}
    given = [by_page[page.name] for page in data.pages]
    how = "page mean, counted"
    found["visual_tokens"] = page_mean([p.visual_tokens for p in given], how, seed)
    found["new_tokens"] = page_mean([p.new_tokens for p in given], how, seed)
    ended = sum(p.ended for p in given)
    found["ended_rate"] = share(ended, len(given), "share of pages ended by an end token")
    return found


def better(metric: str) -> str:
    """Which way a metric of this suite is better; "" for counts of tokens."""
    if metric in ("visual_tokens", "new_tokens"):
        return ""
    name = metric.removesuffix(UNSEEN)
    return "higher" if name in HIGHER or name.startswith("pass_rate_") else "lower"


def accuracy_retention(
    pages: Sequence[OcrPage],
    compressed: Sequence[Prediction],
    dense: Sequence[Prediction],
    seed: int = 0,
) -> Value:
    """Accuracy of a compressed model over that of the dense one, accuracy being 1 - CER.

    Parameters
    ----------
    pages : with texts; those that are compared.
    compressed, dense : what the two models read, a prediction of each page at least.
    seed : of the bootstrap, which draws a page with both its readings.

    Returns
    -------
    Value : (1 - CER of the compressed) / (1 - CER of the dense), CER over all characters of all
        pages, which is not clipped: a model that writes more than there is can fall below 0.

    Raises
    ------
    ValueError : when a page has no prediction, or the dense model reads nothing right.
    """
    rows = []
    for sides in (compressed, dense):
        by_page = {prediction.page: prediction for prediction in sides}
        missing = [page.name for page in pages if page.name not in by_page]
        if missing or not pages:
            raise ValueError(
                f"both models must have read each of {len(pages)} pages, at least one; "
                f"{len(missing)} lack a prediction, the first is {missing[0] if missing else None}"
            )
        predicted, wanted = _texts(pages, by_page)
        pairs = zip(predicted, wanted, strict=True)
        errors = [character_errors(normalise(p), normalise(w)) for p, w in pairs]
        rows.append([error.length - error.edits for error in errors])
    right, right_dense = (sum(row) for row in rows)
    if right_dense <= 0:
        raise ValueError(
            "retention is measured against a dense model that reads; its CER is 1 or more on these "
            "pages; choose pages that it can read"
        )
    sums = resampled_sums(np.array(rows).T, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = sums[:, 0] / sums[:, 1]
    how = "(1 - CER) / (1 - CER of the dense model), corpus, jiwer, paired bootstrap over pages"
    interval = percentile_interval(resampled, len(pages))
    return Value(right / right_dense, how, len(pages), interval)


def _texts(
    pages: Sequence[OcrPage], by_page: Mapping[str, Prediction]
) -> tuple[list[str], list[str]]:
    """Predicted and true texts."""
    return [by_page[page.name].text for page in pages], [page.text or "" for page in pages]
