"""The benchmark runs what it says: counted work and bounds, never times."""

import json

import pytest
from typer.testing import CliRunner

from compress.bench import DecodeShape, decode_attention
from compress.cli import app


def test_the_byte_bound_is_what_must_be_read():
    shape = DecodeShape(1000, text=100, layers=7, keep_visual=0.1)
    assert shape.focal == 1
    assert shape.byte_bound == pytest.approx(7 * 1100 / (1100 + 6 * 200))
    # arXiv 2605.17447's setting: 4 focal layers of 28 and 5% at 16k tokens
    assert DecodeShape(16_384, text=0).byte_bound == pytest.approx(5.38, abs=0.01)


def test_a_row_has_every_way_and_where_it_was_measured():
    shape = DecodeShape(64, text=8, layers=8, heads=4, kv_heads=2, dim=16)
    [row] = decode_attention([shape], repeats=6, device="cpu")
    assert set(row["ms"]) == {"sdpa", "matmul", "fastocr"}
    for way in row["ms"].values():
        assert 0 < way["p20"] <= way["median"] <= way["p80"] and way["n"] == 6
    dense = min(row["ms"]["sdpa"]["median"], row["ms"]["matmul"]["median"])
    assert row["speedup"] == pytest.approx(dense / row["ms"]["fastocr"]["median"])
    assert row["share_of_bound"] == pytest.approx(row["speedup"] / row["byte_bound"])
    assert row["device"] == "cpu" and row["versions"]["torch"]


def test_the_command_appends_rows(tmp_path, monkeypatch):
    from compress import bench

    small = DecodeShape(16, text=4, layers=8, heads=4, kv_heads=2, dim=16)
    monkeypatch.setattr(bench, "DecodeShape", lambda tokens, batch, dtype: small)
    results = tmp_path / "bench.jsonl"
    asked = ["bench", "fastocr", "--tokens", "16", "--repeats", "6", "--device", "cpu"]
    found = CliRunner().invoke(app, [*asked, "--results", str(results)])
    assert found.exit_code == 0, found.output
    assert "speed-up" in found.stdout
    assert json.loads(results.read_text())["shape"]["visual"] == 16
    for wrong, said in (
        (["bench", "sleep"], "no other"),
        ([*asked[:2], "--tokens", "a"], "numbers"),
    ):
        refused = CliRunner().invoke(app, wrong)
        assert refused.exit_code == 2 and said in refused.stderr
