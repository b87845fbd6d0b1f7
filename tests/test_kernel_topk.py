"""The kernel that chooses the highest weights, as the other kernels."""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from builders import programs
from builders import topk as cases
from compress.kernels import topk

TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("shape", cases.SMALL, ids=str)
def test_the_reference_chooses_the_highest_and_of_equal_ones_the_first(shape, kind):
    index, rows = cases.lists(shape)
    topk.top_rows_reference(*cases.draw(shape, kind), index, rows)
    assert not cases.differences(shape, kind, index, rows)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    file = tmp_path_factory.mktemp("interpreted") / "outputs"
    programs.run("interpret_topk", file, TRITON_INTERPRET="1")
    return load_file(file)


@TRITON
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("number", range(len(cases.SMALL)))
def test_interpreted_it_chooses_the_same(interpreted, number, kind):
    name = f"{kind} {number}"
    found = interpreted[f"{name} index"], interpreted[f"{name} rows"]
    assert not cases.differences(cases.SMALL[number], kind, *found)


@TRITON
@pytest.mark.parametrize(
    "capabilities, sizes",
    [
        (["90"], [16384]),
        pytest.param(["80", "90"], [1000, 4096, 32768], marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_it_compiles_without_a_gpu_and_spills_nothing(capabilities, sizes, tmp_path):
    variables = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    printed = programs.run("compile_topk", ",".join(capabilities), *sizes, **variables).stdout
    made = [line.split(",") for line in printed.splitlines()]
    assert len(made) == len(capabilities) * len(sizes)
    assert all(int(size) > 0 and int(spilled) == 0 for _, _, size, _, spilled in made)


def test_more_tokens_than_fit_into_a_program_are_left_to_torch():
    few, many = torch.empty(1, topk.LARGEST), torch.empty(1, topk.LARGEST + 1)
    assert topk.why_unsupported(few) is None
    assert "32768 tokens fit" in topk.why_unsupported(many)


@pytest.mark.gpu
@TRITON
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("shape", cases.LARGE, ids=str)
def test_on_a_gpu_it_chooses_the_same(shape, kind):
    for choose in (topk.top_rows, topk.top_rows_reference):
        index, rows = cases.lists(shape, "cuda")
        choose(*cases.draw(shape, kind, "cuda"), index, rows)
        assert not cases.differences(shape, kind, index.cpu(), rows.cpu())


@pytest.mark.gpu
@TRITON
def test_its_choice_is_captured_without_waiting():
    shape = cases.LARGE[0]
    given, (index, rows) = cases.draw(shape, "distinct", "cuda"), cases.lists(shape, "cuda")
    topk.top_rows(*given, index, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        topk.top_rows(*given, index, rows)
    drawn = given[0].clone()
    given[0].zero_()
    graph.replay()
    assert index[0].tolist() == list(range(820))
    given[0].copy_(drawn)
    graph.replay()
    assert not cases.differences(shape, "distinct", index.cpu(), rows.cpu())
