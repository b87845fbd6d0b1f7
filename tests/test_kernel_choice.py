"""The kernel that opens groups, and attention to rows of each key head, as the other kernels."""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from builders import choice as cases
from builders import programs
from compress.kernels import choice, sparse_decode

TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
ON_GPU = TOLERANCES | {torch.float32: 1e-5}  # exp2 is ex2.approx there


def _check(shape, dtype, rows, bias):
    """Groups in the order of their scores, which are far enough apart, token by token."""
    given, _ = cases.draw(shape, dtype)
    group = shape.heads // shape.kv_heads
    rows, left = rows.cpu(), bias.cpu().exp()
    for b, budget in enumerate(shape.budgets):
        for kv in range(shape.kv_heads):
            queries = given["query"][b, kv * group : (kv + 1) * group, 0].double()
            scores = (queries @ given["keys"][b, kv].double().T * 0.2).logsumexp(0).tolist()
            sizes = given["sizes"][b, kv].tolist()
            order = sorted(range(shape.groups), key=lambda g: (-scores[g], g))
            expected, remaining = [], [0] * shape.groups
            for g in order:
                first = int(given["first"][b, kv, g])
                own = given["order"][b, kv, first : first + sizes[g]].tolist()
                opened = own[: budget - len(expected)]
                expected += opened
                remaining[g] = len(own) - len(opened)
            assert rows[b, kv, :budget].tolist() == expected
            torch.testing.assert_close(left[b, kv], torch.tensor(remaining).float())


def _check_attended(shape, dtype, result, tolerances=TOLERANCES):
    given, cache = cases.draw(shape, torch.float32)
    half, half_cache = cases.draw(shape, dtype)
    wide = {name: half[name].float() for name in ("query", "keys")}
    cache = tuple(part.float() for part in half_cache)
    opened = choice.choose_rows_reference(**half)
    reference = sparse_decode.sparse_decode_reference
    expected = cases.attend({**given, **wide}, cache, opened, reference)
    atol = tolerances[dtype]
    torch.testing.assert_close(result.cpu().float(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("shape", cases.SMALL, ids=str)
def test_the_reference_opens_the_best_groups(shape):
    given, cache = cases.draw(shape, torch.float32)
    rows, bias = choice.choose_rows_reference(**given)
    _check(shape, torch.float32, rows, bias)
    # a list of each key head is as many lists
    result = cases.attend(given, cache, (rows, bias), sparse_decode.sparse_decode_reference)
    for kv in range(shape.kv_heads):
        group = slice(kv * shape.heads // shape.kv_heads, (kv + 1) * shape.heads // shape.kv_heads)
        one = {**given, "query": given["query"][:, group], "keys": given["keys"][:, kv, None]}
        own = rows[:, kv, None], bias[:, kv, None]
        parts = tuple(part[:, kv, None] for part in cache)
        alone = cases.attend(one, parts, own, sparse_decode.sparse_decode_reference)
        torch.testing.assert_close(result[:, group], alone, atol=2e-6, rtol=0)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    file = tmp_path_factory.mktemp("interpreted") / "outputs"
    programs.run("interpret_choice", file, TRITON_INTERPRET="1")
    return load_file(file)


@TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("number", range(len(cases.SMALL)))
def test_interpreted_it_opens_the_best_groups(interpreted, number, dtype):
    name, shape = f"{dtype} {number}", cases.SMALL[number]
    _check(shape, dtype, interpreted[f"{name} rows"], interpreted[f"{name} bias"])
    _check_attended(shape, dtype, interpreted[f"{name} attended"])


@TRITON
@pytest.mark.parametrize(
    "capabilities, sizes",
    [
        (["90"], ["fp16:128:64"]),
        pytest.param(
            ["80", "90"],
            [f"{t}:{d}:{g}" for t in ("bf16", "fp32") for d in (80, 256) for g in (18, 256)],
            marks=pytest.mark.slow,
        ),
    ],
    ids=len,
)
def test_it_compiles_without_a_gpu(capabilities, sizes, tmp_path):
    variables = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    printed = programs.run("compile_choice", ",".join(capabilities), *sizes, **variables).stdout
    made = [line.split(",") for line in printed.splitlines()]
    assert len(made) == len(capabilities) * len(sizes)
    assert all(int(size) > 0 and int(shared) <= 99 * 1024 for _, _, size, shared in made)


@pytest.mark.gpu
@TRITON
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", cases.LARGE, ids=str)
def test_on_a_gpu_it_opens_the_best_groups(shape, dtype):
    given, cache = cases.draw(shape, dtype)
    given = {
        name: part.cuda() if isinstance(part, torch.Tensor) else part
        for name, part in given.items()
    }
    opened = choice.choose_rows(**given)
    _check(shape, dtype, *opened)
    cache = tuple(part.cuda() for part in cache)
    result = cases.attend(given, cache, opened, sparse_decode.sparse_decode)
    _check_attended(shape, dtype, result, ON_GPU)


@pytest.mark.gpu
@TRITON
def test_a_step_that_chooses_is_captured_without_waiting():
    from compress.methods.fastocr.choosing import SummaryPolicy
    from compress.methods.fastocr.state import Counts, DecodeState
    from compress.methods.fastocr.visual_tokens import VisualTokens
    from compress.models.visual import VisualLayout

    visual, length = 500, 520
    layouts = [
        VisualLayout(torch.arange(count), torch.zeros(count, 3).long(), torch.zeros(count).long())
        for count in (visual, visual - 100)
    ]
    tokens = VisualTokens.of(layouts, length, torch.device("cuda"))
    state = DecodeState(tokens, SummaryPolicy(tokens, keep=0.1), Counts(2))
    query = torch.randn(2, 8, 1, 64, device="cuda")
    cache = torch.randn(2, 2, length + 8, 64, device="cuda")

    def step():
        state.start_step()
        return torch.stack([state.attend(n, query, cache, cache, None, 0.1) for n in range(2)])

    with torch.no_grad():
        for _ in range(3):  # one compiles, and one makes its counts' numbers
            state.length = length + 7  # so that every step reads as many rows
            expected = step()
        state.length -= 1
        graph = torch.cuda.CUDAGraph()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.graph(graph):
                found = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph.replay()
    torch.testing.assert_close(found, expected)
