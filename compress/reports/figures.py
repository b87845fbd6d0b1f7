"""The figures of a report that do not depend on the method."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.common.plots import (
    COLOURS,
    COMPRESSED,
    DENSE,
    GREY,
    MARKERS,
    MaxNLocator,
    PercentFormatter,
    Plot,
    canvas,
    styled,
)
from compress.eval.metrics import arrow, number_text
from compress.reports.run_folder import metric_of


@styled
def retention_plot(
    series: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]], accuracy: str
) -> Plot:
    """Accuracy retention against the share of visual tokens that was used.

    Parameters
    ----------
    series : its name -> points, each the share and the retention with its interval.
    accuracy : what is retained, such as ``1 - CER``.
    """
    figure = canvas(11, 5)
    axes = figure.subplots()
    for place, (name, points) in enumerate(series.items()):
        points = sorted(points, key=lambda point: point[0])
        values = [kept["value"] for _, kept in points]
        ends = [kept["ci95"] or (kept["value"],) * 2 for _, kept in points]
        errors = [
            [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
        ]
        axes.errorbar(
            [used for used, _ in points],
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
    return figure


@styled
def comparison_panels(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Plot:
    """A small panel per metric, with a point and its interval per run.

    Parameters
    ----------
    names : of the runs.
    rows : the metrics, as :class:`compress.reports.comparison.Comparison` has them.
    """
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure = canvas(4.2 * columns, (0.9 + 0.32 * len(names)) * lines)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for row, axes in zip(rows, panels, strict=False):
        for place, name in enumerate(names):
            side = row["runs"].get(name)
            if side is None:
                continue
            colour = GREY if name == "dense" else DENSE
            if row["best"] == name:
                colour = COMPRESSED
            if side.get("ci95"):
                axes.plot(side["ci95"], [place, place], color=colour)
            axes.plot(side["value"], place, "o", color=colour)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(f"{metric_of(row['metric']).label} {arrow(row['better'])}", fontsize=11)
        axes.tick_params(labelsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _, unit=row["unit"]: number_text(value, unit))
    for axes in list(panels):
        axes.set_visible(False)
    return figure
