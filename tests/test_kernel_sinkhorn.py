"""The Sinkhorn kernel: interpreted on the CPU, compiled for GPUs without one, run on one."""

from importlib.util import find_spec

import pytest
import torch
from ot.bregman import sinkhorn_log
from safetensors.torch import load_file, save_file

from builders import programs

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

SIZES = [(1, 1), (3, 7), (19, 5), (1, 9)]


def _problems(sizes):
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.tensor(sizes).unbind(1)
    scores = torch.rand(len(sizes), rows.max(), columns.max(), generator=generator) * 2 - 1
    for page, (m, p) in zip(scores, sizes, strict=True):
        page[m:] = page[:, p:] = torch.nan  # what a problem does not use must not be read
    return scores, rows, columns


def _by_pot(scores, rows, columns, dustbin=0.2, iterations=100):
    """Of each problem on its own, in float64."""
    plans = []
    for page, m, p in zip(scores.double(), rows.tolist(), columns.tolist(), strict=True):
        cost = torch.full((m + 1, p + 1), -dustbin, dtype=torch.double)
        cost[:m, :p] = -page[:m, :p]
        a, b = torch.ones(m + 1).double(), torch.ones(p + 1).double()
        a[m], b[p] = p, m
        a, b = a / (m + p), b / (m + p)
        plan = sinkhorn_log(a, b, cost, 1.0, numItermax=iterations, stopThr=0, warn=False)
        plans.append(plan[:m, :p] * (m + p))
    return plans


def _check(plan, expected, rows, columns):
    for got, wanted, m, p in zip(plan, expected, rows, columns, strict=True):
        torch.testing.assert_close(got[:m, :p].double(), wanted, rtol=1e-4, atol=0)
        assert got[m:].eq(0).all() and got[:, p:].eq(0).all()


def test_the_reference_is_pot():
    from compress.kernels.sinkhorn import sinkhorn_reference

    scores, rows, columns = _problems(SIZES)
    plan = sinkhorn_reference(scores, rows, columns, 0.2, 100)
    _check(plan, _by_pot(scores, rows, columns), rows, columns)


def test_interpreted_it_is_the_reference(tmp_path):
    from compress.kernels.sinkhorn import sinkhorn_reference

    scores, rows, columns = _problems(SIZES)
    given, made = tmp_path / "given", tmp_path / "made"
    save_file({"scores": scores, "rows": rows.clone(), "columns": columns.clone()}, given)
    programs.run("interpret_sinkhorn", given, made, TRITON_INTERPRET="1")
    reference = sinkhorn_reference(scores, rows, columns, 0.2, 10).double()
    expected = [
        plan[:m, :p] for plan, m, p in zip(reference, rows.tolist(), columns.tolist(), strict=True)
    ]
    for plan in load_file(made).values():  # of one tile, and of several
        _check(plan, expected, rows, columns)


@pytest.mark.parametrize(
    "cases",
    [
        ["90:340:60"],
        pytest.param(["80:340:60", "90:1000:156", "90:9:2000"], marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_it_compiles_without_a_gpu_and_exchanges_only_sums(cases, tmp_path):
    variables = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    printed = programs.run("compile_sinkhorn", *cases, **variables).stdout
    made = [line.split() for line in printed.splitlines()]
    assert [capability for capability, *_ in made] == [case[:2] for case in cases]
    for _, size, shared, registers, spilled in made:
        assert int(size) > 0 and int(shared) <= 2**14  # a tile would take 128 KiB
        assert int(registers) <= 255 and int(spilled) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [SIZES, [(340, 60)] * 16, [(336, 64)], [(1000, 156), (57, 1099)]])
def test_on_a_gpu_it_is_pot(sizes):
    from compress.kernels.sinkhorn import sinkhorn

    scores, rows, columns = _problems(sizes)
    plan = sinkhorn(scores.cuda(), rows.cuda(), columns.cuda(), 0.2, 100).cpu()
    _check(plan, _by_pot(scores, rows, columns), rows, columns)


def test_errors_name_what_is_expected():
    from compress.kernels.sinkhorn import LARGEST, sinkhorn

    scores, rows, columns = _problems([(3, 2), (2, 2)])
    with pytest.raises(ValueError, match=r"float32 scores.*float16 \(2, 3, 2\)"):
        sinkhorn(scores.half(), rows, columns, 0.2, 100)
    with pytest.raises(ValueError, match="iterations=0"):
        sinkhorn(scores, rows, columns, 0.2, 0)
    with pytest.raises(ValueError, match=r"2 problems; got \(1,\) and \(2,\)"):
        sinkhorn(scores, rows[:1], columns, 0.2, 100)
    with pytest.raises(ValueError, match=f"at most {LARGEST} columns"):
        sinkhorn(torch.zeros(1, 1, LARGEST + 1), rows[:1], columns[:1], 0.2, 100)
