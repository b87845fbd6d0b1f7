"""The figures of a run on a reader: kept tokens, the moving fixation, recall, the comparison."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image, ImageDraw

from compress.methods.rtprune.pages import PrunedPage
from compress.models.visual import ViewOnPage, VisualLayout
from compress.reports.figures import COMPRESSED, DENSE, FOURTH, GREY, MARKERS, STYLE, THIRD, to_png
from compress.reports.reader_rows import series_name, used_share

Colour = tuple[int, int, int]
# Okabe and Ito's green, orange and vermilion
KEPT, MERGED, MOVE = (0, 158, 115), (230, 159, 0), (213, 94, 0)
LINES = 40  # moves that are drawn
SHORTEST_PICTURE, LONGEST_PICTURE, GAP = 480, 960, 8  # pixels
NO_PLACES = "they are queries, which have no place on it, so none is drawn"
COLOURS = (COMPRESSED, DENSE, THIRD, FOURTH, "#E69F00", "#56B4E9", GREY)
FRAMES, FRAME_MS = 48, 160
STRIP = 6


def tokens_on_page(
    image: Image.Image,
    views: Mapping[int, ViewOnPage],
    shades: Sequence[tuple[torch.Tensor, Colour]],
    moves: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
) -> Image.Image:
    """A page with what some visual tokens see of it shaded, once for each view, side by side.

    Parameters
    ----------
    image : the page.
    views : where they lie on it; the page alone where there are none.
    shades : (view, row, column) of tokens, ``(tokens, 3)``, and their colour; others are passed
        over: newlines, separators, tokens of views without a place.
    moves : from one token to another, ``(3,)`` each: lines with a dot at the end, where one view
        has both.
    """
    page = image.convert("RGB")
    scale = max(1, SHORTEST_PICTURE // max(page.size)) * min(1, LONGEST_PICTURE / max(page.size))
    size = max(1, round(page.width * scale)), max(1, round(page.height * scale))
    page = page.resize(size, Image.Resampling.LANCZOS)
    panels = [
        _shaded(page, number, view, scale, shades, moves) for number, view in sorted(views.items())
    ]
    return _beside(panels or [page])


def _shaded(
    page: Image.Image,
    number: int,
    view: ViewOnPage,
    scale: float,
    shades: Sequence[tuple[torch.Tensor, Colour]],
    moves: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> Image.Image:
    """One panel: a page, ``scale`` times as large, with the tokens of one view."""
    layer = Image.new("RGBA", page.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for tokens, colour in shades:
        for of, row, column in tokens.tolist():
            if of == number and column >= 0:
                x0, y0, x1, y1 = (round(edge * scale) for edge in view.cell(row, column))
                if x1 > x0 and y1 > y0:
                    draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=(*colour, 110))
    for ends in moves:
        if all(int(end[0]) == number for end in ends):
            middles = [tuple(c * scale for c in _middle(view, end)) for end in ends]
            draw.line(middles, fill=(*MOVE, 230))
            draw.circle(middles[1], 3, fill=(*MOVE, 230))
    return Image.alpha_composite(page.convert("RGBA"), layer).convert("RGB")


def _middle(view: ViewOnPage, token: torch.Tensor) -> tuple[float, float]:
    """(x, y) of the middle of what a token ``(3,)`` sees, in the page's pixels."""
    x0, y0, x1, y1 = view.cell(int(token[1]), int(token[2]))
    return (x0 + x1) / 2, (y0 + y1) / 2


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one height from left to right."""
    width = sum(picture.width + GAP for picture in pictures) - GAP
    strip = Image.new("RGB", (width, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + GAP
    return strip


def pruned_figure(
    image: Image.Image, views: Mapping[int, ViewOnPage], page: PrunedPage
) -> tuple[bytes, str]:
    """What a pruned page keeps and merges, drawn over it (PNG), and what there is to say of it."""
    kept, facts = page.grid[page.kept_indices], page.facts()
    count = f"{facts['kept']} of {facts['prunable']} visual tokens stay"
    if not views:
        return png(tokens_on_page(image, views, [])), f"{count}, on the first page; {NO_PLACES}"
    gone, targets, mass = page.moves()
    moves: list[tuple[torch.Tensor, torch.Tensor]] = []
    for place in mass.argsort(descending=True, stable=True):
        ends = page.grid[gone[place]], page.grid[targets[place]]
        if len(moves) < LINES and _on_one_panel(image, views, ends):
            moves.append(ends)
    shades = [(kept, KEPT), (page.grid[gone], MERGED)]
    rest = "the others are dropped"
    if len(gone):
        rest = (
            f"the others (orange) are merged into them: a line leads from each of the {len(moves)} "
            "that give most to a single kept token to that token"
        )
    where = panels_caption(views, page.grid)
    return png(tokens_on_page(image, views, shades, moves)), f"{count} (green), {rest}; {where}"


def _on_one_panel(
    image: Image.Image, views: Mapping[int, ViewOnPage], ends: Sequence[torch.Tensor]
) -> bool:
    """Whether one view has both tokens, neither of them in its padding."""
    view = views.get(int(ends[0][0]))
    if view is None or ends[0][0] != ends[1][0]:
        return False
    middles = [_middle(view, end) for end in ends]
    return all(0 <= x < image.width and 0 <= y < image.height for x, y in middles)


def panels_caption(views: Mapping[int, ViewOnPage], grid: torch.Tensor) -> str:
    """Which tokens of a page its picture shows, as words."""
    if len(views) > 1:
        return "left the tokens of the whole page, right those of its crops"
    if set(grid[:, 0].tolist()) - set(views):
        return "tokens of the whole page only: those of its crops are not drawn"
    return "on the first page"


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    target = io.BytesIO()
    image.save(target, format="PNG")
    return target.getvalue()


def fixation_film(
    image: Image.Image,
    views: Mapping[int, ViewOnPage],
    layout: VisualLayout,
    seen: Sequence[torch.Tensor | None],
    letters: Sequence[str],
) -> tuple[bytes, bytes]:
    """The fixation moving over a page as its text is written.

    Parameters
    ----------
    image : the page.
    views : where its visual tokens look; not empty.
    layout : of the prompt that the decoder read.
    seen : visual tokens read in each decode step; None where all were.
    letters : what each of these steps wrote.

    Returns
    -------
    An animation (GIF) and a film strip of some of its frames (PNG).
    """
    looks = [(step, found) for step, found in enumerate(seen) if found is not None]
    frames = []
    for step, found in looks[:: max(1, len(looks) // FRAMES)]:
        picture = tokens_on_page(image, views, [(layout.grid[found], KEPT)])
        written = "".join(letters[: step + 1]).replace("\n", " ")[-34:]
        frame = Image.new("RGB", (picture.width, picture.height + 26), "white")
        frame.paste(picture, (0, 0))
        ImageDraw.Draw(frame).text((6, picture.height + 6), written, fill="black", font_size=15)
        frames.append(frame)
    if not frames:
        return b"", b""
    film = io.BytesIO()
    frames[0].save(
        film, format="GIF", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0
    )
    picked = [frames[round(k * (len(frames) - 1) / (STRIP - 1))] for k in range(STRIP)]
    return film.getvalue(), png(_beside(picked))


def recall_figure(calibration: Mapping[str, Any]) -> bytes:
    """The recall matrix, and the curve of recall against the number of focal layers."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
        recall = np.array(calibration["recall"])
        shown = left.imshow(recall, cmap="viridis", vmin=0, vmax=1)
        left.grid(visible=False)
        left.set(title="Attention kept", xlabel="layer that attends", ylabel="layer that chooses")
        figure.colorbar(shown, ax=left, fraction=0.046)
        curve = calibration["curve"]
        right.plot(range(1, len(curve) + 1), curve, "o-", color=DENSE)
        count = len(calibration["focal_layers"])
        right.plot([count], [curve[count - 1]], "o", color=COMPRESSED, markersize=10)
        right.set(
            title=f"Recall of top-{calibration['keep_visual']:.0%} by focal layers",
            xlabel="focal layers",
            ylabel="mean recall",
            ylim=(0, 1.02),
        )
        return to_png(figure)


