"""How all figures look, and how they become image files."""

import functools
import io
from collections.abc import Callable
from typing import Any, ParamSpec

from compress.common.extras import extra

with extra("report", "drawing figures"):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection as LineCollection
    from matplotlib.figure import Figure as Plot
    from matplotlib.ticker import MaxNLocator as MaxNLocator
    from matplotlib.ticker import PercentFormatter as PercentFormatter

# Okabe and Ito's palette: told apart by colour-blind readers
DENSE, COMPRESSED, THIRD, FOURTH, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
COLOURS = (COMPRESSED, DENSE, THIRD, FOURTH, "#E69F00", "#56B4E9", GREY)
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

P = ParamSpec("P")


def canvas(width: float, height: float) -> Plot:
    """An empty figure; its size is in inches."""
    return Plot(figsize=(width, height), layout="constrained")


def styled(plot: Callable[P, Plot]) -> Callable[P, bytes]:
    """Let a function that plots a figure use our style, and return a PNG file."""

    @functools.wraps(plot)
    def to_png(*args: P.args, **kwargs: P.kwargs) -> bytes:
        target = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            # no version string in the file: equal figures are equal bytes
            plot(*args, **kwargs).savefig(
                target, format="png", dpi=DPI, metadata={"Software": None}
            )
        return target.getvalue()

    return to_png


def legend_above(axes: Axes) -> None:
    """Put the legend over the axes, where it hides no data."""
    entries = len(axes.get_legend_handles_labels()[1])
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2 if entries > 1 else 1, borderpad=0.2
    )
