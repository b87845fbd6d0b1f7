"""Runs that spend little time where the tests of tiny models do not look."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from unittest.mock import patch

from PIL import Image
from torch import nn
from torch.utils._pytree import tree_map

from compress.common import cost, plots
from compress.eval.diffusion import speed
from compress.methods.fastocr import figures as films
from compress.methods.gradflow import allocation, train, unets, widths
from compress.runs import diffusion as runs

_known: dict[str, object] = {}


def _once(function: Callable) -> Callable:
    """A function of a model's architecture and of its inputs' shapes, called once for each."""

    @wraps(function)
    def found(model: nn.Module, *inputs: object) -> object:
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        given = tree_map(lambda x: getattr(x, "shape", x), inputs)
        key = f"{function.__name__} {type(model)} {model.config} {shapes} {given}"
        if key not in _known:
            _known[key] = function(model, *inputs)
        return _known[key]

    return found


@contextmanager
def known_architectures() -> Iterator[None]:
    """The groups and the MACs of models that are built again and again are found once."""
    with ExitStack() as stack:
        for module in (cost, widths, allocation):
            stack.enter_context(patch.object(module, "layer_macs", _once(cost.layer_macs)))
        groups = _once(unets._traced_groups)
        stack.enter_context(patch.object(unets, "_traced_groups", groups))
        yield


def _one_pixel(plot: plots.Plot, target, **_: object) -> None:
    Image.new("L", (1, 1)).save(target, format="png")


@contextmanager
def quick_runs(figures: bool = False) -> Iterator[None]:
    """Few images are predicted and compared, seldom; few passes are timed; films are short.

    Figures are small, or one pixel: to draw them takes most of the time of a report.
    """
    with (
        known_architectures(),
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