def comparison_figure(rows: Sequence[Mapping[str, Any]], accuracy: str) -> bytes | None:
    """Accuracy retention of every variant against the share of visual tokens that it used.

    Parameters
    ----------
    rows : the variants, as metrics.json has them.
    accuracy : what is retained, such as ``1 - CER``.
    """
    series: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        used = used_share(row)
        if used is not None and "accuracy_retention" in row:
            series.setdefault(series_name(row), []).append((used, row["accuracy_retention"]))
    if not series:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5), layout="constrained")
        axes = figure.subplots()
        for place, (name, points) in enumerate(series.items()):
            points = sorted(points, key=lambda point: point[0])
            used_shares, values = [p[0] for p in points], [p[1]["value"] for p in points]
            ends = [p[1]["ci95"] or (p[1]["value"],) * 2 for p in points]
            errors = [
                [max(0.0, v - e[0]) for v, e in zip(values, ends, strict=True)],
                [max(0.0, e[1] - v) for v, e in zip(values, ends, strict=True)],
            ]
            axes.errorbar(
                used_shares,
                values,
                yerr=errors,
                fmt=f"{MARKERS[place % len(MARKERS)]}-",
                capsize=3,
                color=COLOURS[place % len(COLOURS)],
                label=name,
            )
        axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
        axes.set(
            title=f"Accuracy retention ({accuracy}, over dense), 95% intervals",
            xlabel="visual tokens used",
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
        axes.legend(ncols=2)
        return to_png(figure)


def ratio_figure(pages: Sequence[Mapping[str, Any]]) -> bytes | None:
    """The ratio of tokens kept of each page, against its density; None for a fixed ratio."""
    dynamic = [p for p in pages if p["density"] is not None]
    if not dynamic:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        kept = [p["kept"] / p["prunable"] for p in dynamic]
        axes.plot([p["density"] for p in dynamic], kept, "o", color=COMPRESSED)
        axes.set(title="Tokens kept, page by page", xlabel="textual density", ylabel="share kept")
        return to_png(figure)
