"""The benchmarks run what they say: counted work, bounds and rows, never times."""

import functools
import itertools
import json
from unittest.mock import ANY

import pytest
import torch
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrModel
from typer.testing import CliRunner

from compress.bench import kernels
from compress.bench.rows import newest, parse_shape
from compress.bench.timing import CLOCKS, Bench, Ceilings, costliest
from compress.cli import app
from compress.common.cost import unet_cost
from compress.eval.latency import summarise
from compress.methods.fastocr.bench import DecodeShape, crossovers, end_to_end_bound
from compress.methods.gradflow.bench import DENSE, UNetShape, random_inputs, slim_builder, warning
from compress.methods.registry import benchmarks
from compress.methods.rtprune import RTPrune, hooks
from compress.methods.rtprune.bench import PrefillShape, derived, parts
from compress.runs.bench_reading import all_benchmarks
from compress.tables.bench import body

COMMON = {"bench", "part", "shape", "ms", "device", "clock", "threads", "seed", "versions", "date"}
READER = {"model": "reader-deepseek", "text": 2}
END_TO_END = {"matmul", "matmul, dynamic cache", "fastocr", "head"}  # without SDPA


def test_the_byte_bound_is_what_must_be_read():
    shape = DecodeShape(model="tiny", visual=1000, text=100, keep_visual=0.1)
    assert len(shape.focal) == 1 and shape.built_layers == 8
    # 8 layers of 2 key heads of 16 numbers, key and value, of 4 bytes
    assert shape.cached_bytes(sparse=False) == 8 * 1100 * 2 * 2 * 16 * 4
    assert shape.byte_bound == pytest.approx(8 * 1100 / (1100 + 7 * 200))
    # three layers read all, the others 150 visual tokens
    assert shape.bytes_of(3, 150) == (3 * 1100 + 5 * 250) * 2 * 2 * 16 * 4
    # arXiv 2605.17447's setting: 4 focal layers of 28 and 5% at 16k tokens
    assert DecodeShape(visual=16_384, text=1).byte_bound == pytest.approx(5.38, abs=0.01)
    # 205 tokens and 64 groups of 4,096 in every layer; 17 bytes of a token's signs, of 512
    for choose, read in (("summaries", 269), ("signs", 269 + 136)):
        shape = DecodeShape(visual=4096, text=1, choose=choose)
        assert shape.byte_bound == pytest.approx(4097 / (read + 1))


def test_end_to_end_the_weights_are_read_as_well():
    shape = DecodeShape(model="tiny", visual=1000, text=100, keep_visual=0.1)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    weights = 4 * (8 * layer + 64 * 64)
    row = 2 * 2 * 16 * 4
    dense, sparse = weights + 8 * 1100 * row, weights + (1100 + 7 * 200) * row
    assert end_to_end_bound(shape) == pytest.approx(dense / sparse)


def test_the_parts_of_a_prefill_are_disjoint_and_missing_layers_count():
    spans = {
        "vision": 10.0,
        "selection": 5.0,
        "merge": 2.0,
        "language_model": 20.0,
        "last_layer": 4.0,
        "prefill": 40.0,
    }
    found = parts(spans, missing=3)
    assert found == {
        "vision": 10.0,
        "selection": 3.0,
        "merge": 2.0,
        "language_model": 32.0,
        "other": 5.0,
        "prefill": 52.0,
    }


def test_pages_that_were_not_encoded_count_like_those_that_were():
    spans = {"vision": 10.0, "language_model": 20.0, "last_layer": 4.0, "prefill": 31.0}
    found = parts(spans, missing=2, encoded=0.25)
    assert found["vision"] == 40.0 and found["language_model"] == 28.0
    assert found["prefill"] == 31.0 + 30.0 + 8.0 and found["other"] == 1.0


