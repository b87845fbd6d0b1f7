"""A finished run as one self-contained page, and several runs as one table and one plot."""

import base64
import html
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.numpy import load_file

from compress.files import read_json, write_bytes, write_text

CRITERION_SHARE_AIM = 0.15
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

NAMES = {
    "params": "Parameters",
    "macs": "MACs",
    "validation_loss": "Validation loss",
    "fid": "FID",
    "fid_digits": "FID (digits features)",
    "kid": "KID",
    "kid_digits": "KID (digits features)",
    "is": "Inception score",
    "is_digits": "IS (digits logits)",
    "precision": "Precision",
    "precision_digits": "Precision (digits features)",
    "recall": "Recall",
    "recall_digits": "Recall (digits features)",
    "ssim_to_dense": "SSIM to dense",
    "mse_to_dense": "MSE to dense",
    "looks_like_digits": "Looks like digits",
    "class_share_min": "Rarest class",
    "class_share_max": "Most frequent class",
    "latency_ms": "Latency per step (ms)",
    "images_per_second": "Images per second",
    "peak_memory_mb": "Peak memory (MB)",
}


@dataclass(frozen=True)
class Run:
    """What a run folder holds, read once.

    ``log`` keeps the rows by stage; the other parts are empty where the run has none.
    """

    folder: Path
    metrics: dict[str, Any]
    recipe_text: str
    recipe: dict[str, Any]
    log: dict[str, list[dict[str, Any]]]
    trace: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Raises
    ------
    ValueError : when the folder is no finished run, or a file in it is damaged; names the file.
    """
    metrics = read_metrics(folder)
    recipe_file = folder / "recipe.yaml"
    recipe_text = recipe_file.read_text(encoding="utf8") if recipe_file.is_file() else ""
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError as error:
        raise ValueError(f"{recipe_file} should be YAML: {error}; restore the file") from error
    return Run(
        folder,
        metrics,
        recipe_text,
        recipe if isinstance(recipe, dict) else {},
        _read_log(folder / "log.jsonl"),
        _read_tensors(folder / "trace.safetensors"),
        _read_tensors(folder / "samples.safetensors"),
    )


def read_metrics(folder: Path) -> dict[str, Any]:
    """``metrics.json`` of a finished run.

    Raises
    ------
    ValueError : when the folder is no finished run.
    """
    folder = Path(folder)
    try:
        metrics = read_json(folder / "metrics.json")
    except (FileNotFoundError, NotADirectoryError) as error:
        found = "a folder without one" if folder.is_dir() else "no such folder"
        raise ValueError(
            f"a finished run has a metrics.json; {folder} is {found}; give the output folder of a "
            "finished run, or finish it with compress run --resume"
        ) from error
    if not isinstance(metrics, dict) or not isinstance(metrics.get("metrics"), dict):
        raise ValueError(
            f"{folder / 'metrics.json'} should hold an object with 'metrics' in it; it does not; "
            "run again with --overwrite"
        )
    return metrics


def _read_log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by stage in the order of steps; of a row written twice (after a resume) the last."""
    rows: dict[tuple[str, int, str], dict[str, Any]] = {}
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf8").splitlines(), start=1):
            try:
                row = json.loads(line)
                rows[row["stage"], row["step"], row.get("net", "")] = row
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} should be a JSON object with stage and step; got "
                    f"{line[:60]!r}; remove the line"
                ) from error
    stages: dict[str, list[dict[str, Any]]] = {}
    for _, row in sorted(rows.items(), key=lambda item: item[0][1]):
        stages.setdefault(row["stage"], []).append(row)
    return stages


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except Exception as error:  # safetensors has no public base class in its numpy face
        raise ValueError(
            f"{path} should be a safetensors file; reading it failed: {error}; run again with "
            "--overwrite"
        ) from error


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


# ---- figures ------------------------------------------------------------------------------------


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
                images[name] = _png(figure)
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
    figure = Figure(figsize=(6.4, 1.5 + 0.62 * len(widths)), layout="constrained")
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
        axes.axvline(row["step"], color="black", ls="--", lw=1.2)
        axes.annotate(
            f"surgery\n{_short(row.get('loss_masked'))} to {_short(row.get('loss_slim'))}",
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


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    # no version string in the file: equal figures are equal bytes
    figure.savefig(target, format="png", dpi=DPI, metadata={"Software": None})
    return target.getvalue()


# ---- the page -----------------------------------------------------------------------------------


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
        _table_section(run),
        _samples_section(images),
        _flow_section(run, images),
        _training_section(run, images),
        _facts_section(run),
    ]
    return PAGE.format(
        title=_text(f"{run.name} - compress"),
        name=_text(run.name),
        line=_text(" · ".join(line)),
        style=CSS,
        body="\n".join(section for section in sections if section),
    )


