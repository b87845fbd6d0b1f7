"""The deep reader: the weights it begins with, its pages, pages drawn ahead, and thirty steps."""

from dataclasses import replace
from statistics import mean

import pytest
import torch

from compress.common.journal import Journal
from compress.data.pages import Difficulty, page
from compress.models.builtin.reader_training import Plan, Reader, Trainer
from compress.models.builtin.train_reader_deep import (
    LARGE,
    LAYERS,
    LEVELS,
    MOST_NEW_TOKENS,
    build,
    deepen,
)
from compress.models.builtin.train_reader_qwen import build_model, build_processor, encode

SMALL = Difficulty((64, 32), (1, 1), (2, 4), (14, 14), margin=(4, 4))


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.mark.parametrize("layers", [3, 5])
def test_a_deepened_reader_computes_the_same_and_can_learn_in_every_layer(processor, layers):
    stored, deep = build_model(processor, 2), build_model(processor, layers)
    inputs = encode(processor, [page(0, i, SMALL, "train") for i in range(2)])
    deepen(deep, stored)
    loss = deep(**inputs).loss
    assert torch.equal(loss, stored(**inputs).loss)
    loss.backward()
    for layer in deep.model.language_model.layers:
        assert layer.self_attn.o_proj.weight.grad.any() and layer.mlp.down_proj.weight.grad.any()


def test_its_pages_and_its_weights_have_the_size_that_was_asked_for(processor):
    model = build(LAYERS, False, "cpu").model
    assert 2 * sum(p.numel() for p in model.parameters()) <= 20_000_000
    pages = [page(0, i, LARGE, "train") for i in range(4)]
    assert min(len(made.text) for made in pages) >= 500
    inputs = encode(processor, pages)
    assert inputs["image_grid_thw"].tolist() == [[1, 72, 56]] * 4
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    assert visual.tolist() == [1008] * 4
    (_, lines), (_, characters) = LARGE.lines, LARGE.characters
    # between two paragraphs there is an empty line
    longest = lines * (characters + 2)
    assert longest < model.generation_config.max_new_tokens == MOST_NEW_TOKENS
    assert 1008 + 4 + longest < model.config.text_config.max_position_embeddings


def test_pages_drawn_ahead_are_those_of_the_plan():
    levels = tuple(replace(level, batch=2) for level in LEVELS[:2])
    plan = Plan(levels=levels, workers=1)
    reader = Reader(torch.nn.Linear(2, 2), *3 * [lambda *given: None])
    trainer = Trainer(reader, plan, Journal())
    # the second level begins where a worker has drawn the next step for the first
    for step, level in ((0, 0), (1, 0), (2, 1), (3, 1)):
        trainer.progress.step, trainer.progress.level = step, level
        drawn, pages = trainer._draw()
        expected, wanted = plan.draw(trainer.progress)
        assert drawn == expected and [p.text for p in pages] == [p.text for p in wanted]


@pytest.mark.slow
def test_thirty_steps_lower_the_loss():
    levels = (replace(LEVELS[0], batch=8), *LEVELS[1:])
    trainer = Trainer(build(LAYERS, False, "cpu"), Plan(levels=levels), Journal())
    losses = [trainer.step() for _ in range(30)]
    assert losses[0] > 4.5 and mean(losses[-5:]) < mean(losses[:5]) - 0.15
