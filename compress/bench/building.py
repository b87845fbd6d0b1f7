"""Models at their published sizes with random weights."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from compress.bench.rows import SEED

M = TypeVar("M", bound=torch.nn.Module)


def built(build: Callable[[], M], dtype: torch.dtype, device: str) -> M:
    """A model with the weights that its classes begin with, made in its dtype on its device.

    Nothing is made larger first: a model whose float32 weights would not fit can be built.
    """
    before = torch.get_default_dtype()
    torch.manual_seed(SEED)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def sharing_weights(model: M) -> M:
    """A copy with its own configuration and hooks, and the same parameters and buffers."""
    own: list[Any] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in own})