def _warnings_section(run: Run) -> str:
    warnings = run.metrics.get("warnings", [])
    if not warnings:
        return ""
    items = "".join(f"<li>{_text(warning)}</li>" for warning in warnings)
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
            _number(entry[side]["value"], entry.get("unit", "")) for side in ("compressed", "dense")
        )
        note = "" if name == "ssim_to_dense" else f"<span>dense: {before}</span>"
        cards.append(f'<div class="card"><h3>{_text(_name(name))}</h3><p>{after}</p>{note}</div>')
    return (
        f'<section class="headline"><p class="lead">{said}</p>'
        f'<div class="cards">{"".join(cards)}</div></section>'
    )


def _names_like(metrics: Mapping[str, Any], stem: str) -> list[str]:
    return [name for name in (stem, f"{stem}_digits") if name in metrics]


def _table_section(run: Run) -> str:
    floor = run.metrics.get("floor") or {}
    rows = []
    for name, entry in run.metrics["metrics"].items():
        unit = entry.get("unit", "")
        mark = _arrow(entry.get("better", ""))
        under = ""
        if name in floor:
            under = f'<small class="floor">floor {_number(floor[name], unit)}</small>'
        cells = [
            f'<th scope="row">{_text(_name(name))} <span class="better" '
            f'title="{_text(entry.get("better", ""))} is better">{mark}</span>'
            f"<small>{_text(unit)}</small></th>"
        ]
        for side in ("dense", "compressed"):
            cells.append(
                f'<td data-label="{side}" class="{side}"><span>'
                f"{_cell(entry.get(side), unit)}{under if side == 'dense' else ''}</span></td>"
            )
        count = (entry.get("compressed") or {}).get("n")
        cells.append(f'<td data-label="ratio">{_ratio(entry.get("ratio"))}</td>')
        cells.append(f'<td data-label="n">{"–" if count is None else f"{count:,}"}</td>')
        cells.append(f'<td data-label="how" class="how">{_text(entry.get("how", ""))}</td>')
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
            f"{label} <strong>{_short(row[key])}</strong>"
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
    facts = run.metrics.get("run", {})
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        elif isinstance(value, float):
            value = f"{value:.4g}"
        rows.append(
            f"<tr><th scope='row'>{_text(key.replace('_', ' '))}</th><td>{_text(value)}</td></tr>"
        )
    recipe = (
        "<details><summary>Recipe, as it was resolved</summary>"
        f"<pre>{_text(run.recipe_text)}</pre></details>"
        if run.recipe_text
        else ""
    )
    return (
        f'<section><h2>The run</h2><table class="facts"><tbody>{"".join(rows)}</tbody></table>'
        f"{recipe}</section>"
    )


def _figure(images: Mapping[str, bytes], name: str, caption: str, kind: str = "") -> str:
    if name not in images:
        return ""
    data = base64.b64encode(images[name]).decode()
    return (
        f'<figure class="{kind}"><figcaption>{_text(caption)}</figcaption>'
        f'<img src="data:image/png;base64,{data}" alt="{_text(caption)}"></figure>'
    )


def _cell(side: Mapping[str, Any] | None, unit: str) -> str:
    if not side:
        return "–"
    interval = side.get("ci95")
    inside = (
        f"<small>[{_number(interval[0], unit)}, {_number(interval[1], unit)}]</small>"
        if interval
        else ""
    )
    return f"<b>{_number(side['value'], unit)}</b>{inside}"


def _number(value: float, unit: str = "") -> str:
    """Four significant digits; counts with their thousands as k, M, G; shares in per cent."""
    if unit == "share":
        return f"{value:.1%}"
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g}"


