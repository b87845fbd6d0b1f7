"""Below its crossover FastOCR is the dense model, counts that, and says so once."""

import json
import logging
from pathlib import Path

import pytest
import torch

from builders import fastocr
from builders.fastocr import paper
from compress import FastOCR
from compress.eval.tables import read_rows
from compress.methods.fastocr.bench import crossovers
from compress.methods.fastocr.crossover import SHIPPED, crossover, read_table
from compress.models.visual import build_prompt, visual_layouts


@pytest.fixture(scope="module")
def qwen():
    model, processor = fastocr.model("qwen2_5_vl", layers=4)
    return model, build_prompt(model, processor, fastocr.PAGES, fastocr.TEXTS), fastocr.write


@pytest.mark.parametrize("fixation", ["dynamic", "static"])
def test_below_min_visual_it_is_the_dense_model(qwen, fixation, caplog):
    model, inputs, write = qwen
    counts = [len(layout.positions) for layout in visual_layouts(model, inputs)]
    dense, logits = write(model, inputs)
    settings = {"keep_visual": 0.2, "focal_layers": (1,), "fixation": fixation}
    with (
        caplog.at_level(logging.WARNING),
        paper(**settings, min_visual=max(counts) + 1).attach(model) as handle,
    ):
        for _ in range(2):
            ids, off = write(model, inputs)
            assert torch.equal(ids, dense) and torch.equal(off, logits)
        facts = handle.facts()
    assert facts["switched_off"] == 2 * len(counts)
    assert facts["attended"] == 1.0 and facts["steps"] == 2 * 4 * len(counts)
    assert [r for r in caplog.messages if "switched itself off" in r] == caplog.messages[:1]
    # each sequence goes by its own number
    with paper(**settings, min_visual=0).attach(model) as handle:
        on = write(model, inputs)[1]
    with paper(**settings, min_visual=max(counts)).attach(model) as handle:
        mixed = write(model, inputs)[1]
        assert handle.facts()["switched_off"] == 1 and handle.facts()["attended"] < 1
    for row, count in enumerate(counts):
        expected = on if count == max(counts) else logits
        torch.testing.assert_close(mixed[row], expected[row], atol=1e-5, rtol=0)


def test_auto_is_looked_up_by_device(qwen, tmp_path, monkeypatch):
    model, inputs, write = qwen
    table = tmp_path / "table.json"
    monkeypatch.setenv("COMPRESS_CROSSOVERS", str(table))
    for least, off in ((10_000, 3), (0, 0)):
        table.write_text(json.dumps({"cpu": {"min_visual": least}}))
        with paper(keep_visual=0.2, focal_layers=(1,)).attach(model) as handle:
            write(model, inputs)
            assert handle.facts()["switched_off"] == off
        # it was measured with focal layers alone
        with FastOCR(choose="signs").attach(model) as handle:
            write(model, inputs)
            assert not handle.facts()["switched_off"] and handle.facts()["attended"] < 1
    assert crossover(torch.device("cpu"), {}) == (0, "nothing was measured on cpu")


@pytest.mark.parametrize("content", ["[]", '{"cpu": 5}', '{"cpu": {"min_visual": -1}}'])
def test_a_damaged_table_is_refused(content, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="should map devices"):
        read_table(path)


def test_the_shipped_table_is_what_the_rows_say():
    rows = read_rows(Path(__file__).parents[1] / "eval" / "results" / "bench_fastocr.jsonl")
    table = read_table(SHIPPED)
    assert table == crossovers(rows)
    assert crossover(torch.device("cpu"), table) == (table["cpu"]["min_visual"], "measured on cpu")
