"""A dynamic cache that writes a new token in place.

The layers of transformers' ``DynamicCache`` concatenate: a decode step copies the whole cache,
which takes longer than reading it. The layers here keep their rows at the beginning of a longer
tensor and write behind them; what they return, and what anybody sees of them, is the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from compress.models.cache_argument import cache_in
from compress.models.generation import replaced_method
from compress.models.growing_rows import Rows


class GrowingLayer(DynamicLayer):
    """The cache of a layer that keeps everything."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rows = Rows(), Rows()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens; all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._rows
        self.keys = keys.behind(self.keys, key_states)
        self.values = values.behind(self.values, value_states)
        return self.keys, self.values


@contextmanager
def growing_caches(model: Any) -> Iterator[None]:
    """Let ``model.generate`` write its cache in place until the context is left.

    Only the dynamic cache that it would make by itself: one that it is given, a static, a quantised
    and an offloaded one stay what they are. The cache that it returns goes on working afterwards.
    """

    def prepare(original: Any, config: Any, model_kwargs: dict[str, Any], *others: Any) -> None:
        passed = cache_in(model_kwargs)
        original(config, model_kwargs, *others)
        made = cache_in(model_kwargs)
        if made is not passed and type(made) is DynamicCache and not made.offloading:
            made.layers = [_growing(layer) for layer in made.layers]

    with replaced_method(model, "_prepare_cache_for_generation", prepare):
        yield


def _growing(layer: Any) -> Any:
    """An empty layer that caches as this one, which is empty, does."""
    if type(layer) is DynamicLayer:
        return GrowingLayer()
    if layer._layer_type == "reference_sliding_attention":
        # the only architecture that has it is imported by now
        from compress.models.growing_window import GrowingWindowLayer

        return GrowingWindowLayer(layer.sliding_window)
    return layer
