"""Runs that spend little time where the tests of tiny models do not look."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from compress.common import plots
from compress.eval.diffusion import speed
from compress.methods.fastocr import figures as films
from compress.methods.gradflow import train
from compress.runs import diffusion as runs


@contextmanager
def quick_runs() -> Iterator[None]:
    """Few held-out images are predicted, few passes timed; figures are small and films short."""
    with (
        patch.object(train.PruningRun._held_out_loss, "__defaults__", (8,)),
        patch.object(runs, "VALIDATION_LIMIT", 8),
        patch.dict(speed.__kwdefaults__, repeats=2),
        patch.object(plots, "DPI", 20),
        patch.object(films, "NEW_TOKENS", 12),
    ):
        yield
