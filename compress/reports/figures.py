"""The figures of a finished run, as PNG files."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from compress.eval.metrics import number_text
from compress.reports.run_folder import Run

GRID = 8

# Okabe and Ito's palette: told apart by colour-blind readers
DENSE, COMPRESSED, THIRD, FOURTH, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
MARKERS = "osD^vPX*"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7ec",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.linewidth": 1.8,
}
DPI = 160


def draw_figures(run: Run) -> dict[str, bytes]:
    """All figures of a run as PNG files, by name."""
    images = {
        f"samples_{name}": sample_grid(run.samples[name])
        for name in ("dense", "compressed")
        if name in run.samples
    }
    for name, draw in FIGURES.items():
        with matplotlib.rc_context(STYLE):
            figure = draw(run)
            if figure is not None:
                images[name] = to_png(figure)
    return images


def sample_grid(images: np.ndarray, scale: int = 4) -> bytes:
    """Tile the first 64 images, uint8 ``(n, channels, height, width)``, eight a row, as a PNG."""
    chosen = images[: GRID * GRID]
    count, channels, height, width = chosen.shape
    rows = -(-count // GRID)
    canvas = np.full((rows * (height + 1) + 1, GRID * (width + 1) + 1, channels), 255, np.uint8)
    for index, image in enumerate(chosen):
        top, left = 1 + index // GRID * (height + 1), 1 + index % GRID * (width + 1)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    picture = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    # small images only: large ones are legible as they are
    scale = max(1, min(scale, 1200 // picture.width))
    picture = picture.resize(
        (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
    )
    target = io.BytesIO()
    picture.save(target, format="PNG", optimize=True)
    return target.getvalue()


def _widths_figure(run: Run) -> Figure | None:
    widths = run.metrics.get("widths")
    if not widths:
        return None
    # a model with free inner widths has dozens of rows: they come closer
    row_height = max(0.3, min(0.62, 8 / len(widths)))
    figure = Figure(figsize=(6.4, 1.5 + row_height * len(widths)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(widths))
    for offset, key, colour in ((-0.2, "dense", DENSE), (0.2, "compressed", COMPRESSED)):
        bars = axes.barh(
            places + offset, [row[key] for row in widths], 0.38, color=colour, label=key
        )
        axes.bar_label(bars, padding=3)
    axes.set_yticks(places, [str(row["level"]) for row in widths])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel("channels")
    _legend_above(axes)
    return figure


def _masks_figure(run: Run) -> Figure | None:
    if "masks" not in run.trace or "steps" not in run.trace or len(run.trace["steps"]) < 2:
        return None
    masks, steps = run.trace["masks"], run.trace["steps"]
    came_back = returned_units(masks)
    kept = (masks[-1] >= 0.5) & ~came_back
    groups = (
        ("removed", ~kept & ~came_back, COMPRESSED, 0.35, 0.8),
        ("kept", kept, DENSE, 0.35, 0.8),
        ("kept, after a time under one half", came_back, "black", 0.9, 1.4),
    )
    figure = Figure(figsize=(6.4, 4.1), layout="constrained")
    axes = figure.subplots()
    for label, chosen, colour, alpha, thickness in groups:
        lines = [np.column_stack([steps, unit]) for unit in masks[:, chosen].T]
        axes.add_collection(LineCollection(lines, colors=colour, alpha=alpha, linewidths=thickness))
        axes.plot([], [], color=colour, label=f"{label}: {int(chosen.sum())}")
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("mask")
    _legend_above(axes)
    return figure


def returned_units(masks: np.ndarray) -> np.ndarray:
    """Units that fell under one half and ended above: ``(updates, units)`` -> bool ``(units,)``."""
    return (masks < 0.5).any(axis=0) & (masks[-1] >= 0.5)


def _schedule_figure(run: Run) -> Figure | None:
    rows = run.log.get("mask")
    if not rows:
        return None
    steps = _column(rows, "step")
    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(1.6, 1, 1))
    top.plot(steps, _column(rows, "budget"), color=DENSE, label="budget (mean mask)")
    top.plot(
        steps, _column(rows, "undecided"), color=FOURTH, ls="--", label="undecided (0.05 to 0.95)"
    )
    top.set_ylim(-0.03, 1.03)
    top.set_ylabel("share of units")
    _legend_above(top)
    middle.plot(steps, _column(rows, "gamma"), color=THIRD)
    middle.set_ylabel("gamma")
    bottom.plot(steps, _column(rows, "max_move"), color=COMPRESSED)
    bottom.set_ylabel("largest move")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("optimiser step")
    figure.align_ylabels()
    return figure


def _stability_figure(run: Run) -> Figure | None:
    rows = run.log.get("mask")
    if not rows:
        return None
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    ranked = [row for row in rows if row.get("spearman") is not None]
    top.axhline(0, color=GREY, lw=1)
    top.plot(_column(ranked, "step"), _column(ranked, "spearman"), "o-", color=DENSE, ms=3.5)
    top.set_ylim(min(-0.1, *_column(ranked, "spearman"), 0), 1.05)
    top.set_ylabel("rank correlation")
    top.set_title("Each criterion estimate against the last (Spearman)")
    steps, returned = list(_column(rows, "step")), list(_column(rows, "returned"))
    total = run.metrics.get("run", {}).get("returned_channels")
    if total is not None:  # those of the last step, binarisation, included
        steps.append(steps[-1] + 1)
        returned.append(total)
    bottom.step(steps, returned, where="post", color=COMPRESSED)
    bottom.yaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_ylim(0, max(1, 1.05 * max(returned)))
    bottom.set_ylabel("channels")
    bottom.set_xlabel("optimiser step")
    bottom.set_title("Channels that fell under one half and came back")
    return figure


def _loss_figure(run: Run) -> Figure | None:
    if not any(stage in run.log for stage in ("flow", "recover", "validation")):
        return None
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for stage, colour in (("flow", DENSE), ("recover", COMPRESSED)):
        rows = run.log.get(stage, [])
        if rows:
            steps, losses = _column(rows, "step"), _column(rows, "loss")
            axes.plot(steps, losses, color=colour, lw=0.6, alpha=0.3)
            axes.plot(steps, smooth(losses), color=colour, label=f"training, {stage} (smoothed)")
    for index, (net, rows) in enumerate(_by_net(run.log.get("validation", [])).items()):
        label, colour = f"validation, {net}", ("black", THIRD, FOURTH, GREY)[index % 4]
        if net == "dense":
            axes.axhline(rows[-1]["loss"], color=DENSE, ls=":", label=label)
        else:
            axes.plot(
                _column(rows, "step"),
                _column(rows, "loss"),
                MARKERS[index % len(MARKERS)] + "-",
                color=colour,
                ms=5,
                lw=1,
                label=label,
            )
    for row in run.log.get("surgery", []):
        masked, slim = (number_text(row.get(key)) for key in ("loss_masked", "loss_slim"))
        axes.axvline(row["step"], color="black", ls="--", lw=1.2)
        axes.annotate(
            f"surgery\n{masked} to {slim}",
            (row["step"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(5, -4),
            textcoords="offset points",
            va="top",
            fontsize=11,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_minor_formatter(
        # a range of less than a decade has no major tick to read
        lambda value, _: f"{value:.3g}" if np.ptp(np.log10(axes.get_ylim())) < 1.2 else ""
    )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss")
    _legend_above(axes)
    return figure


FIGURES: dict[str, Callable[[Run], Figure | None]] = {
    "widths": _widths_figure,
    "masks": _masks_figure,
    "schedule": _schedule_figure,
    "stability": _stability_figure,
    "loss": _loss_figure,
}


def smooth(values: Sequence[float], decay: float = 0.95) -> np.ndarray:
    """Exponential mean of a noisy series, corrected for its start."""
    means, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(mean / weight)
    return np.array(means)


def _by_net(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    nets: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        nets.setdefault(row.get("net", ""), []).append(row)
    return nets


def _column(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [float("nan") if row.get(key) is None else row[key] for row in rows]


def _legend_above(axes: Axes) -> None:
    """Put the legend over the axes, where it hides no data."""
    entries = len(axes.get_legend_handles_labels()[1])
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2 if entries > 1 else 1, borderpad=0.2
    )


def to_png(figure: Figure) -> bytes:
    """Draw a figure as a PNG file."""
    target = io.BytesIO()
    # no version string in the file: equal figures are equal bytes
    figure.savefig(target, format="png", dpi=DPI, metadata={"Software": None})
    return target.getvalue()
