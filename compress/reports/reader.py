"""The reports of a run on a reader, and of an evaluation of one."""

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.bench.reading_parts import PARTS
from compress.common.extras import MissingExtraError
from compress.common.files import image_png
from compress.data.ocr_pages import OcrData, OcrPage
from compress.eval.ocr import Prediction, read_predictions
from compress.eval.text_metrics import edit_distance, normalise
from compress.methods.base import Figure, RuntimeMethod, Section, Shown
from compress.methods.registry import runtime_method
from compress.reports.html import PageText, Table, drawn, write_page
from compress.reports.run_folder import measure, metric_of, series_name, used_share

SHOWN_LONGEST = 900  # pixels: larger images are scaled down in the report
# keys of a variant's row beside what its methods counted
NOT_COUNTED = ("variant", "methods", "metrics", "accuracy_retention")


def write_reader_report(
    folder: Path,
    data: OcrData,
    variants: Sequence[Any],
    metrics: Mapping[str, Any],
    model: Any,
    processor: Any,
    prompt: str | None = None,
) -> Path:
    """Write ``report.html`` of a run, and its figures as PNG files.

    Parameters
    ----------
    folder : of the run.
    data : the pages.
    variants : dense, compressed, and those to compare.
    metrics : what metrics.json holds.
    model, processor : without methods; they are run on one page for the figures.
    prompt : that the pages were read with; the family's own for plain text when None.
    """
    compressed = variants[1]
    read = read_predictions(folder / compressed.file)
    batches = [prediction.facts for prediction in read if prediction.facts]
    image = _were_read(data, read)[0].open()

    def of_methods() -> list[Section]:
        sections: list[Section] = []
        for method in compressed.methods:
            others = [other for other in compressed.methods if other is not method]
            facts = [batch[method.name] for batch in batches if method.name in batch]
            sections += method.sections(Shown(model, processor, image, prompt, others, facts))
        by_name: dict[str, RuntimeMethod] = {m.name: m for v in variants for m in v.methods}
        for count, (name, calibration) in enumerate((metrics["calibration"] or {}).items()):
            for section in by_name[name.split()[0]].calibration_sections(calibration):
                figures = [
                    replace(figure, name=f"{figure.name}{count or ''}")
                    for figure in section.figures
                ]
                sections.append(replace(section, title=f"{section.title}: {name}", figures=figures))
        return sections

    facts = metrics["run"]
    return write_page(
        folder,
        metrics,
        f"{' + '.join(method.label() for method in compressed.methods)} on {facts['model']}",
        [f"data {facts['data']}", f"{facts['pages']} pages"],
        lead=" ".join(
            [*_speed(metrics["metrics"]), _lead(metrics["comparison"][1], metrics["accuracy"])]
        ),
        sections=[_comparison(metrics["comparison"], metrics["accuracy"]), *drawn(of_methods)],
        pages=chosen_pages(data, read),
    )


def write_ocr_report(
    folder: Path, data: OcrData, predictions: Sequence[Prediction], metrics: Mapping[str, Any]
) -> Path:
    """Write ``report.html`` of an evaluation.

    Parameters
    ----------
    folder : where to.
    data : the pages.
    predictions : one of each.
    metrics : what metrics.json holds.
    """
    facts, methods = metrics["run"], [runtime_method(one).label() for one in metrics["methods"]]
    return write_page(
        folder,
        metrics,
        f"{facts['model']}{', with ' if methods else ''}{' + '.join(methods)}",
        [f"data {facts['data']}", f"{facts['pages']} pages"],
        pages=chosen_pages(data, predictions),
        facts_title="The evaluation",
    )


def _lead(row: Mapping[str, Any], accuracy: str) -> str:
    """How well the pages are read, with how many of the visual tokens."""
    if (kept := row.get("accuracy_retention")) is None:
        return ""
    used = used_share(row)
    with_tokens = "" if used is None else f", with {_percent(used)} of the visual tokens"
    return (
        f"Keeps {_percent(kept['value'])} of the dense model’s accuracy ({accuracy}){with_tokens}."
    )


