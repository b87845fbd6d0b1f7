"""Runs that spend little time where the tests of tiny models do not look."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

from PIL import Image

from compress.common import plots
from compress.eval.diffusion import speed
from compress.methods.fastocr import figures as films
from compress.methods.gradflow import train
from compress.runs import diffusion as runs


def _one_pixel(plot: plots.Plot, target, **_: object) -> None:
    Image.new("L", (1, 1)).save(target, format="png")


@contextmanager
def quick_runs(figures: bool = False) -> Iterator[None]:
    """Few images are predicted and compared, seldom; few passes are timed; films are short.

    Figures are small, or one pixel: to draw them takes most of the time of a report.
    """
    with (
        patch.object(train.PruningRun._held_out_loss, "__defaults__", (8,)),
        patch.object(train, "COMPARED", 8),
        patch.object(train, "VALIDATIONS", 2),
        patch.object(runs, "VALIDATION_LIMIT", 8),
        patch.dict(speed.__kwdefaults__, repeats=2),
        patch.object(runs, "REFERENCE_LIMIT", 64),
        patch.object(plots, "DPI", 20),
        nullcontext() if figures else patch.object(plots.Plot, "savefig", _one_pixel),
        patch.object(films, "NEW_TOKENS", 8),
    ):
        yield
