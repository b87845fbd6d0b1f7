"""Decode kernels: interpreted on the CPU, compiled for GPUs without one, run on one.

The oracle is softmax attention over the whole cache in float64 with -inf on what is not read.
"""

import itertools
import math
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from builders import decode, programs
from builders.counting import Counted
from builders.decode import DTYPES, INTERPRETED, INTERPRETED_SLOWLY, LARGE, SMALL, Shape
from builders.tiers import few
from compress.kernels import sparse_decode as kernels
from compress.kernels import summaries

TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
# Of outputs, which are of the size of 1, and of weights. Half precision rounds outputs, and the
# weights before the second product. The kernels keep logits in float32, plain torch rounds them.
KERNEL = {torch.float32: (2e-6, 1e-6), torch.float16: (2e-3, 1e-6), torch.bfloat16: (3e-2, 1e-6)}
# a GPU's exp2 (ex2.approx) and its order of sums lose two bits more
ON_GPU = KERNEL | {torch.float32: (1e-5, 1e-6)}
PLAIN = {torch.float32: (2e-6, 1e-6), torch.float16: (4e-3, 1e-3), torch.bfloat16: (4e-2, 1e-2)}


def _oracle(case, seen):
    """Attention with -inf where nothing is seen, and its mean over the heads, in float64."""
    query, key, value = (case[name].double() for name in ("query", "key", "value"))
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, 1) for part in (key, value))
    logits = (query @ key.transpose(2, 3)) * 0.2
    weights = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return weights @ value, weights.mean((1, 2))


def _check_beside(shape, dtype, result, tolerances=KERNEL):
    """As if the rows beside the cache were in it, their biases added."""
    case = decode.draw(shape, dtype)
    keys, values, bias = decode.beside(case)
    group = shape.heads // shape.kv_heads
    query, key, value, keys, values = (
        part.cpu().double()
        for part in (*(case[name] for name in ("query", "key", "value")), keys, values)
    )
    key, value = torch.cat([key, keys], 2), torch.cat([value, values], 2)
    seen = decode.listed(case)[:, None].expand(-1, shape.kv_heads, -1)
    added = torch.zeros(seen.shape).double().masked_fill(~seen, -torch.inf)
    added = torch.cat([added, bias.double()], 2)
    key, value, added = (part.repeat_interleave(group, 1) for part in (key, value, added))
    weights = ((query @ key.transpose(2, 3)) * 0.2 + added[:, :, None]).softmax(-1)
    assert result.dtype == dtype
    atol = 2 * tolerances[dtype][0]
    torch.testing.assert_close(result.cpu().double(), weights @ value, atol=atol, rtol=0)


def _check_means(shape, dtype, means, tolerances=KERNEL):
    """Group by group, of the tokens that are not in the fixation."""
    case = decode.draw(shape, dtype)
    given = decode.grouped(case)
    keys, values, bias = (part.cpu().double() for part in means)
    for b, h in itertools.product(range(shape.batch), range(shape.kv_heads)):
        kept = case["rows"][b][case["rows_mask"][b]].tolist()
        for g in range(decode.GROUPS):
            tokens = (given["member"][b, h] == g).nonzero()[:, 0].tolist()
            tokens = [token for token in tokens if token not in kept]
            assert bias[b, h, g] == pytest.approx(math.log(len(tokens)) if tokens else -math.inf)
            for part, mean in ((case["key"], keys), (case["value"], values)):
                if tokens:
                    expected = part[b, h, tokens].double().mean(0)
                    atol = 2 * tolerances[dtype][0]
                    torch.testing.assert_close(mean[b, h, g], expected, atol=atol, rtol=0)


