"""The report of an OCR evaluation: metrics, and predicted pages beside their images."""

import difflib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from compress.common.files import write_text
from compress.data.ocr_pages import OcrData, OcrPage
from compress.eval.metrics import arrow
from compress.eval.ocr import Prediction
from compress.eval.text_metrics import edit_distance, normalise
from compress.reports.html import document, escape, facts_table, picture, value_cell
from compress.reports.run_folder import metric_of

SHOWN_LONGEST = 900  # pixels: larger images are scaled down in the report
OCR_CSS = """<style>
.page { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 20px;
  margin-top: 20px; }
.page img { border: 1px solid var(--line); }
.page pre { white-space: pre-wrap; overflow-wrap: anywhere; }
ins { background: #ffe3c2; text-decoration: none; }
del { background: #d8e8f6; }
@media (max-width: 760px) { .page { grid-template-columns: minmax(0, 1fr); } }
</style>"""


def write_ocr_report(
    folder: Path, data: OcrData, predictions: Sequence[Prediction], metrics: Mapping[str, Any]
) -> Path:
    """Write ``report.html``: the metrics, and the best, a middling and the worst page.

    Parameters
    ----------
    folder : where to.
    data : the pages.
    predictions : one of each.
    metrics : what metrics.json holds.
    """
    facts = metrics["run"]
    parts = [f"{name} {facts[name]}" for name in ("model", "data", "pages")]
    if metrics["methods"]:
        parts.append(f"method {' + '.join(method['name'] for method in metrics['methods'])}")
    body = [
        OCR_CSS,
        _table(metrics["metrics"]),
        pages_section(data, predictions),
        f"<section><h2>The evaluation</h2>{facts_table(facts)}</section>",
    ]
    path = folder / "report.html"
    write_text(path, document(folder.resolve().name, " · ".join(parts), body))
    return path


def _table(metrics: Mapping[str, Any]) -> str:
    rows = [
        f'<tr><th scope="row">{escape(metric_of(name).label)} '
        f'<span class="better">{arrow(entry["better"])}</span></th>'
        f'<td data-label="value">{value_cell(entry, "")}</td>'
        f'<td data-label="n">{entry["n"]:,}</td>'
        f'<td data-label="how" class="how">{escape(entry["how"])}</td></tr>'
        for name, entry in metrics.items()
    ]
    return (
        '<section><h2>Metrics</h2><table class="metrics"><thead><tr><th>metric</th>'
        "<th>value, 95% interval</th><th>n</th><th>how</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></section>"
    )


def pages_section(data: OcrData, predictions: Sequence[Prediction]) -> str:
    """Three pages next to what was read on them; those without a text are shown without marks."""
    by_page = {prediction.page: prediction.text for prediction in predictions}

    def distance(page: OcrPage) -> float:
        texts = normalise(by_page[page.name]), normalise(page.text or "")
        return edit_distance(*texts).rate

    ranked = sorted(data.pages, key=distance) if data.annotations is None else list(data.pages)
    chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    shown = []
    for place, page in chosen.items():
        title = f"Page {page.name}"
        if page.text is not None:
            title = f"{place.capitalize()} page, {page.name}: edit distance {distance(page):.3f}"
        shown.append(
            f'<div class="page">{picture(_png(page.open()), title)}<div>'
            f"<h3>What was read</h3><pre>{marked(by_page[page.name], page.text)}</pre></div></div>"
        )
    note = (
        "<p>Marked: <ins>read but not there</ins>, <del>there but not read</del>.</p>"
        if data.annotations is None
        else ""
    )
    return f"<section><h2>Pages</h2>{note}{''.join(shown)}</section>"


def marked(predicted: str, wanted: str | None) -> str:
    """Predicted text as HTML, with what differs from the wanted text marked."""
    if wanted is None:
        return escape(predicted)
    parts = []
    matcher = difflib.SequenceMatcher(None, wanted, predicted, autojunk=False)
    for kind, a0, a1, b0, b1 in matcher.get_opcodes():
        if kind == "equal":
            parts.append(escape(predicted[b0:b1]))
            continue
        if a1 > a0:
            parts.append(f"<del>{escape(wanted[a0:a1])}</del>")
        if b1 > b0:
            parts.append(f"<ins>{escape(predicted[b0:b1])}</ins>")
    return "".join(parts)


def _png(image: Image.Image) -> bytes:
    shown = image.copy()
    shown.thumbnail((SHOWN_LONGEST, SHOWN_LONGEST))
    target = io.BytesIO()
    shown.save(target, format="PNG")
    return target.getvalue()
