"""The OCR suite: let a model read pages, keep what it read, and score it."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.common.files import append_rows, drop_torn_line, json_lines
from compress.common.foreign import foreign
from compress.data.ocr_pages import OcrData, OcrPage, page_name
from compress.data.olmocr_bench import Bench
from compress.eval.metrics import UNSEEN_FONT
from compress.eval.olmocr_bench import score_olmocr_bench
from compress.eval.omnidocbench import score_omnidocbench
from compress.eval.retention import Accuracy
from compress.eval.text_metrics import TextScores, ocean_scores, text_scores
from compress.eval.values import Value, page_mean, ratio_of_sums, resampled_sums, share
from compress.models.reading import Reading
from compress.parallel import distributed

# rules -> in which order Ocean-OCR's metrics get prediction and label
OCEAN_ORDERS = {
    "corrected": "the model's text as prediction",
    "published": "the label as prediction, as published numbers are made",
}


@dataclass(frozen=True, kw_only=True)
class Prediction(Reading):
    """What was read on one page.

    Parameters
    ----------
    page : its name.
    facts : what run-time methods counted while the page's batch was read, by method; on the first
        page of a batch only.
    """

    page: str
    facts: dict[str, Any] | None = None


@dataclass(frozen=True)
class Scored:
    """Scores of what was read.

    Parameters
    ----------
    metrics : name -> value.
    accuracy : the number that retention is measured on; None where no page has any text.
    distances : for text and for ``_unseen_font``, where there are such pages: page -> normalised
        edit distance of its text.
    """

    metrics: dict[str, Value]
    accuracy: Accuracy | None
    distances: dict[str, dict[str, float]]


# pages to what a model reads on them
Read = Callable[[Sequence[OcrPage]], Sequence[Prediction]]
# of each batch: pages, and the seconds in which they were read
Times = list[tuple[int, float]]
# of each batch: pages, and the milliseconds of the parts of reading them
Parts = list[tuple[int, Mapping[str, float]]]


def predict(
    data: OcrData, read: Read, batch: int, file: Path, times: Times | None = None
) -> Iterator[int]:
    """Read the pages that ``file`` lacks, on all processes, and append to it after every batch.

    Parameters
    ----------
    data : the pages.
    read : the model.
    batch : pages that are read together.
    file : JSON lines, one `Prediction` each.
    times : gets the pages of every batch that is read now, and the seconds.

    Yields
    ------
    Number of pages read so far, those of earlier sittings counted.
    """
    times = [] if times is None else times
    done = distributed.from_main(lambda: {one.page for one in read_predictions(file)})
    left = [page for page in data.pages if page.name not in done]
    count = len(data.pages) - len(left)
    yield count
    batches = [left[first : first + batch] for first in range(0, len(left), batch)]
    begun = time.perf_counter()
    for number, predictions in enumerate(distributed.shared_out(batches, read)):
        pages, seconds = len(predictions), time.perf_counter() - begun
        if number % distributed.processes():  # read while the one before was
            pages, seconds = pages + times[-1][0], seconds + times.pop()[1]
        times.append((pages, seconds))
        if distributed.is_main():
            append_rows(file, *({"page": one.page} | asdict(one) for one in predictions))
        count += len(predictions)
        yield count
        begun = time.perf_counter()


def speed(times: Times, seed: int = 0) -> dict[str, Value]:
    """``pages_per_second`` of the batches of one sitting; nothing for none.

    The first batch, which warms the model up, is left out where there are more.
    """
    timed = times[1:] or times
    if not timed:
        return {}
    pages, seconds = zip(*timed, strict=True)
    how = "pages / seconds to open and read them"
    how += ", without the first batch" * (len(times) > 1)
    return {"pages_per_second": replace(ratio_of_sums(pages, seconds, how, seed), n=sum(pages))}


def split(parts: Parts, seed: int = 0) -> dict[str, Value]:
    """``encoder_ms`` and so on, a page, of the batches of one sitting; see :func:`speed`."""
    timed = parts[1:] or parts
    how = "milliseconds / pages of the main process" + ", without the first batch" * (
        len(parts) > 1
    )
    pages = [count for count, _ in timed]
    return {
        f"{name}_ms": replace(
            ratio_of_sums([spans[name] for _, spans in timed], pages, how, seed), n=sum(pages)
        )
        for name in (timed[0][1] if timed else ())
    }


def read_predictions(file: Path) -> list[Prediction]:
    """Predictions of a file, none if there is none; a last line that a kill cut off is removed."""
    if not file.is_file():
        return []
    drop_torn_line(file)
    predictions = []
    for number, line in json_lines(file):
        with foreign(f"{file}, line {number},", "a prediction", "remove the line or the file"):
            predictions.append(Prediction(**json.loads(line)))
    return predictions


def score(
    data: OcrData, predictions: Sequence[Prediction], seed: int = 0, strict: str = "corrected"
) -> Scored:
    """Score what was read, each set by its own definitions.

    Parameters
    ----------
    data : the pages and what is known about them.
    predictions : one of each page.
    seed : of the bootstrap over pages.
    strict : "corrected", or "published" for the rules of the published scripts.

    Returns
    -------
    Scored : ``metrics`` of pages with texts are those of
        :func:`compress.eval.text_metrics.text_scores` and, with ``ocean_`` in front, means of
        :func:`compress.eval.text_metrics.ocean_scores`; and all once more with ``_unseen_font``
        where there are such pages. Benchmarks have their own. ``visual_tokens`` and ``new_tokens``
        are means per page that was read, ``ended_rate`` the share of them at whose end the model
        stopped by itself, and ``failed_pages`` the number of the others, if there are any.
        ``accuracy`` is 1 - CER over all characters of the pages in fonts of the training, or a
        benchmark's overall score.

    Raises
    ------
    ValueError : for a page without prediction, or when no page could be read.
    """
    published = strict == "published"
    by_page = {prediction.page: prediction for prediction in predictions}
    missing = [page.name for page in data.pages if page.name not in by_page]
    if missing:
        raise ValueError(
            f"one prediction per page expected; {len(missing)} of {len(data.pages)} pages have "
            f"none, the first is {missing[0]}; read the rest first"
        )
    metrics: dict[str, Value] = {}
    accuracy: Accuracy | None = None
    distances: dict[str, dict[str, float]] = {}
    if isinstance(data.annotations, Bench):
        outputs = {place: (by_page[page_name(place)].text,) for place in data.annotations.pages}
        tested = score_olmocr_bench(data.annotations, outputs, seed, published=published)
        metrics, accuracy = dict(tested.metrics), tested.accuracy
    elif data.annotations is not None:
        texts = {name: prediction.text for name, prediction in by_page.items()}
        matched = score_omnidocbench(data.annotations, texts, seed=seed, published=published)
        metrics, accuracy = dict(matched.metrics), matched.accuracy
        distances[""] = {page.image: page.text.rate for page in matched.pages if page.text}
    else:
        for suffix, pages in (
            ("", [page for page in data.pages if not page.unseen_font]),
            (UNSEEN_FONT, [page for page in data.pages if page.unseen_font]),
        ):
            if not pages:
                continue
            predicted = [by_page[page.name].text for page in pages]
            expected = [page.text or "" for page in pages]
            scores = text_scores(predicted, expected, seed)
            text_metrics = scores.metrics | _ocean(predicted, expected, strict, seed)
            metrics |= {f"{name}{suffix}": value for name, value in text_metrics.items()}
            distances[suffix] = {
                page.name: edits.rate for page, edits in zip(pages, scores.edits, strict=True)
            }
            if not suffix:
                accuracy = _text_accuracy(scores, seed)
    read = [by_page[page.name] for page in data.pages]
    failed = [prediction for prediction in read if prediction.error]
    if len(failed) == len(read):
        raise ValueError(f"no page of {data.source} could be read; {failed[0].error}")
    if failed:
        named = "; ".join(str(prediction.error) for prediction in failed)
        how = f"counted, and scored as empty text: {named}"
        metrics["failed_pages"] = Value(len(failed), how, len(read))
    read = [prediction for prediction in read if not prediction.error]
    how = "page mean, of the page in the prompt, before any method, counted"
    metrics["visual_tokens"] = page_mean([p.visual_tokens for p in read], how, seed)
    metrics["new_tokens"] = page_mean([p.new_tokens for p in read], "page mean, counted", seed)
    ended = sum(p.ended for p in read)
    metrics["ended_rate"] = share(ended, len(read), "share of pages ended by an end token")
    return Scored(metrics, accuracy, distances)


def check_accuracy(data: OcrData) -> None:
    """Refuse pages on which no accuracy can be measured, before a model reads them.

    Raises
    ------
    ValueError : when all texts are empty, no test of a benchmark can run, or it has no block that
        is scored.
    """
    blank = [Prediction("", 0, 0, True, page=page.name) for page in data.pages]
    if score(data, blank).accuracy is None:
        raise ValueError(
            f"accuracy is measured on pages with texts; those of all {len(blank)} pages of "
            f"{data.source} are empty; add pages with texts"
        )


def _text_accuracy(scores: TextScores, seed: int) -> Accuracy | None:
    """1 - CER over all characters of all pages; None where there are none."""
    errors = scores.characters
    rows = np.array([(error.length - error.edits, error.length) for error in errors], float)
    right, length = rows.sum(axis=0)
    if not length:
        return None
    sums = resampled_sums(rows, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = sums[:, 0] / sums[:, 1]
    return Accuracy("1 - CER", float(right / length), resampled, len(errors))


def _ocean(
    predicted: Sequence[str], expected: Sequence[str], strict: str, seed: int
) -> dict[str, Value]:
    """Ocean-OCR's numbers, means over pages."""
    pages = [
        ocean_scores(*pair, published_order=strict == "published")
        for pair in zip(predicted, expected, strict=True)
    ]
    how = f"page mean, Ocean-OCR's definition, {OCEAN_ORDERS[strict]}"
    return {f"ocean_{name}": page_mean([p[name] for p in pages], how, seed) for name in pages[0]}
