"""The report of a run on a reader: one self-contained page."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from compress.checkpoints.applied import Applied
from compress.common.files import write_bytes, write_text
from compress.data.ocr_pages import OcrData, OcrPage
from compress.eval.ocr import read_predictions
from compress.methods.fastocr import FastOCR
from compress.methods.fastocr.trace import trace
from compress.methods.rtprune import RTPrune
from compress.models.reading import read_pages
from compress.models.visual import adapter_for, build_prompt, views_on_page, visual_layouts
from compress.reports.html import (
    animation,
    document,
    escape,
    facts_table,
    picture,
    side_by_side_table,
    value_cell,
)
from compress.reports.pages import OCR_CSS, pages_section
from compress.reports.reader_figures import (
    NO_PLACES,
    comparison_figure,
    fixation_film,
    panels_caption,
    pruned_figure,
    ratio_figure,
    recall_figure,
)
from compress.reports.reader_rows import measure, used_share
from compress.reports.run_folder import metric_of

FILM_TOKENS = 200


def write_reader_report(
    folder: Path,
    data: OcrData,
    variants: Sequence[Any],
    metrics: Mapping[str, Any],
    model: Any,
    processor: Any,
    prompt: str | None = None,
) -> Path:
    """Write ``report.html`` and its figures as PNG files.

    Parameters
    ----------
    folder : of the run.
    data : the pages.
    variants : dense, compressed, and those to compare.
    metrics : what metrics.json holds.
    model, processor : without methods; they are run on one page for the pictures.
    prompt : that the pages were read with; the family's own for plain text when None.
    """
    figures: dict[str, bytes] = {}
    captions: dict[str, str] = {}
    shown = data.pages[0]
    pruning = [method for method in variants[1].methods if isinstance(method, RTPrune)]
    for method in pruning:
        figures["kept"], captions["kept"] = _pruned(method, shown, model, processor, prompt)
    for method in variants[1].methods:
        if isinstance(method, FastOCR):
            film = _film(method, pruning, shown, model, processor, prompt)
            figures["film"], figures["strip"], captions["strip"] = film
    for calibration in (metrics["calibration"] or {}).values():
        figures["recall"] = recall_figure(calibration)
    if curve := comparison_figure(metrics["comparison"], metrics["accuracy"]):
        figures["comparison"] = curve
    ratios = [
        page
        for prediction in read_predictions(folder / variants[1].file)
        for page in (prediction.facts or {}).get("rtprune", {}).get("pages", [])
    ]
    if ratios and (drawn := ratio_figure(ratios)):
        figures["ratio"] = drawn
    for name, content in figures.items():
        if content and name != "film":
            write_bytes(folder / f"{name}.png", content)
    facts = metrics["run"]
    line = " · ".join(
        [
            f"model {facts['model']}",
            f"data {facts['data']}",
            f"method {' + '.join(facts['method'])}",
        ]
    )
    body = [
        OCR_CSS,
        _headline(metrics),
        side_by_side_table(metrics["metrics"], {}),
        _comparison(metrics["comparison"], metrics["accuracy"], figures),
        _pictures(figures, captions),
        pages_section(data, read_predictions(folder / variants[1].file)),
        f"<section><h2>The run</h2>{facts_table(facts)}</section>",
    ]
    path = folder / "report.html"
    write_text(path, document(folder.resolve().name, line, body))
    return path


def _headline(metrics: Mapping[str, Any]) -> str:
    row = metrics["comparison"][1]
    cards = []
    if "accuracy_retention" in row:
        kept = row["accuracy_retention"]
        cards.append(
            ("Accuracy retention", f"{kept['value']:.2%}", f"{metrics['accuracy']}, over dense")
        )
    if "tokens_kept" in row:
        cards.append(("Tokens kept", f"{row['tokens_kept']:.2%}", "of the page, newlines included"))
    if "attended" in row:
        cards.append(("Attended", f"{row['attended']:.2%}", "mean over layers and steps"))
        cards.append(("Refreshes", f"{row['refreshes']:.2%}", "steps that the guard opened"))
    inside = "".join(
        f'<div class="card"><h3>{escape(h)}</h3><p>{escape(v)}</p><span>{escape(n)}</span></div>'
        for h, v, n in cards
    )
    return f'<section class="headline"><div class="cards">{inside}</div></section>'


def _comparison(
    rows: Sequence[Mapping[str, Any]], accuracy: str, figures: Mapping[str, bytes]
) -> str:
    lines = []
    curve = ""
    if "comparison" in figures:
        curve = picture(figures["comparison"], f"Accuracy ({accuracy}) against visual tokens used")
    metric = measure(accuracy)
    for row in rows:
        layers = ", ".join(f"{share:.0%}" for share in row.get("attended_by_layer", [])) or "–"
        lines.append(
            f'<tr><th scope="row">{escape(row["variant"])}</th>'
            f"<td>{_share(used_share(row))}</td><td>{_share(row.get('tokens_kept'))}</td>"
            f"<td>{_share(row.get('attended'))}</td><td>{escape(layers)}</td>"
            f"<td>{_share(row.get('refreshes'))}</td>"
            f"<td>{value_cell(row.get('accuracy_retention'), '')}</td>"
            f"<td>{value_cell(row['metrics'].get(metric), '')}</td></tr>"
        )
    heads = (
        "variant",
        "visual tokens used",
        "kept",
        "attended",
        "by layer",
        "refreshed steps",
        f"accuracy retention ({accuracy})",
        metric_of(metric).label,
    )
    inside = "".join(f"<th>{escape(head)}</th>" for head in heads)
    return (
        "<section><h2>Every variant, on the same pages</h2><table><thead><tr>"
        f"{inside}</tr></thead><tbody>{''.join(lines)}</tbody></table>{curve}</section>"
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def _pictures(figures: Mapping[str, bytes], captions: Mapping[str, str]) -> str:
    parts = [
        picture(figures[name], caption, kind)
        for name, caption, kind in (
            ("kept", captions.get("kept", ""), ""),
            ("ratio", "Ratio of each page against its textual density", ""),
            ("strip", captions.get("strip", ""), "wide"),
            ("recall", "Calibration: who chooses well for whom", "wide"),
        )
        if figures.get(name)
    ]
    if figures.get("film"):
        parts.append(animation(figures["film"], f"{captions['strip']}, moving"))
    # a film that could not be drawn has words only
    words = f"<p>{escape(captions['strip'])}</p>" if captions.get("strip") else ""
    inside = f'<div class="figures">{"".join(parts)}</div>' if parts else ""
    inside += "" if figures.get("film") else words
    return f"<section><h2>What the methods did</h2>{inside}</section>" if inside else ""


def _pruned(
    method: RTPrune, page: OcrPage, model: Any, processor: Any, prompt: str | None
) -> tuple[bytes, str]:
    """The first page with what stays of it, and the words for that."""
    image = page.open()
    with Applied(model, [method]) as applied:
        read_pages(model, processor, [image], prompt, max_new_tokens=1)
        [kept] = applied.handles["rtprune"].pages  # type: ignore[attr-defined]
    return pruned_figure(image, views_on_page(model, processor, image, kept.grid), kept)


def _film(
    method: FastOCR,
    pruning: Sequence[RTPrune],
    page: OcrPage,
    model: Any,
    processor: Any,
    prompt: str | None,
) -> tuple[bytes, bytes, str]:
    """The fixation on the first page, over what a pruning method left of it: film, strip, words."""
    image = page.open()
    text = adapter_for(model.config).read_prompt if prompt is None else prompt
    inputs = build_prompt(model, processor, [image], [text])
    inputs = {n: t.to(model.device) if torch.is_tensor(t) else t for n, t in inputs.items()}
    [whole] = visual_layouts(model, inputs)
    views = views_on_page(model, processor, image, whole.grid)
    if not views:
        return b"", b"", f"The fixation is on visual tokens of which this must be said: {NO_PLACES}"
    with Applied(model, pruning) if pruning else nullcontext():
        ids, layout, seen = trace(method, model, inputs, FILM_TOKENS)
    letters = [processor.batch_decode(i, skip_special_tokens=True)[0] for i in ids[1:, None, None]]
    film, strip = fixation_film(image, views, layout, seen, letters)
    words = "The fixation while the page is written"
    words += ", on the tokens that rtprune left of it" if pruning else ""
    if not film:
        return b"", b"", f"{words}: every step of so short an answer reads all tokens"
    return film, strip, f"{words}; {panels_caption(views, whole.grid)}"
