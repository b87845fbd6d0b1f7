"""A finished run as one self-contained page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.common.files import write_bytes, write_text
from compress.eval.metrics import number_text
from compress.reports.figures import draw_figures
from compress.reports.html import document, escape, facts_table, picture, side_by_side_table
from compress.reports.run_folder import Run, metric_of, read_run

CRITERION_SHARE_AIM = 0.15


def write_report(folder: Path) -> Path:
    """Draw a run's figures and write ``report.html`` and the PNGs beside it.

    The page needs no other file and no network: the figures are inside it. What a run does not
    have (masks, for a one-shot method) is left out.

    Parameters
    ----------
    folder : of a finished run, with metrics.json; recipe.yaml, log.jsonl, trace.safetensors and
        samples.safetensors are used where they are.

    Returns
    -------
    Path : the page.

    Raises
    ------
    ValueError : when the folder is no finished run or a file in it is damaged.
    """
    run = read_run(Path(folder))
    images = draw_figures(run)
    for name, png in images.items():
        write_bytes(run.folder / f"{name}.png", png)
    page = run.folder / "report.html"
    write_text(page, render(run, images))
    return page


def render(run: Run, images: Mapping[str, bytes]) -> str:
    """Build the page of a run out of its facts and its figures (PNG files by name)."""
    facts, recipe = run.metrics.get("run", {}), run.recipe
    method = recipe.get("method", {})
    method = method if isinstance(method, dict) else {}
    line = [
        f"{label} {value}"
        for label, value in (
            ("model", recipe.get("model")),
            ("data", recipe.get("data")),
            ("method", method.get("name") or facts.get("method")),
            ("criterion", method.get("criterion")),
            ("process", method.get("process")),
            ("seed", facts.get("seed")),
        )
        if value is not None
    ]
    sections = [
        _warnings_section(run),
        _headline_section(run, method),
        side_by_side_table(run.metrics["metrics"], run.metrics.get("floor") or {}),
        _samples_section(images),
        _flow_section(run, images),
        _training_section(run, images),
        _facts_section(run),
    ]
    return document(run.name, " · ".join(line), sections)


def _warnings_section(run: Run) -> str:
    warnings = run.metrics.get("warnings", [])
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<section class="warnings"><h2>Take note</h2><ul>{items}</ul></section>'


def _headline_section(run: Run, method: Mapping[str, Any]) -> str:
    metrics = run.metrics["metrics"]
    macs = metrics.get("macs", {}).get("ratio")
    asked = method.get("keep_macs")
    said = ""
    if macs is not None:
        wish = f" (asked: {asked:.0%})" if isinstance(asked, int | float) else ""
        said = f"Keeps <strong>{macs:.1%}</strong> of the dense model’s MACs{wish}."
    cards = []
    for name in ("params", *_names_like(metrics, "fid"), "ssim_to_dense", "latency_ms"):
        if name not in metrics:
            continue
        entry = metrics[name]
        after, before = (
            number_text(entry[side]["value"], entry.get("unit", ""))
            for side in ("compressed", "dense")
        )
        note = "" if name == "ssim_to_dense" else f"<span>dense: {before}</span>"
        cards.append(
            f'<div class="card"><h3>{escape(metric_of(name).label)}</h3><p>{after}</p>{note}</div>'
        )
    return (
        f'<section class="headline"><p class="lead">{said}</p>'
        f'<div class="cards">{"".join(cards)}</div></section>'
    )


def _names_like(metrics: Mapping[str, Any], stem: str) -> list[str]:
    return [name for name in (stem, f"{stem}_digits") if name in metrics]


def _samples_section(images: Mapping[str, bytes]) -> str:
    figures = [
        _figure(images, f"samples_{side}", side.capitalize(), "pixels")
        for side in ("dense", "compressed")
    ]
    if not any(figures):
        return ""
    return (
        "<section><h2>Samples, from the same noise</h2>"
        f'<div class="figures">{"".join(figures)}</div></section>'
    )


def _flow_section(run: Run, images: Mapping[str, bytes]) -> str:
    facts, updates = run.metrics.get("run", {}), run.log.get("mask", [])
    notes = []
    returned = facts.get("returned_channels", updates[-1].get("returned") if updates else None)
    if returned is not None and updates:
        notes.append(
            f"{returned:,} times a channel came back after its mask had fallen under one half."
        )
    ranks = [row["spearman"] for row in updates if row.get("spearman") is not None]
    if ranks:
        notes.append(
            f"Median rank correlation of successive criterion estimates: {np.median(ranks):.2f}."
        )
    share = facts.get("criterion_share")
    if share is not None:
        verdict = "within" if share <= CRITERION_SHARE_AIM else "above"
        notes.append(
            f"The criterion took {share:.1%} of the training time, {verdict} the aim of at most "
            f"{CRITERION_SHARE_AIM:.0%}."
        )
    figures = [
        _figure(images, "widths", "Channels per level, before and after"),
        _figure(images, "masks", "Masks of a sample of channels"),
        _figure(images, "schedule", "Budget, sharpening and continuity"),
        _figure(images, "stability", "Criterion stability and mask churn"),
    ]
    if not any(figures) and not notes:
        return ""
    title = "What was removed, and how" if updates else "What was removed"
    paragraphs = "".join(f"<p>{note}</p>" for note in notes)
    return (
        f'<section><h2>{title}</h2>{paragraphs}<div class="figures">{"".join(figures)}</div>'
        "</section>"
    )


def _training_section(run: Run, images: Mapping[str, bytes]) -> str:
    loss = _figure(images, "loss", "Training and validation loss", "wide")
    if not loss:
        return ""
    notes = []
    for row in run.log.get("surgery", []):
        parts = [
            ("before binarising", "loss_before_binarise"),
            ("after", "loss_after_binarise"),
            ("masked network", "loss_masked"),
            ("slim network", "loss_slim"),
        ]
        losses = ", ".join(
            f"{label} <strong>{number_text(row[key])}</strong>"
            for label, key in parts
            if row.get(key) is not None
        )
        difference = row.get("max_difference")
        agree = "" if difference is None else f" Largest output difference: {difference:.1e}."
        unaligned = row.get("unaligned_norms")
        norms = (
            f" {unaligned} normalisation layers could not be aligned with the masks."
            if unaligned
            else ""
        )
        notes.append(f"<p>Surgery at step {row['step']:,}: loss {losses}.{agree}{norms}</p>")
    return f'<section><h2>Training</h2>{"".join(notes)}<div class="figures">{loss}</div></section>'


def _facts_section(run: Run) -> str:
    recipe = (
        "<details><summary>Recipe, as it was resolved</summary>"
        f"<pre>{escape(run.recipe_text)}</pre></details>"
        if run.recipe_text
        else ""
    )
    return f"<section><h2>The run</h2>{facts_table(run.metrics.get('run', {}))}{recipe}</section>"


def _figure(images: Mapping[str, bytes], name: str, caption: str, kind: str = "") -> str:
    return picture(images[name], caption, kind) if name in images else ""