def _check(case, dtype, sparse, focal, weights, tolerances):
    atol, weights_atol = tolerances[dtype]
    expected, _ = _oracle(case, decode.listed(case))
    assert sparse.dtype == focal.dtype == dtype and weights.dtype == torch.float32
    torch.testing.assert_close(sparse.cpu().double(), expected, atol=atol, rtol=0)
    expected, lies = _oracle(case, case["mask"][:, 0, 0])
    torch.testing.assert_close(focal.cpu().double(), expected, atol=atol, rtol=0)
    torch.testing.assert_close(weights.cpu().double(), lies, atol=weights_atol, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_the_references_are_attention_with_minus_infinity(shape, dtype):
    case = decode.draw(shape, dtype)
    sparse = decode.sparse(case, kernels.sparse_decode_reference)
    focal, weights = decode.focal(case, kernels.focal_decode_reference)
    _check(case, dtype, sparse, focal, weights, PLAIN)
    if dtype == torch.float32:
        own = decode.beside(case)
        _check_beside(shape, dtype, decode.sparse(case, kernels.sparse_decode_reference, own))
    _check_means(shape, dtype, summaries.summaries_reference(**decode.grouped(case)))


# ---- interpreted ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory, request):
    file = tmp_path_factory.mktemp("interpreted") / "outputs"
    items = [item for item in request.session.items if item.path == request.path]
    name = "test_interpreted_they_are_attention_with_minus_infinity"
    asked = [item.callspec.indices["dtype"] for item in items if item.originalname == name]
    programs.run("interpret_decode", file, *map(str, sorted(asked)), TRITON_INTERPRET="1")
    return load_file(file)


@TRITON
@pytest.mark.parametrize(
    "splits, dtype, number", few([*INTERPRETED, *INTERPRETED_SLOWLY], *INTERPRETED), ids=str
)
def test_interpreted_they_are_attention_with_minus_infinity(interpreted, splits, dtype, number):
    result = [
        interpreted[f"{splits} {dtype} {number} {what}"] for what in ("sparse", "focal", "weights")
    ]
    _check(decode.draw(SMALL[number], dtype), dtype, *result, KERNEL)
    _check_beside(SMALL[number], dtype, interpreted[f"{splits} {dtype} {number} beside"])
    means = [interpreted[f"{splits} {dtype} {number} means {place}"] for place in range(3)]
    _check_means(SMALL[number], dtype, means)


@TRITON
def test_interpreted_lists_may_have_gaps_and_one_mask_serves_all_sequences(interpreted):
    given = decode.draw(SMALL[0], torch.float32)
    case = given | {"mask": given["mask"][:1].expand(2, -1, -1, -1)}
    sparse, focal, weights = (
        interpreted[f"spaced {what}"] for what in ("sparse", "focal", "weights")
    )
    _check(case, torch.float32, sparse, focal, weights, KERNEL)


@TRITON
@pytest.mark.slow
def test_fastocr_decodes_with_interpreted_kernels():
    """As these tests want it, slowly too: every family, padding, caches, knobs, summaries."""
    variables = {"TRITON_INTERPRET": "1", "COMPRESS_KERNELS": "triton"}
    names = ("test_fastocr.py", "test_fastocr_periphery.py")
    # the kernels take no added mask; the interpreter multiplies bfloat16 by its bits, and serves
    # one thread
    chosen = "not added and not bfloat16 and not half_precision and not two_threads"
    arguments = "run_tests", *names, "-m", "not gpu", "-k", chosen
    run = programs.run(*arguments, cwd=programs.TESTS, timeout=3600, **variables)
    assert " passed" in run.stdout, run.stdout


# ---- compiled ------------------------------------------------------------------------------------


@TRITON
@pytest.mark.parametrize(
    "capabilities, cases",
    [
        (["90"], ["bf16:80:1"]),
        pytest.param(
            ["80", "90"],
            [
                f"{dtype}:{dim}:{place}"
                for dtype, size in (("fp16", 2), ("bf16", 2), ("fp32", 4))
                for dim in (64, 96, 128, 256)
                for place in range(len(kernels.TILES[size, kernels.block(dim)]))
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=len,
)
def test_they_compile_without_a_gpu(capabilities, cases, tmp_path):
    variables = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    printed = programs.run("compile_decode", ",".join(capabilities), *cases, **variables).stdout
    made = [line.split(",") for line in printed.splitlines()]
    expected = [(capability, case.split(":")[0]) for capability in capabilities for case in cases]
    assert [(capability, dtype) for capability, dtype, *_ in made[::5]] == expected
    assert len(made) == 5 * len(expected)
    for capability, _, *numbers in made:
        at_once, resident, size, shared, _, spilled = map(int, numbers)
        assert size > 0 and shared <= 99 * 1024  # of the smallest such GPU
        assert spilled == 0
        if capability == "90":
            assert at_once <= resident


# ---- splits --------------------------------------------------------------------------------------

H100 = 132  # multiprocessors


def _filled(problems, splits):
    """Share of the multiprocessors' rounds that have a program."""
    programs = problems * splits
    return programs / (H100 * -(-programs // H100))


@pytest.mark.parametrize(
    "problems, read, least",
    [
        (80, 1076, 0.9),  # 4 key heads, batch 20, 16k tokens: one split fills 61%
        (67, 1076, 0.85),
        (100, 1076, 0.75),
        (131, 1076, 0.9),
        (80, 16640, 0.9),
        (4, 1076, 0.5),  # batch 1, and of a focal layer
        (4, 16640, 0.9),
        (2, 16640, 0.85),
    ],
)
def test_splits_fill_the_gpu(problems, read, least):
    tile, splits = kernels.tile_and_splits(problems, read, 2, 128, H100)
    assert _filled(problems, splits) >= least
    assert splits <= min(kernels.MOST_SPLITS, -(-read // tile.rows) + 1)


def test_the_busiest_multiprocessor_reads_less_than_one_split_has():
    tile, splits = kernels.tile_and_splits(80, 1076, 2, 128, H100)
    rows = -(-1076 // (splits * tile.rows)) * tile.rows
    assert -(-80 * splits // H100) * rows <= 0.75 * 1076


def test_what_fills_the_gpu_alone_is_not_split():
    for problems in (128, 132, 256, 1024):
        assert kernels.tile_and_splits(problems, 1076, 2, 128, H100)[1] == 1
    assert kernels.tile_and_splits(1, 0, 2, 128, H100)[1] == 1


def test_a_growing_answer_keeps_its_splits():
    chosen = {kernels.tile_and_splits(8, 461 + step, 2, 128, H100) for step in range(50)}
    assert len(chosen) == 1


# ---- the host ------------------------------------------------------------------------------------


class _NoKernel:
    """In place of a kernel of Triton: notes its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((grid, args, constants))


def test_a_call_is_checked_and_planned_once(monkeypatch):
    read, merge = _NoKernel(), _NoKernel()
    monkeypatch.setattr(kernels, "_read_kernel", read)
    monkeypatch.setattr(kernels, "_merge_kernel", merge)
    kernels._launch.cache_clear()
    case = decode.draw(LARGE[0], torch.bfloat16)
    planned = kernels._launch.cache_info().misses
    for _ in range(3):
        decode.sparse(case, kernels.sparse_decode)
        decode.focal(case, kernels.focal_decode)
    assert kernels._launch.cache_info().misses == planned + 2
    assert len(read.launches) == 6 and len(merge.launches) == 3  # a focal layer's weights
    arguments = (*(case[name] for name in ("query", "key", "value", "rows")), None, (0, 9), None)
    with Counted() as counted:
        kernels.sparse_decode(*arguments, 0.2)
    assert counted.operators == {"new_empty_strided": 1}  # nothing is computed or copied


# ---- on a GPU ------------------------------------------------------------------------------------


def _on_gpu(case):
    return {
        name: part if name == "dense" else part.cuda() for name, part in case.items()
    }  # strides stay


@pytest.mark.gpu
@TRITON
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_on_a_gpu_they_are_attention_with_minus_infinity(shape, dtype):
    case = decode.draw(shape, dtype)
    sparse = decode.sparse(_on_gpu(decode.hidden(case, decode.listed(case))), kernels.sparse_decode)
    hidden = _on_gpu(decode.hidden(case, case["mask"][:, 0, 0]))
    focal, weights = decode.focal(hidden, kernels.focal_decode)
    _check(case, dtype, sparse, focal, weights, ON_GPU)
    own = tuple(part.cuda() for part in decode.beside(case))
    sparse = decode.sparse(_on_gpu(case), kernels.sparse_decode, own)
    _check_beside(shape, dtype, sparse, ON_GPU)
    given = {
        name: part.cuda() if isinstance(part, torch.Tensor) else part
        for name, part in decode.grouped(case).items()
    }
    given["sums"] = tuple(part.cuda() for part in given["sums"])
    _check_means(shape, dtype, summaries.summaries(**given), ON_GPU)


@pytest.mark.gpu
@TRITON
@pytest.mark.parametrize("capture", [False, True], ids=["eager", "graph"])
def test_a_decode_step_does_not_wait_for_the_gpu(capture):
    from compress.methods.fastocr.policy import FocalPolicy
    from compress.methods.fastocr.state import Counts, DecodeState
    from compress.methods.fastocr.visual_tokens import VisualTokens
    from compress.models.visual import VisualLayout

    layers, visual, length = 4, 500, 520
    grid = torch.stack([torch.zeros(visual), *(torch.arange(visual) // n for n in (25, 1))], 1)
    layout = VisualLayout(torch.arange(visual), grid.long(), torch.zeros(visual).long())
    tokens = VisualTokens.of([layout] * 2, length, torch.device("cuda"))
    policy = FocalPolicy(tokens, layers, keep=0.1, focal=[1])
    state = DecodeState(tokens, policy, Counts(layers))
    query = torch.randn(2, 8, 1, 64, device="cuda")
    cache = torch.randn(2, 2, length + 8, 64, device="cuda")

    def step():
        state.start_step()
        return [state.attend(layer, query, cache, cache, None, 0.1) for layer in range(layers)]

    with torch.no_grad():
        for _ in range(3):  # the dense one, one that compiles, one that makes its counts' numbers
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchronizing"):  # so a wait would show
                query.sum().item()
            if capture:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    outputs = step()
                graph.replay()
            else:
                outputs = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(outputs) == layers and all(part.isfinite().all() for part in outputs)


# ---- the rest ------------------------------------------------------------------------------------


def test_bytes_moved_are_those_of_the_tensors():
    shape = Shape(3, 6, 2, 50, 64, 20, 7, "none", value_dim=80)
    case = decode.draw(shape, torch.float16)
    sizes = {"batch": 3, "heads": 6, "kv_heads": 2, "dim": 64, "value_dim": 80, "itemsize": 2}

    def size(*tensors):
        return sum(part.numel() * part.element_size() for part in tensors)

    output = torch.empty(3, 6, 1, 80, dtype=torch.float16)
    read = [case[name][:, :, : 20 + 7] for name in ("key", "value")]
    listed = size(case["query"], output, *read, case["rows"].int())
    assert kernels.bytes_moved(**sizes, picked=20, dense=7) == listed
    whole = size(case["query"], output, case["key"], case["value"], torch.empty(3, 50))
    assert kernels.bytes_moved(**sizes, picked=0, dense=50, focal=True) == whole


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"query": torch.zeros(2, 3, 1, 64)}, r"heads a multiple of kv_heads.*\(2, 3, 1, 64\)"),
        ({"query": torch.zeros(2, 4, 2, 64)}, "one new token of each sequence"),
        ({"value": torch.zeros(2, 2, 39, 64)}, r"\(2, 2, 39, 64\)"),
        ({"rows": torch.zeros(1, 3, dtype=torch.long)}, r"rows \(2, picked\).*got \(1, 3\)"),
        ({"dense": (30, 41)}, "a cache of 40 rows.*30 to 41"),
        ({"rows_mask": torch.ones(2, 4, dtype=torch.bool)}, r"rows_mask of shape \(2, 3\)"),
        ({"dense_mask": torch.ones(2, 4, dtype=torch.bool)}, r"dense_mask of shape \(2, 10\)"),
        ({"query": torch.zeros(2, 4, 1, 64).double()}, "one dtype.*float64"),
        ({"rows_mask": torch.zeros(2, 3)}, "added to the logits; convert them"),
        ({"beside": (torch.zeros(2, 2, 3, 64),) * 2 + (torch.zeros(2, 1, 3),)}, "each key head"),
    ],
)
def test_errors_name_what_is_expected(changes, words):
    arguments = {
        "query": torch.zeros(2, 4, 1, 64),
        "key": torch.zeros(2, 2, 40, 64),
        "value": torch.zeros(2, 2, 40, 64),
        "rows": torch.zeros(2, 3, dtype=torch.long),
        "rows_mask": None,
        "dense": (30, 40),
        "dense_mask": None,
        "scaling": 1.0,
    }
    with pytest.raises(ValueError, match=words):
        kernels.sparse_decode(**{**arguments, **changes})


def test_why_unsupported_names_the_reason():
    query, cache = torch.zeros(1, 128, 1, 8), torch.zeros(1, 1, 5, 8)
    assert "64 query heads should share a key head; 128 do" in kernels.why_unsupported(
        query, cache, cache
    )
    wide = torch.zeros(1, 1, 5, 320)
    assert "at most 256" in kernels.why_unsupported(torch.zeros(1, 1, 1, 320), wide, wide)
    trained = cache.clone().requires_grad_()
    assert "gradients" in kernels.why_unsupported(query[:, :4], trained, cache)
    with torch.no_grad():
        assert kernels.why_unsupported(query[:, :4], trained, cache) is None
    with pytest.raises(ValueError, match=r"mask of shape \(1, 1, 1, 5\)"):
        kernels.focal_decode(
            query[:, :4], cache, cache, torch.ones(1, 1, 1, 4, dtype=torch.bool), 1.0
        )