def test_one_encoded_page_stands_for_a_batch(monkeypatch):
    encoded, pruned = [], []
    encode, prune = UnlimitedOcrModel.get_image_features, hooks.prune_pages

    @functools.wraps(encode)
    def _encode(self, pixel_values, *args, **kwargs):
        encoded.append(len(pixel_values))
        return encode(self, pixel_values, *args, **kwargs)

    def _prune(method, pages, *args):
        pruned.append(len(pages))
        return prune(method, pages, *args)

    monkeypatch.setattr(UnlimitedOcrModel, "get_image_features", _encode)
    monkeypatch.setattr(hooks, "prune_pages", _prune)
    monkeypatch.setattr("compress.methods.rtprune.bench.costliest", lambda *_: [])
    monkeypatch.setitem(CLOCKS, "wall", itertools.count().__next__)  # a second a look
    where, ceilings = Bench("cpu", 1), Ceilings(copy=10.0, rate={}, ms={}, shapes={})
    whole, one = (
        next(
            RTPrune.benchmark().run(PrefillShape(batch=2, encoded=pages, **READER), where, ceilings)
        )
        for pages in (None, 1)
    )
    calls = len(encoded) // 2
    assert encoded == [2] * calls + [1] * calls
    # selection, merging and the language model have as much to do
    assert pruned and set(pruned) == {2}
    assert whole["tokens"] == one["tokens"]
    assert whole["timed"] == "7 of 7 layers"
    assert one["timed"] == "7 of 7 layers; vision of 1 page(s), counted for all"
    for way in ("dense", "rtprune"):
        assert whole["stages"][way]["vision"]["median"] == 1e3
        assert one["stages"][way]["vision"]["median"] == 2e3
        assert one["ms"][way]["median"] == whole["ms"][way]["median"] + 1e3


def test_ratios_of_a_prefill_by_hand():
    dense = {"vision": 10.0, "language_model": 80.0, "prefill": 100.0}
    ours = {"language_model": 75.0, "selection": 3.0, "merge": 1.0, "prefill": 99.0}
    stages = {
        name: {part: summarise([ms]) for part, ms in side.items()}
        for name, side in (("dense", dense), ("rtprune", ours))
    }
    found = derived(stages, {"dense": 120, "rtprune": 100})
    assert found["ratio"] == pytest.approx(80 / 75)
    assert found["bound"] == pytest.approx(1.2)
    assert found["share_of_bound"] == pytest.approx(80 / 75 / 1.2)
    assert found["end_to_end"] == pytest.approx(100 / 99)
    assert found["end_to_end_bound"] == pytest.approx(100 / (20 + 80 / 1.2))
    assert found["overhead"] == pytest.approx(4 / 99)


def _measured(visual, ratio, batch=1, device="cpu", part="end_to_end", **shape):
    return {
        "part": part,
        "device": device,
        "clock": "cpu",
        "shape": {"visual": visual, "batch": batch, "model": "tiny", "dtype": "float32"} | shape,
        "ratio": ratio,
        "threads": 1,
        "date": "2026-01-01",
    }


def test_the_crossover_is_where_everything_above_is_faster():
    rows = [
        _measured(256, 1.1),
        _measured(1024, 0.9),
        _measured(4096, 1.2),
        _measured(4096, 0.99, batch=8),
        _measured(16384, 1.5),
        _measured(16384, 1.5, batch=8),
        _measured(65536, 0.5, part="attention"),
        _measured(65536, 0.5, choose="signs"),
        _measured(256, 1.01, device="a GPU"),
        _measured(512, 0.9, device="slow"),
    ]
    found = crossovers(rows)
    assert found["cpu"]["min_visual"] == 16384
    assert found["cpu"]["measured"] == [256, 1024, 4096, 16384]
    assert found["a GPU"]["min_visual"] == 0  # none was slower
    assert found["slow"]["min_visual"] == 513  # beyond it nobody knows


def test_what_was_measured_again_stands_as_it_was_measured_last():
    rows = [
        _measured(256, 0.9),
        _measured(256, 1.1, batch=8),
        _measured(256, 1.2),
        _measured(256, 0.8, device="a GPU"),
    ]
    rows[2]["shape"] |= {"without": None}  # as rows have it since there is such a size
    assert newest(rows) == [rows[2], rows[1], rows[3]]
    assert newest([*rows, rows[0] | {"clock": "wall"}]) == [rows[2], rows[1], rows[3], ANY]
    assert crossovers(rows)["cpu"]["min_visual"] == 0
    assert crossovers(rows[:2])["cpu"]["min_visual"] == 257


