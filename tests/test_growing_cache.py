"""The cache that is written in place: the same rows as transformers', without the copies."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from builders import fastocr
from builders.counting import Counted
from builders.fastocr import paper
from builders.tiers import few
from builders.vlm import FAMILIES
from compress.models import growing_rows
from compress.models.cache_argument import cache_argument, cache_in
from compress.models.generation import replaced_method
from compress.models.growing_cache import GrowingLayer, growing_caches
from compress.models.visual import build_prompt

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# a cache that keeps all, a window, another order of the inputs; test_fastocr.py reads all families
@pytest.fixture(scope="module", params=few(FAMILIES, "internvl", "unlimited_ocr", "deepseek_ocr2"))
def family(request):
    model, processor = fastocr.model(request.param)
    return model, build_prompt(model, processor, fastocr.PAGES[1:2], fastocr.TEXTS[:1])


def _answer(model, inputs, steps=12, **settings):
    """What ``generate`` returns, and the bytes that each call of the model wrote."""
    written = []

    def forward(original, *args, **kwargs):
        with Counted() as counted:
            output = original(*args, **kwargs)
        written.append(counted.written)
        return output

    with replaced_method(model, "forward", forward):
        output = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **settings,
        )
    return output, written


def _same(one, other):
    assert torch.equal(one.sequences, other.sequences)
    assert all(torch.equal(*pair) for pair in zip(one.logits, other.logits, strict=True))


def _nbytes(cache):
    """Of all rows that the cache holds, and of one of them."""
    layers = cache.layers
    prompts = [getattr(layer, "prefill_keys", None) for layer in layers]
    parts = [layer.keys for layer in layers] + [part for part in prompts if part is not None]
    held = 2 * sum(part.nbytes for part in parts)
    return held, 2 * sum(layer.keys[:, :, :1].nbytes for layer in layers)


def test_a_step_writes_its_token_and_copies_nothing(family):
    model, inputs = family
    plain, copied = _answer(model, inputs)
    with growing_caches(model):
        output, written = _answer(model, inputs)
    _same(output, plain)
    held, row = _nbytes(cache_in(output))
    assert copied[-1] - written[-1] > 0.7 * held  # all but a window, which slides
    assert written[-1] - written[-2] < row / 2  # masks grow by bytes


def test_a_long_answer_seldom_takes_more_room():
    layer, row = GrowingLayer(), torch.randn(1, 1, 1, 4)
    with Counted() as counted:
        for _ in range(2000):
            layer.update(row, row)
    assert counted.written < 2000 * 20 * 2 * row.nbytes  # a copy of all each time: 1000


@pytest.mark.parametrize("name", few(["internvl", "unlimited_ocr"], "unlimited_ocr"))
def test_the_cache_goes_on_in_plain_transformers_and_inside_again(name):
    model, processor = fastocr.model(name)
    inputs = build_prompt(model, processor, fastocr.PAGES[1:2], fastocr.TEXTS[:1])

    def talk(contexts):
        """Three turns into one cache, each in a context of its own."""
        given, cache, turns = inputs, {}, []
        for context in contexts:
            with context:
                output, _ = _answer(model, given, 4, **cache)
            turns.append(output)
            words = torch.tensor([[20, 21]])
            ids = torch.cat([output.sequences, words], 1)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            cache = {cache_argument(model): cache_in(output)}
        return turns

    outside = [growing_caches(model), *(torch.no_grad() for _ in range(2))]
    again = [growing_caches(model), torch.no_grad(), growing_caches(model)]
    plain = talk(torch.no_grad() for _ in range(3))
    for turns in (talk(outside), talk(again)):
        for one, other in zip(turns, plain, strict=True):
            _same(one, other)


def test_a_cache_that_is_given_or_asked_for_by_name_stays_what_it_is(family):
    model, inputs = family
    mine = DynamicCache(config=model.config.get_text_config())
    kinds = [type(layer) for layer in mine.layers]
    with paper(focal_layers=[1], min_visual=0).attach(model):
        _answer(model, inputs, 2, **{cache_argument(model): mine})
        assert [type(layer) for layer in mine.layers] == kinds
        static = cache_in(_answer(model, inputs, 2, cache_implementation="static")[0])
        assert not any(isinstance(layer, DynamicLayer) for layer in static.layers)
        own = cache_in(_answer(model, inputs, 2)[0])
        assert all("Growing" in type(layer).__name__ for layer in own.layers)
    # the class of transformers' caches is what it was
    fresh = DynamicCache(config=model.config.get_text_config())
    assert [type(layer) for layer in fresh.layers] == kinds


def _changes(layer):
    """What transformers and its users do to a layer between two steps."""
    return {
        "nothing": lambda: layer,
        "crop": lambda: layer.crop(-2),
        "reorder": lambda: layer.reorder_cache(torch.tensor([1, 0])),
        "repeat": lambda: layer.batch_repeat_interleave(2),
        "select": lambda: layer.batch_select_indices(torch.tensor([0])),
        "slice": lambda: layer.batch_select_indices(slice(0, 1)),
        "every second row": lambda: (
            setattr(layer, "keys", layer.keys[:, :, ::2])
            or setattr(layer, "values", layer.values[:, :, ::2])
        ),
        "reset": lambda: layer.reset(),
    }


@pytest.mark.parametrize("change", _changes(None))
@pytest.mark.parametrize("least", [0, 3, 256])
def test_a_layer_holds_what_one_of_transformers_holds(change, least, monkeypatch):
    monkeypatch.setattr(growing_rows, "LEAST", least)
    layers = [DynamicLayer(), GrowingLayer()]
    for step, rows in enumerate((5, 1, 1, 3, 1, 1)):
        batch = 2 if step < 3 else max(1, layers[0].get_seq_length() and len(layers[0].keys))
        new = torch.randn(batch, 2, rows, 4), torch.randn(batch, 2, rows, 6)
        copies = [copy.deepcopy(layer) for layer in layers] if step else layers
        for one, other in zip(layers[0].update(*new), layers[1].update(*new), strict=True):
            assert torch.equal(one, other)
        for layer in copies:  # which share nothing with what went on
            layer.update(*new)
        assert torch.equal(copies[0].keys, copies[1].keys)
        assert layers[0].get_seq_length() == layers[1].get_seq_length()
        if step == 2:
            for layer in layers:
                _changes(layer)[change]()


def test_gradients_and_inference_mode():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(torch.randn(1, 1, 3, 2), torch.randn(1, 1, 3, 2))
        layer.update(torch.randn(1, 1, 1, 2), torch.randn(1, 1, 1, 2))
    with torch.no_grad():  # an inference tensor must not be written here
        layer.update(torch.randn(1, 1, 1, 2), torch.randn(1, 1, 1, 2))
    first, second = (torch.randn(1, 1, 1, 2, requires_grad=True) for _ in range(2))
    keys, _ = layer.update(first, first)
    later, _ = layer.update(second, second)
    (keys.square().sum() + later.square().sum()).backward()
    assert torch.equal(first.grad, 4 * first) and torch.equal(second.grad, 2 * second)