def _short(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _name(metric: str) -> str:
    return NAMES.get(metric, metric.replace("_", " "))


def _arrow(better: str) -> str:
    return {"lower": "↓", "higher": "↑"}.get(better, "")


def _ratio(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}×" if 0.01 <= value < 1 else f"{value:.3g}×"


def _text(value: object) -> str:
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


# ---- several runs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Several runs, metric by metric.

    ``rows`` is JSON: for each metric its ``metric``, ``better``, ``unit``, ``best`` (the name of
    the run with the best value) and ``runs``: name -> {value, ci95, n}, in the order given. The
    first column is ``dense`` where all runs measured the same dense value.
    """

    names: tuple[str, ...]
    rows: list[dict[str, Any]]

    def to_text(self, width: int | None = None) -> str:
        """Draw a table for a terminal: runs as columns, the best run of a row marked with ``*``."""
        width = width or max(80, shutil.get_terminal_size().columns)
        # Text everywhere: in a plain string rich would read [brackets] as markup
        note = Text("[low, high]: 95% interval; *: best run")
        table = Table(box=box.SIMPLE, caption=note, caption_justify="left")
        table.add_column("metric")
        for name in self.names:
            # folded, not cut: a column is known by its whole name
            table.add_column(Text(name), justify="right", overflow="fold")
        for row in self.rows:
            mark = _arrow(row["better"])
            cells = [self._text_cell(row, name) for name in self.names]
            table.add_row(f"{_name(row['metric'])} {mark}", *map(Text, cells))
        console = Console(file=io.StringIO(), width=width, color_system=None)
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip("\n")

    @staticmethod
    def _text_cell(row: Mapping[str, Any], name: str) -> str:
        side = row["runs"].get(name)
        if side is None:
            return "-"
        star = " *" if row["best"] == name else ""
        text = _number(side["value"], row["unit"]) + star
        if side.get("ci95"):
            low, high = (_number(bound, row["unit"]) for bound in side["ci95"])
            text += f"\n[{low}, {high}]"
        return text

    def plot(self, path: Path) -> Path:
        """Write one PNG: a small panel per metric, a point and its interval per run."""
        with matplotlib.rc_context(STYLE | {"font.size": 11}):
            write_bytes(path, _png(self._figure()))
        return path

    def _figure(self) -> Figure:
        columns = min(3, len(self.rows))
        lines = -(-len(self.rows) // columns)
        height = 0.9 + 0.32 * len(self.names)
        figure = Figure(figsize=(4.2 * columns, height * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
        for row, axes in zip(self.rows, panels, strict=False):
            for place, name in enumerate(self.names):
                side = row["runs"].get(name)
                if side is None:
                    continue
                colour = GREY if name == "dense" else DENSE
                if row["best"] == name:
                    colour = COMPRESSED
                if side.get("ci95"):
                    axes.plot(side["ci95"], [place, place], color=colour)
                axes.plot(side["value"], place, "o", color=colour)
            axes.set_yticks(range(len(self.names)), self.names)
            axes.set_ylim(len(self.names) - 0.5, -0.5)
            axes.set_title(f"{_name(row['metric'])} {_arrow(row['better'])}", fontsize=11)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(lambda value, _: _number(value))
        for axes in list(panels):
            axes.set_visible(False)
        return figure


def compare(folders: Sequence[Path]) -> Comparison:
    """Put finished runs side by side.

    Parameters
    ----------
    folders : of finished runs; at least one. Runs with the same folder name get their whole path.

    Raises
    ------
    ValueError : for no folder, the same folder twice, or a folder that is no finished run.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("a comparison needs the folder of at least one finished run; got none")
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ValueError(
            f"runs must differ; got the same folder twice in {', '.join(map(str, paths))}; name "
            "each once"
        )
    short = [path.name for path in resolved]
    clash = len(set(short)) < len(short) or "dense" in short
    names = [str(path) if clash else name for path, name in zip(paths, short, strict=True)]
    runs = {name: read_metrics(path)["metrics"] for name, path in zip(names, paths, strict=True)}
    metrics = {metric: entry for run in runs.values() for metric, entry in run.items()}
    # the order of the suite, whichever run a metric comes from
    order = sorted(metrics, key=lambda m: list(NAMES).index(m) if m in NAMES else len(NAMES))
    rows = [_row(metric, metrics[metric], runs) for metric in order]
    columns = ["dense"] if any("dense" in row["runs"] for row in rows) else []
    return Comparison((*columns, *names), rows)


def _row(
    metric: str, entry: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    sides = {name: run[metric]["compressed"] for name, run in runs.items() if metric in run}
    values = {name: side["value"] for name, side in sides.items()}
    pick = min if entry.get("better") == "lower" else max
    best = pick(values, key=lambda name: values[name])
    # an equal value is no victory
    alone = list(values.values()).count(values[best]) == 1 and len(runs) > 1
    dense = [run[metric]["dense"] for run in runs.values() if metric in run]
    same = all(
        side and np.isclose(side["value"], dense[0]["value"], rtol=1e-7, atol=0) for side in dense
    )
    return {
        "metric": metric,
        "better": entry.get("better", ""),
        "unit": entry.get("unit", ""),
        "best": best if alone else None,
        "runs": ({"dense": dense[0]} if same else {}) | sides,
    }