def test_a_warning_says_when_macs_fall_and_time_does_not():
    assert warning(1.7, 2.0) is None
    assert "fell less" in warning(1.5, 2.0)
    assert "did not fall" in warning(1.0, 2.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("visual", "such as visual=4096,batch=8"),
        ("visual=1,visual=2", "each key once"),
        ("visual=many", "visual: .*got 'many'"),
        ("visual=0", "visual: .*got '0'"),
        ("visual=99999999999,batch=99999999", "visual: .*less than .*batch: .*less than"),
        ("tokens=5", "tokens is none of part, model, visual"),
        ("model=gpt", "model: .*got 'gpt'"),
    ],
)
def test_a_shape_that_is_none_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_shape(text, DecodeShape)


def test_a_clock_of_the_cpu_is_for_one_thread(monkeypatch):
    assert Bench("cpu", 3, "cpu").now() >= 0
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match="OMP_NUM_THREADS=1"):
        Bench("cpu", 3, "cpu")


@pytest.mark.parametrize(
    ("name", "shapes", "ways"),
    [
        # in the layout that the contract of methods leaves out
        pytest.param(
            "gradflow",
            ["model=ddpm-digits,layout=channels_last"],
            [{"dense", "slim"}],
            marks=pytest.mark.slow,
        ),
        (
            "fastocr",
            [
                "model=tiny,visual=64,text=8",
                "model=tiny,visual=65,text=8,without=sdpa,choose=signs",
                "part=end_to_end,model=tiny,visual=64,layers=4",
                "part=end_to_end,model=tiny,visual=65,layers=4,without=sdpa",
            ],
            [
                {"sdpa", "matmul", "fastocr"},
                {"matmul", "fastocr"},
                {*END_TO_END, "sdpa", "sdpa, dynamic cache"},
                END_TO_END,
            ],
        ),
        (
            "kernels",
            [
                "model=tiny,visual=64,text=8",
                "kernel=focal_decode,model=tiny,visual=64,text=8",
                "kernel=summaries,model=tiny,visual=64,text=8",
                "kernel=sinkhorn,visual=10,keep=0.8,batch=2",
            ],
            [
                *[{"torch", "sdpa", "matmul"}] * 2,
                {"torch", "from_all"},
                {"torch", "pot", "pot_numpy"},
            ],
        ),
    ],
)
def test_a_command_times_every_way_and_appends_rows(name, shapes, ways, tmp_path):
    results = tmp_path / "bench.jsonl"
    asked = ["bench", name, "--repeats", "1", "--device", "cpu", "--results", str(results)]
    for shape in shapes:
        asked += ["--shape", shape]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0, found.output
    table = tmp_path / "crossover.json"
    table.write_text("mine")
    for wrong in ("--results", "--crossover"):
        refused = CliRunner().invoke(app, [*asked, wrong, str(table)])
        assert refused.exit_code == 2 and table.read_text() == "mine"
        assert str(table) in refused.output or name != "fastocr"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["part"] for row in rows[:2]] == ["copy", "matrix"]
    assert all(set(row) >= COMMON and row["bench"] == name for row in rows)
    for row, expected in zip(rows[2:], ways, strict=True):
        assert set(row["ms"]) == expected
        assert row["share_of_bound"] == pytest.approx(row["ratio"] / row["bound"])
        assert row["versions"]["torch"] and row["device"] == "cpu"
    table = body(benchmarks()[name], [*rows, *rows])
    assert table.count("\n| cpu") == len(ways)  # each cell once, however often it was measured
    # a dash where a way was left out, and why
    assert ("A dash" in table) == any("without" in shape for shape in shapes)
    assert table.count("| – |") == sum({"fastocr", "sdpa"} & timed == {"fastocr"} for timed in ways)


