import dataclasses
import functools

import pytest
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from compress.models.cache_argument import cache_argument, cache_in


class _New(nn.Module):
    def forward(self, input_ids=None, cache=None, **kwargs): ...


class _Old(nn.Module):
    def forward(self, input_ids=None, past_key_values=None, **kwargs): ...


class _Both(nn.Module):
    """As transformers that takes the old name with a warning might have it."""

    def forward(self, input_ids=None, past_key_values=None, cache=None): ...


class _Wrapped(nn.Module):
    """As transformers decorates its models: what it wraps has the names."""

    @functools.wraps(_New.forward)
    def forward(self, *args, **kwargs): ...


class _Silent(nn.Module):
    def forward(self, **kwargs): ...


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (_New, "cache"),
        (_Old, "past_key_values"),
        (_Both, "cache"),
        (_Wrapped, "cache"),
        (_Silent, "past_key_values"),
    ],
)
def test_the_model_says_what_its_cache_is_called(module, name):
    assert cache_argument(module()) == name


def test_the_cache_is_found_in_a_call_and_in_an_output():
    cache = DynamicCache()
    for name in ("cache", "past_key_values"):
        assert cache_in({"input_ids": 1, name: cache, "use_cache": True}) is cache
    assert cache_in({"use_cache": True, "cache_position": 3}) is None
    fields = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
    (name,) = fields & {"cache", "past_key_values"}
    assert cache_in(BaseModelOutputWithPast(**{name: cache})) is cache
    assert cache_in(BaseModelOutputWithPast()) is None


class _Renamed(dict):
    """An output that minds being asked for the old name, as those of transformers 5.24."""

    def get(self, name, default=None):
        raise FutureWarning(f"{name} is called cache now")

    __contains__ = __getitem__ = get


def test_an_output_is_not_asked_for_the_old_name():
    cache = DynamicCache()
    assert cache_in(_Renamed(logits=1, cache=cache)) is cache
    assert cache_in(_Renamed(logits=1)) is None
