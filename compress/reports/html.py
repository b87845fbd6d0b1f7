"""The frame, style and small parts that all of our HTML reports share."""

import base64
import html
from collections.abc import Mapping
from typing import Any

from compress.eval.metrics import arrow, number_text
from compress.reports.run_folder import metric_of


def document(name: str, line: str, body: list[str]) -> str:
    """A self-contained page.

    Parameters
    ----------
    name : its heading.
    line : what stands below it.
    body : sections as HTML; empty ones are left out.
    """
    return PAGE.format(
        title=escape(f"{name} - compress"),
        name=escape(name),
        line=escape(line),
        style=CSS,
        body="\n".join(section for section in body if section),
    )


def picture(png: bytes, caption: str, kind: str = "") -> str:
    """A figure with its PNG inside."""
    data = base64.b64encode(png).decode()
    return (
        f'<figure class="{kind}"><figcaption>{escape(caption)}</figcaption>'
        f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}"></figure>'
    )


def animation(gif: bytes, caption: str) -> str:
    """A figure with its GIF inside."""
    data = base64.b64encode(gif).decode()
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        f'<img src="data:image/gif;base64,{data}" alt="{escape(caption)}"></figure>'
    )


def value_cell(side: Mapping[str, Any] | None, unit: str) -> str:
    """A value with its 95% confidence interval below it."""
    if not side:
        return "–"
    interval = side.get("ci95")
    inside = (
        f"<small>[{number_text(interval[0], unit)}, {number_text(interval[1], unit)}]</small>"
        if interval
        else ""
    )
    return f"<b>{number_text(side['value'], unit)}</b>{inside}"


def side_by_side_table(metrics: Mapping[str, Any], floor: Mapping[str, float]) -> str:
    """The section with every metric of the dense and the compressed model.

    Parameters
    ----------
    metrics : as metrics.json has them.
    floor : value of a metric that a perfect model would have, where that is known.
    """
    rows = []
    for name, entry in metrics.items():
        unit = entry.get("unit", "")
        mark = arrow(entry.get("better", ""))
        under = ""
        if name in floor:
            under = f'<small class="floor">floor {number_text(floor[name], unit)}</small>'
        cells = [
            f'<th scope="row">{escape(metric_of(name).label)} <span class="better" '
            f'title="{escape(entry.get("better", ""))} is better">{mark}</span>'
            f"<small>{escape(unit)}</small></th>"
        ]
        for side in ("dense", "compressed"):
            cells.append(
                f'<td data-label="{side}" class="{side}"><span>'
                f"{value_cell(entry.get(side), unit)}{under if side == 'dense' else ''}</span></td>"
            )
        count = (entry.get("compressed") or {}).get("n")
        cells.append(f'<td data-label="ratio">{_ratio(entry.get("ratio"))}</td>')
        cells.append(f'<td data-label="n">{"–" if count is None else f"{count:,}"}</td>')
        cells.append(f'<td data-label="how" class="how">{escape(entry.get("how", ""))}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(
        f'<th scope="col">{head}</th>'
        for head in ("Metric", "Dense", "Compressed", "Ratio", "n", "How it was measured")
    )
    note = "Arrows show which direction is better; brackets are 95% intervals."
    if floor:
        note += " The floor is what one half of the real images scores against the other half."
    return (
        f'<section><h2>Metrics</h2><table class="metrics"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table><p class='note'>{note}</p></section>"
    )


def _ratio(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}×" if 0.01 <= value < 1 else f"{value:.3g}×"


def facts_table(facts: Mapping[str, Any]) -> str:
    """Names and values of what a result depends on."""
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        elif isinstance(value, float):
            value = f"{value:.4g}"
        rows.append(
            f"<tr><th scope='row'>{escape(key.replace('_', ' '))}</th><td>{escape(value)}</td></tr>"
        )
    return f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>'


def escape(value: object) -> str:
    """Text for HTML."""
    return html.escape(str(value), quote=True)


CSS = """
:root { color-scheme: light; --ink: #1d2433; --soft: #5b6474; --line: #e1e5eb; --dense: #0072B2;
  --compressed: #B84E00; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 20px 64px; max-width: 1200px; color: var(--ink);
  background: #f6f7f9; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header h1 { margin: 0; font-size: 30px; line-height: 1.2; overflow-wrap: anywhere; }
header p { margin: 4px 0 0; color: var(--soft); overflow-wrap: anywhere; }
section { margin-top: 24px; padding: 20px 24px; background: #fff; border: 1px solid var(--line);
  border-radius: 12px; }
h2 { margin: 0 0 12px; font-size: 20px; }
section > p { margin: 4px 0 8px; max-width: 75ch; }
.warnings { border-color: #e0a800; background: #fff8e1; }
.warnings ul { margin: 0; padding-left: 20px; }
.lead { margin: 0 0 16px; font-size: 20px; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; }
.card { padding: 12px 16px; background: #f6f7f9; border-radius: 8px; }
.card h3 { margin: 0; font-size: 14px; font-weight: 600; color: var(--soft); }
.card p { margin: 2px 0; font-size: 26px; font-weight: 700; line-height: 1.2; }
.card span { font-size: 14px; color: var(--soft); }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px 8px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { font-size: 14px; color: var(--soft); }
tbody th { font-weight: 600; }
small { display: block; font-weight: 400; font-size: 13px; color: var(--soft); }
.metrics td b { white-space: nowrap; }
.metrics td small { white-space: nowrap; }
.dense b { color: var(--dense); }
.compressed b { color: var(--compressed); }
.better { color: var(--soft); font-weight: 400; }
.how { font-size: 13px; color: var(--soft); max-width: 340px; }
.note { font-size: 14px; color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 24px;
  align-items: start; }
figure { margin: 0; }
figcaption { margin-bottom: 6px; font-weight: 600; font-size: 15px; }
img { display: block; width: 100%; height: auto; }
.pixels img { image-rendering: pixelated; border: 1px solid var(--line); }
.wide { grid-column: 1 / -1; max-width: 700px; }
.facts th { width: 220px; font-size: 14px; }
.facts td { font-size: 14px; overflow-wrap: anywhere; }
details { margin-top: 16px; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: 8px 0 0; padding: 12px; overflow-x: auto; background: #f6f7f9; border-radius: 8px;
  font-size: 13px; }
@media (max-width: 900px) { .cards { grid-template-columns: repeat(2, 1fr); } }
@media (max-width: 760px) {
  body { padding: 16px 10px 40px; }
  section { padding: 16px 14px; }
  .figures { grid-template-columns: minmax(0, 1fr); }
  .card { padding: 10px 12px; }
  .card p { font-size: 22px; }
  .metrics thead { display: none; }
  .metrics, .metrics tbody { display: block; }
  .metrics tr { display: grid; grid-template-columns: 1fr 1fr; gap: 4px 12px; padding: 12px 0;
    border-bottom: 1px solid var(--line); }
  .metrics th, .metrics td { padding: 0; border: 0; }
  .metrics tbody th, .metrics .how { grid-column: 1 / -1; max-width: none; }
  .metrics td::before { content: attr(data-label); display: block; font-size: 12px;
    color: var(--soft); }
  .metrics .how::before { display: none; }
  .facts th { width: 40%; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{name}</h1><p>{line}</p></header>
{body}
</body>
</html>
"""
