"""The figures of a pruning run, and the sections of its report that they stand in."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compress.common.plots import (
    COMPRESSED,
    DENSE,
    FOURTH,
    GREY,
    MARKERS,
    THIRD,
    LineCollection,
    MaxNLocator,
    Plot,
    canvas,
    legend_above,
    styled,
)
from compress.eval.metrics import number_text
from compress.methods.base import Figure, RunRecord, Section

CRITERION_SHARE_AIM = 0.15
JUMP_AIM = 0.05

Rows = Sequence[Mapping[str, Any]]


def sections(run: RunRecord) -> list[Section]:
    """What was removed and how, and the training; without what the run has no record of."""
    updates, trace = run.log.get("mask", []), run.trace
    figures = []
    if widths := run.metrics.get("widths"):
        png = widths_plot(widths)
        figures.append(Figure("widths", png, "What became smaller, before and after"))
    if "masks" in trace and len(trace.get("steps", [])) > 1:
        png = masks_plot(trace["masks"], trace["steps"])
        figures.append(Figure("masks", png, "A sample of the masks"))
    if updates:
        png = schedule_plot(updates)
        figures.append(Figure("schedule", png, "Budget, sharpening and continuity"))
        png = stability_plot(updates, run.metrics.get("run", {}).get("returned_channels"))
        figures.append(Figure("stability", png, "Criterion stability and mask churn"))
    result = []
    notes = _flow_notes(run)
    if figures or notes:
        title = "What was removed, and how" if updates else "What was removed"
        result.append(Section(title, notes, figures))
    if any(stage in run.log for stage in ("flow", "recover", "validation")):
        loss = Figure("loss", loss_plot(run.log), "Training and validation loss")
        notes = [_surgery_note(row) for row in run.log.get("surgery", [])]
        result.append(Section("Training", notes, [loss]))
    return result


def _flow_notes(run: RunRecord) -> list[str]:
    facts, updates = run.metrics.get("run", {}), run.log.get("mask", [])
    notes = [
        f"Kept of {stack}, counted from 0: {', '.join(map(str, kept))}."
        for stack, kept in facts.get("kept_blocks", {}).items()
    ]
    returned = facts.get("returned_channels", updates[-1].get("returned") if updates else None)
    if returned is not None and updates:
        notes.append(
            f"{returned:,} times a {_unit(facts)} came back after its mask had fallen under one "
            "half."
        )
    ranks = [row["spearman"] for row in updates if row.get("spearman") is not None]
    if ranks:
        notes.append(
            f"Median rank correlation of successive criterion estimates: {np.median(ranks):.2f}."
        )
    jump = facts.get("surgery", {}).get("binarise_jump")
    if jump is not None and updates:
        verdict = "within" if jump <= JUMP_AIM else "above"
        notes.append(
            f"Making the masks binary changed the validation loss by {jump:+.1%}, {verdict} the "
            f"aim of at most {JUMP_AIM:.0%}."
        )
    share = facts.get("criterion_share")
    if share is not None:
        verdict = "within" if share <= CRITERION_SHARE_AIM else "above"
        notes.append(
            f"The criterion took {share:.1%} of the training time, {verdict} the aim of at most "
            f"{CRITERION_SHARE_AIM:.0%}."
        )
    return notes


def _unit(facts: Mapping[str, Any]) -> str:
    return "block" if facts.get("kept_blocks") else "channel"


def _surgery_note(row: Mapping[str, Any]) -> str:
    losses = ", ".join(
        f"{label} {number_text(row[key])}"
        for label, key in (
            ("before binarising", "loss_before_binarise"),
            ("after", "loss_after_binarise"),
            ("masked network", "loss_masked"),
            ("slim network", "loss_slim"),
        )
        if row.get(key) is not None
    )
    note = f"Surgery at step {row['step']:,}: loss {losses}."
    if row.get("max_difference") is not None:
        note += f" Largest output difference: {row['max_difference']:.1e}."
    if unaligned := row.get("unaligned_norms"):
        note += f" {unaligned} normalisation layers could not be aligned with the masks."
    return note


@styled
def widths_plot(widths: Rows) -> Plot:
    """Channels of each level, or numbers of blocks, as bars, dense and compressed."""
    # a model with free inner widths has dozens of rows: they come closer
    row_height = max(0.3, min(0.62, 8 / len(widths)))
    figure = canvas(6.4, 1.5 + row_height * len(widths))
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
    blocks = all(str(row["level"]).startswith("num_") for row in widths)
    axes.set_xlabel("blocks" if blocks else "channels")
    legend_above(axes)
    return figure


@styled
def masks_plot(masks: np.ndarray, steps: np.ndarray) -> Plot:
    """The masks of some units over the steps: ``(updates, units)`` and ``(updates,)``."""
    came_back = returned_units(masks)
    kept = (masks[-1] >= 0.5) & ~came_back
    groups = (
        ("removed", ~kept & ~came_back, COMPRESSED, 0.35, 0.8),
        ("kept", kept, DENSE, 0.35, 0.8),
        ("kept, after a time under one half", came_back, "black", 0.9, 1.4),
    )
    figure = canvas(6.4, 4.1)
    axes = figure.subplots()
    for label, chosen, colour, alpha, thickness in groups:
        lines = [np.column_stack([steps, unit]) for unit in masks[:, chosen].T]
        axes.add_collection(LineCollection(lines, colors=colour, alpha=alpha, linewidths=thickness))
        axes.plot([], [], color=colour, label=f"{label}: {int(chosen.sum())}")
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("mask")
    legend_above(axes)
    return figure


def returned_units(masks: np.ndarray) -> np.ndarray:
    """Units that fell under one half and ended above: ``(updates, units)`` -> bool ``(units,)``."""
    return (masks < 0.5).any(axis=0) & (masks[-1] >= 0.5)


@styled
def schedule_plot(updates: Rows) -> Plot:
    """Budget, gamma and the largest move over the mask updates."""
    steps = _column(updates, "step")
    figure = canvas(6.4, 6.0)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(1.6, 1, 1))
    top.plot(steps, _column(updates, "budget"), color=DENSE, label="budget (mean mask)")
    top.plot(
        steps,
        _column(updates, "undecided"),
        color=FOURTH,
        ls="--",
        label="undecided (0.05 to 0.95)",
    )
    top.set_ylim(-0.03, 1.03)
    top.set_ylabel("share of units")
    legend_above(top)
    middle.plot(steps, _column(updates, "gamma"), color=THIRD)
    middle.set_ylabel("gamma")
    bottom.plot(steps, _column(updates, "max_move"), color=COMPRESSED)
    bottom.set_ylabel("largest move")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("optimiser step")
    figure.align_ylabels()
    return figure


@styled
def stability_plot(updates: Rows, returned_in_all: int | None) -> Plot:
    """Rank correlation of successive criterion estimates, if any, and the masks that came back.

    Parameters
    ----------
    updates : rows of the mask updates.
    returned_in_all : the masks of the last step, binarisation, included.
    """
    figure = canvas(6.4, 4.6)
    ranked = [row for row in updates if row.get("spearman") is not None]
    *above, bottom = figure.subplots(2 if ranked else 1, 1, sharex=True, squeeze=False)[:, 0]
    for top in above:
        top.axhline(0, color=GREY, lw=1)
        top.plot(_column(ranked, "step"), _column(ranked, "spearman"), "o-", color=DENSE, ms=3.5)
        top.set_ylim(min(-0.1, *_column(ranked, "spearman"), 0), 1.05)
        top.set_ylabel("rank correlation")
        top.set_title("Each criterion estimate against the last (Spearman)")
    steps, returned = _column(updates, "step"), _column(updates, "returned")
    if returned_in_all is not None:
        steps.append(steps[-1] + 1)
        returned.append(returned_in_all)
    bottom.step(steps, returned, where="post", color=COMPRESSED)
    bottom.yaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_ylim(0, max(1, 1.05 * max(returned)))
    bottom.set_ylabel("masks")
    bottom.set_xlabel("optimiser step")
    bottom.set_title("Masks that fell under one half and came back")
    return figure


@styled
def loss_plot(log: Mapping[str, Rows]) -> Plot:
    """Training and validation loss over the steps, and where surgery was."""
    figure = canvas(6.4, 4.6)
    axes = figure.subplots()
    for stage, colour in (("flow", DENSE), ("recover", COMPRESSED)):
        if rows := log.get(stage, []):
            steps, losses = _column(rows, "step"), _column(rows, "loss")
            axes.plot(steps, losses, color=colour, lw=0.6, alpha=0.3)
            axes.plot(steps, smooth(losses), color=colour, label=f"training, {stage} (smoothed)")
    validation = log.get("validation", [])
    for index, net in enumerate(dict.fromkeys(row.get("net", "") for row in validation)):
        rows = [row for row in validation if row.get("net", "") == net]
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
    for row in log.get("surgery", []):
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
    legend_above(axes)
    return figure


def smooth(values: Sequence[float], decay: float = 0.95) -> np.ndarray:
    """Exponential mean of a noisy series, corrected for its start."""
    means, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(mean / weight)
    return np.array(means)


def _column(rows: Rows, key: str) -> list[float]:
    return [float("nan") if row.get(key) is None else row[key] for row in rows]
