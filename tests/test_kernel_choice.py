"""The kernels that open groups and score by signs, and attention to rows of each key head."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from builders import choice as cases
from builders import programs
from compress.kernels import choice, signs, sparse_decode

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


def _check_scores(shape, dtype, found, tolerances=TOLERANCES):
    """Those of the keys that the signs stand for."""
    given, keys = cases.draw_signs(shape, dtype)
    query = given["query"].double().unflatten(1, (shape.kv_heads, -1))[:, :, :, 0]
    expected = (query @ keys.transpose(2, 3) * 0.2).logsumexp(2).float()
    # sums of up to 128 products near 1, where a tolerance is of one
    torch.testing.assert_close(found.cpu(), expected, atol=4 * tolerances[dtype], rtol=2e-3)


@pytest.mark.parametrize("shape", cases.SMALL, ids=str)
def test_signs_score_as_the_keys_that_they_stand_for(shape):
    for dtype in (torch.float32, torch.bfloat16):
        found = signs.sign_scores_reference(**cases.draw_signs(shape, dtype)[0])
        _check_scores(shape, dtype, found)


def test_flags_are_packed_with_the_first_as_the_lowest_bit():
    flags = torch.rand(3, 5, 11, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = np.packbits(flags.numpy(), axis=-1, bitorder="little")
    assert signs.pack(flags).numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("counts", [(40, 40), (40, 23, 0)], ids=str)
def test_signs_choose_the_best_tokens_one_by_one(counts):
    from compress.methods.fastocr.attention import choose_rows
    from compress.methods.fastocr.choosing import SummaryPolicy
    from compress.methods.fastocr.visual_tokens import VisualTokens
    from compress.models.visual import VisualLayout

    layouts = [
        VisualLayout(torch.arange(count), torch.zeros(count, 3).long(), torch.zeros(count).long())
        for count in counts
    ]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(len(counts), 4, 1, 20, generator=generator)
    cache = torch.randn(len(counts), 2, 43, 20, generator=generator)
    cache[:, :, 7] = cache[:, :, 3]  # equally good
    tokens = VisualTokens.of(layouts, 43, torch.device("cpu"))
    policy = SummaryPolicy(tokens, keep=0.3, groups=4, by_signs=True)
    index = policy.index(0, cache, cache)
    rows, bias = choose_rows(query, index, policy.budgets, max(policy.kept), 0.2)
    for b, kv in np.ndindex(len(counts), 2):
        first, own = index.first[b, kv].tolist(), index.order[b, kv, : counts[b]].tolist()
        group = {row: sum(n >= start for start in first) - 1 for n, row in enumerate(own)}
        # an empty group begins where the next one does
        means = {g: cache[b, kv, [r for r in own if group[r] == g]].mean(0) for g in group.values()}
        beyond = {row: cache[b, kv, row] - means[group[row]] for row in own}
        scale = torch.stack([part.abs() for part in beyond.values()]).mean(0) if own else 0
        scores = {
            row: (
                query[b, 2 * kv : 2 * kv + 2, 0] @ (means[group[row]] + scale * part.sign()) * 0.2
            )
            .logsumexp(0)
            .item()
            for row, part in beyond.items()
        }
        best = sorted(own, key=lambda row: -round(scores[row], 5))[: policy.kept[b]]
        assert sorted(rows[b, kv, : policy.kept[b]].tolist()) == sorted(best)
        left = [sum(group[row] == g for row in own if row not in best) for g in range(4)]
        assert bias[b, kv].exp().round().tolist() == left
    # a token's signs take 3 bytes and its group 1, its key and value of 16 bits 80
    coded = sum(-(-count * 4 // 80) for count in counts)
    groups = (index.sizes > 0).sum(2).amax(1).sum()
    assert int(index.read) == sum(policy.kept) + groups + coded


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    file = tmp_path_factory.mktemp("interpreted") / "outputs"
    programs.run("interpret_choice", file, TRITON_INTERPRET="1")
    return load_file(file)


@TRITON
@pytest.mark.parametrize("dtype, number", cases.INTERPRETED, ids=str)
def test_interpreted_it_opens_the_best_groups(interpreted, number, dtype):
    name, shape = f"{dtype} {number}", cases.SMALL[number]
    _check(shape, dtype, interpreted[f"{name} rows"], interpreted[f"{name} bias"])
    _check_attended(shape, dtype, interpreted[f"{name} attended"])
    _check_scores(shape, dtype, interpreted[f"{name} scores"])


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
    assert len(made) == len(capabilities) * len(sizes) * 2
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
    given = {
        name: part.cuda() if isinstance(part, torch.Tensor) else part
        for name, part in cases.draw_signs(shape, dtype)[0].items()
    }
    _check_scores(shape, dtype, signs.sign_scores(**given), ON_GPU)


@pytest.mark.gpu
@TRITON
@pytest.mark.parametrize("by_signs", [False, True])
def test_a_step_that_chooses_is_captured_without_waiting(by_signs):
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
    state = DecodeState(tokens, SummaryPolicy(tokens, keep=0.1, by_signs=by_signs), Counts(2))
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
