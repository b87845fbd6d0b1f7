"""Reports as self-contained HTML pages, from the template beside this module."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader

from compress.common.extras import MissingExtraError
from compress.common.files import write_bytes, write_text
from compress.eval.metrics import GROUPS, arrow, number_text, side_text
from compress.methods.base import Figure, Section
from compress.reports.run_folder import grouped, metric_of


class Card(NamedTuple):
    """A number of the headline, with a line below it."""

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Table(Section):
    """A section with a table; a cell is text, or a value with its interval."""

    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str | Mapping[str, Any]]] = ()


class PageText(NamedTuple):
    """A page beside what was read on it.

    Attributes
    ----------
    picture : of the page.
    pieces : the text, as pairs of a mark ("ins", "del" or none) and text.
    marked : whether it was compared with the true text.
    """

    picture: Figure
    pieces: Sequence[tuple[str, str]]
    marked: bool


def headline(metrics: Mapping[str, Any]) -> dict[str, list[Card]]:
    """Heading -> a card for each metric of size, quality and speed.

    Parameters
    ----------
    metrics : name -> entry of metrics.json.
    """
    return {
        GROUPS[group]: [
            _card(name, metrics[name], group)
            for name in names
            if metrics[name].get("compressed", metrics[name])["value"] is not None
        ]
        for group, names in grouped(metrics).items()
        if group != "more"
    }


def _card(name: str, entry: Mapping[str, Any], group: str) -> Card:
    unit = _unit(entry, name)
    value = number_text(entry.get("compressed", entry)["value"], unit)
    notes = []
    if name.endswith("_to_dense"):
        notes.append("on the dense model's images from the same noise")
    elif dense := entry.get("dense"):
        notes.append(f"dense: {number_text(dense['value'], unit)}")
        if (ratio := entry.get("ratio")) and group == "speed":
            faster = 1 / ratio if entry.get("better") == "lower" else ratio
            notes.append(f"{faster:.2f}× as fast")
        elif ratio:
            notes.append(f"ratio {_ratio(ratio)}")
    return Card(metric_of(name).label, value, ", ".join(notes))


def _unit(entry: Mapping[str, Any], name: str) -> str:
    return str(entry.get("unit") or metric_of(name).unit)


def drawn(draw: Callable[[], Sequence[Section]]) -> Sequence[Section]:
    """The sections that ``draw`` returns; one that says why where there is nothing to draw with."""
    try:
        return draw()
    except MissingExtraError as error:
        return [Section("Figures", [f"Left out: {error}."])]


def write_page(
    folder: Path,
    metrics: Mapping[str, Any],
    title: str,
    line: Sequence[str],
    *,
    lead: str = "",
    sections: Sequence[Section] = (),
    pages: Sequence[PageText] = (),
    facts_title: str = "The run",
    recipe: str = "",
) -> Path:
    """Write ``report.html``, and in ``figures/`` a PNG file for each figure of its sections.

    The page needs no other file and no network: the figures are inside it.

    Parameters
    ----------
    folder : of the run.
    metrics : what metrics.json holds.
    title : the heading.
    line : what stands below it, part by part.
    lead : a sentence above the numbers of the headline.
    sections : between the metrics and the pages.
    pages : pages beside what was read on them.
    facts_title : heading of what the result depends on.
    recipe : its text.

    Returns
    -------
    Path : the page.
    """
    for section in sections:
        for figure in section.figures:
            if not figure.image.startswith(b"GIF"):
                (folder / "figures").mkdir(exist_ok=True)
                write_bytes(folder / "figures" / f"{figure.name}.png", figure.image)
    path = folder / "report.html"
    text = _TEMPLATES.get_template("report.html.jinja").render(
        title=title,
        line=[*line, f"folder {folder.resolve().name}"],
        warnings=metrics.get("warnings", []),
        lead=lead,
        cards=headline(metrics["metrics"]),
        metrics=metrics["metrics"],
        groups={GROUPS[group]: names for group, names in grouped(metrics["metrics"]).items()},
        more=GROUPS["more"],
        floor=metrics.get("floor") or {},
        sections=sections,
        pages=pages,
        facts_title=facts_title,
        facts=metrics.get("run", {}),
        recipe=recipe,
    )
    write_text(path, text)
    return path


def _data_address(image: bytes) -> str:
    kind = "gif" if image.startswith(b"GIF") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _ratio(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}×" if 0.01 <= value < 1 else f"{value:.3g}×"


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_TEMPLATES = Environment(
    loader=PackageLoader("compress.reports"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {
    "arrow": arrow,
    "count": lambda n: "–" if n is None else f"{n:,}",
    "data_address": _data_address,
    "fact": _fact,
    "label": lambda name: metric_of(name).label,
    "number": number_text,
    "side": side_text,
    "ratio": _ratio,
    "unit": _unit,
}