def _speed(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How many pages a second, and where the time goes; nothing where it was not measured."""
    if "pages_per_second" not in metrics:
        return []

    def value(name: str, side: str) -> float:
        return float(metrics[name][side]["value"])

    rates = [value("pages_per_second", side) for side in ("compressed", "dense")]
    times = {part: value(f"{part}_ms", "compressed") for part in PARTS if f"{part}_ms" in metrics}
    whole = sum(times.values())
    shares = ", ".join(f"{name} {spent / whole:.0%}" for name, spent in times.items() if whole)
    where = f"; of {whole:,.0f} ms a page, {shares}" if shares else ""
    return [f"Reads {rates[0]:.3g} pages a second, the dense model {rates[1]:.3g}{where}."]


def _comparison(rows: Sequence[Mapping[str, Any]], accuracy: str) -> Table:
    """Every variant with what its methods counted, and the curve of accuracy against it."""
    name = measure(accuracy)
    counted = list(dict.fromkeys(key for row in rows for key in row if key not in NOT_COUNTED))
    lines: list[list[str | Mapping[str, Any]]] = []
    series: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for row in rows:
        used, retention = used_share(row), row.get("accuracy_retention")
        counts = [_count(row.get(key)) for key in counted]
        values = [retention or "–", row["metrics"].get(name) or "–"]
        lines.append([row["variant"], _count(used), *counts, *values])
        if used is not None and retention:
            series.setdefault(series_name(row), []).append((used, retention))
    figures = []
    # where it is missing the other figures' section says so
    with contextlib.suppress(MissingExtraError):
        from compress.reports.figures import retention_plot

        if series:
            caption = f"Accuracy ({accuracy}) against visual tokens used"
            plot = retention_plot(series, accuracy)
            figures.append(Figure("comparison", plot, caption, "wide"))
    return Table(
        "Every variant, on the same pages",
        figures=figures,
        headings=[
            "Variant",
            "Visual tokens used",
            *(metric_of(key).label for key in counted),
            f"Accuracy retention ({accuracy})",
            metric_of(name).label,
        ],
        rows=lines,
    )


def _count(value: float | Sequence[float] | None) -> str:
    """What a method counted: a number, a share, or a share of each layer."""
    if value is None:
        return "–"
    if isinstance(value, int | float):
        return str(value) if isinstance(value, int) else _percent(value)
    return ", ".join(f"{share:.0%}" for share in value)


def _percent(share: float) -> str:
    return f"{share:.2%}"


def chosen_pages(data: OcrData, predictions: Sequence[Prediction]) -> list[PageText]:
    """The best, the median and the worst page, with what differs from the true text marked.

    Of a benchmark, whose pages have no text to compare with, the first, the middle and the last.
    """
    by_page = {prediction.page: prediction.text for prediction in predictions}

    def distance(page: OcrPage) -> float:
        return edit_distance(normalise(by_page[page.name]), normalise(page.text or "")).rate

    ranked = _were_read(data, predictions)
    if data.annotations is None:
        ranked.sort(key=distance)
    chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    pages = []
    for place, page in chosen.items():
        title = f"Page {page.name}"
        if page.text is not None:
            title = f"{place.capitalize()} page, {page.name}: edit distance {distance(page):.3f}"
        image = page.open().copy()
        image.thumbnail((SHOWN_LONGEST, SHOWN_LONGEST))
        pieces = marked(by_page[page.name], page.text)
        picture = Figure(place, image_png(image), title)
        pages.append(PageText(picture, pieces, page.text is not None))
    return pages


def _were_read(data: OcrData, predictions: Sequence[Prediction]) -> list[OcrPage]:
    failed = {prediction.page for prediction in predictions if prediction.error}
    return [page for page in data.pages if page.name not in failed]


def marked(predicted: str, true: str | None) -> list[tuple[str, str]]:
    """Cut a predicted text into pieces by how they differ from the true text.

    Parameters
    ----------
    predicted : the text.
    true : what stands on the page; None where it is not known, then there is one piece.

    Returns
    -------
    Pairs of a mark and a piece: "del" of the true text alone, "ins" of the predicted one alone, and
    none for what is in both.
    """
    if true is None:
        return [("", predicted)]
    pieces = []
    matcher = difflib.SequenceMatcher(None, true, predicted, autojunk=False)
    for kind, a0, a1, b0, b1 in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(("", predicted[b0:b1]))
        else:
            pieces += [
                (mark, text)
                for mark, text in (("del", true[a0:a1]), ("ins", predicted[b0:b1]))
                if text
            ]
    return pieces