def test_the_kernels_rows_say_what_a_call_must_move():
    where, ceilings = Bench("cpu", 1), Ceilings(copy=10.0, rate={}, ms={}, shapes={})
    sparse, focal, means, chosen, transport = (
        next(kernels.run(shape, where, ceilings))
        for shape in (
            kernels.KernelShape(model="tiny", visual=60, text=8, batch=3, keep=0.1),
            kernels.KernelShape(kernel="focal_decode", model="tiny", visual=60, text=8, batch=3),
            kernels.KernelShape(kernel="summaries", model="tiny", visual=60, batch=3, keep=0.1),
            kernels.KernelShape(kernel="top_rows", visual=60, batch=3, keep=0.1),
            kernels.KernelShape(kernel="sinkhorn", visual=10, keep=0.8, batch=3),
        )
    )
    # 2 key heads of 16 numbers; 4 query heads and as much output; an index a listed row
    row, own = 2 * 2 * 16 * 4, 2 * 4 * 16 * 4
    whole = 3 * (68 * row + own)
    assert sparse["bytes"] == {
        "torch": 3 * ((6 + 8) * row + own + 6 * 4),
        "sdpa": whole,
        "matmul": whole,
    }
    assert focal["bytes"]["torch"] == whole + 3 * 68 * 4 and focal["bound"] < 1 < sparse["bound"]
    assert transport["bytes"]["torch"] == 3 * 8 * 2 * 8 and transport["bound"] == 1
    # 6 tokens with their groups, sums and sizes of 64 groups, as many means and biases; the index
    summed = 64 * 4 * (2 * 16 + 1)
    assert means["bytes"] == {
        "torch": 3 * (2 * (6 * (2 * 16 * 4 + 8) + 2 * summed) + 6 * 12),
        "from_all": 3 * 2 * 60 * (2 * 16 * 4 + 8),
    }
    # a row and a weight of each token; two numbers of each that is chosen
    assert chosen["bytes"] == dict.fromkeys(["torch", "topk"], 3 * (60 * 8 + 6 * 12))
    for found in (sparse, focal, means, chosen, transport):
        assert found["ours"] == "torch" and found["best"] not in ("torch", "triton")
        assert (
            found["ratio"]
            == found["ms"][found["best"]]["median"] / (found["ms"]["torch"]["median"])
        )
        for way, share in found["share_of_copy"].items():
            speed = found["bytes"][way] / found["ms"][way]["median"] / 1e6
            assert share == pytest.approx(speed / 10)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ddpm-cifar10", "sd15"])
def test_the_default_shapes_have_legal_widths(model):
    # the groups of the first are found by a real pass, those of the second are read off
    with torch.device("cpu" if model == "ddpm-cifar10" else "meta"):
        dense = DENSE[model]()
        build = slim_builder(dense, UNetShape().keep_macs)
    with torch.device("meta"):
        slim = build()
    assert type(slim) is type(dense)
    assert 0.54 <= unet_cost(slim).macs / unet_cost(dense).macs <= 0.57


def test_noise_is_drawn_for_images_and_prompts():
    with torch.device("meta"):
        unet = DENSE["sd15"]()
    found = random_inputs(unet, 2, torch.bfloat16, "cpu")
    assert found["timestep"].dtype == torch.long and found["timestep"].shape == (2,)
    for name, shape in (("sample", (2, 4, 64, 64)), ("encoder_hidden_states", (2, 77, 768))):
        assert found[name].shape == shape and found[name].dtype == torch.bfloat16
        assert 0.9 < found[name].float().std() < 1.1


def test_the_profiler_is_silent(capfd):
    [first, *_] = costliest(lambda: torch.ones(3) + 1, "cpu")
    assert first["operator"].startswith("aten::") and capfd.readouterr() == ("", "")


def test_a_benchmark_that_does_not_exist_is_refused():
    refused = CliRunner().invoke(app, ["bench", "sleep"])
    assert refused.exit_code == 2 and ", ".join(all_benchmarks()) in refused.stderr
