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

from compress.figures import COMPRESSED, DENSE, FOURTH, GREY, MARKERS, STYLE, THIRD, to_png
from compress.models.visual import VisualLayout

KEPT = (0, 158, 115)  # Okabe and Ito's green
COLOURS = (COMPRESSED, DENSE, THIRD, FOURTH, "#E69F00", "#56B4E9", GREY)
FRAMES, FRAME_MS = 48, 160
STRIP = 6


def tokens_on_page(
    image: Image.Image, grid: torch.Tensor, chosen: torch.Tensor, view: int = 0
) -> Image.Image:
    """A page with the cells of some visual tokens of a view shaded.

    Parameters
    ----------
    image : the page.
    grid : (view, row, column) of all visual tokens, ``(tokens, 3)``.
    chosen : which of them, indices ``(chosen,)``.
    view : 0 is the whole page.
    """
    places = grid[(grid[:, 0] == view) & (grid[:, 2] >= 0)]
    rows, columns = (int(places[:, axis].max()) + 1 for axis in (1, 2))
    page = image.convert("RGB")
    scale = max(1, 480 // max(page.size))
    page = page.resize((page.width * scale, page.height * scale), Image.Resampling.LANCZOS)
    shade = Image.new("RGBA", page.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(shade)
    for of, row, column in grid[chosen].tolist():
        if of == view and column >= 0:
            x0, x1 = (round(c * page.width / columns) for c in (column, column + 1))
            y0, y1 = (round(r * page.height / rows) for r in (row, row + 1))
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=(*KEPT, 110))
    return Image.alpha_composite(page.convert("RGBA"), shade).convert("RGB")


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    target = io.BytesIO()
    image.save(target, format="PNG")
    return target.getvalue()


def fixation_film(
    image: Image.Image,
    layout: VisualLayout,
    seen: Sequence[torch.Tensor | None],
    letters: Sequence[str],
) -> tuple[bytes, bytes]:
    """The fixation moving over a page as its text is written.

    Parameters
    ----------
    image : the page.
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
        picture = tokens_on_page(image, layout.grid, found)
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
    strip = Image.new("RGB", (sum(f.width + 8 for f in picked) - 8, picked[0].height), "white")
    for place, frame in enumerate(picked):
        strip.paste(frame, (place * (frame.width + 8), 0))
    return film.getvalue(), png(strip)


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


def comparison_figure(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Accuracy retention of every variant against the share of visual tokens that it used."""
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
            title="Accuracy retention (1 - CER, over dense), 95% intervals",
            xlabel="visual tokens used",
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
        axes.legend(ncols=2)
        return to_png(figure)


def used_share(row: Mapping[str, Any]) -> float | None:
    """Share of the visual tokens that a variant used: kept, times attended of the kept."""
    if "tokens_kept" not in row and "attended" not in row:
        return None
    return row.get("tokens_kept", 1.0) * row.get("attended", 1.0)


def series_name(row: Mapping[str, Any]) -> str:
    """The variants that differ in their budget only are one curve."""
    parts = []
    for method in row["methods"]:
        if method["name"] == "fastocr":
            part = "fastocr" if method["fixation"] == "dynamic" else method["fixation"]
            part += "" if method["reuse"] else ", no reuse"
            part += f", guard {method['min_mass']}" if method["min_mass"] else ""
            part += f", dilate {method['dilate']}" if method["dilate"] else ""
            # rows from before there was one have none
            part += f", periphery {method['periphery']}" if method.get("periphery") else ""
        else:
            part = method["select"]
            part += f", merge {method['merge']}" if method["merge"] != 0.1 else ""
            part += ", nearest" if method["transport"] == "nearest" else ""
        parts.append(part)
    return " + ".join(parts)


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
