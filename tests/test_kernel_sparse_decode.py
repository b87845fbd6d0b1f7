"""Decode kernels: interpreted on the CPU, compiled for GPUs without one, run on one.

The oracle is softmax attention over the whole cache in float64 with -inf on what is not read.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.kernels import sparse_decode as kernels

TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of outputs, which are of the size of 1, and of weights. Half precision rounds outputs, and the
# weights before the second product. The kernels keep logits in float32, plain torch rounds them.
KERNEL = {torch.float32: (2e-6, 1e-6), torch.float16: (2e-3, 1e-6), torch.bfloat16: (3e-2, 1e-6)}
PLAIN = {torch.float32: (2e-6, 1e-6), torch.float16: (4e-3, 1e-3), torch.bfloat16: (4e-2, 1e-2)}


@dataclass(frozen=True)
class Shape:
    """Of a call; the mask keeps some of the rows, or the first listed one and the last written."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    dim: int
    picked: int
    written: int
    masked: str = "some"  # "none", "some", "one"
    value_dim: int = 0
    transposed: bool = False  # a cache that lies as (batch, length, kv_heads, dim)


SMALL = [
    Shape(2, 4, 4, 70, 64, 21, 10),
    Shape(3, 7, 1, 90, 80, 37, 5, transposed=True),
    Shape(2, 8, 2, 75, 128, 40, 33, "none"),
    Shape(1, 4, 1, 40, 256, 9, 0),
    Shape(2, 2, 2, 60, 96, 33, 20, "one"),  # whole splits have nothing to attend to
    Shape(1, 4, 2, 50, 64, 0, 50, "none", value_dim=80),
    Shape(2, 21, 1, 35, 64, 1, 1, "none"),
]
LARGE = [
    Shape(1, 28, 4, 4500, 128, 461, 200),
    Shape(8, 16, 2, 2100, 128, 300, 77, transposed=True),
    Shape(32, 28, 4, 1100, 128, 100, 41),
    Shape(3, 10, 10, 1500, 128, 700, 300, "one"),
    Shape(2, 14, 2, 900, 80, 333, 1, "none"),
    Shape(2, 8, 1, 900, 256, 333, 100, transposed=True),
    *SMALL,
]


def _case(shape, dtype, seed=0):
    """Arguments of both functions, by name; what nobody may read is no number."""
    generator = torch.Generator().manual_seed(seed)
    value_dim = shape.value_dim or shape.dim

    def cache(dim):
        size = shape.batch, shape.kv_heads, shape.length, dim
        if shape.transposed:
            size = shape.batch, shape.length, shape.kv_heads, dim
        drawn = torch.randn(size, generator=generator).to(dtype)
        return drawn.transpose(1, 2) if shape.transposed else drawn

    prompt = shape.length - shape.written
    orders = [torch.randperm(prompt, generator=generator) for _ in range(shape.batch)]
    rows = torch.stack(orders)[:, : shape.picked]
    keep = torch.ones if shape.masked == "none" else torch.zeros
    rows_mask = keep(shape.batch, shape.picked, dtype=torch.bool)
    mask = keep(shape.batch, 1, 1, shape.length, dtype=torch.bool)
    if shape.masked == "one":
        rows_mask[:, :1] = True
    elif shape.masked == "some":
        rows_mask = torch.rand(rows_mask.shape, generator=generator) < 0.7
        mask = torch.rand(mask.shape, generator=generator) < 0.7
    mask[..., -1] = True
    return {
        "query": torch.randn(shape.batch, shape.heads, 1, shape.dim, generator=generator).to(dtype),
        "key": cache(shape.dim),
        "value": cache(value_dim),
        "rows": rows,
        "rows_mask": rows_mask,
        "mask": mask,
        "dense": torch.tensor([prompt, shape.length]),
    }


def _sparse(case, function):
    """Through ``function``; masks of ones are left out."""
    start, stop = case["dense"].tolist()
    rows_mask, mask = case["rows_mask"], case["mask"][:, 0, 0, start:stop]
    return function(
        *(case[name] for name in ("query", "key", "value", "rows")),
        None if rows_mask.all() else rows_mask,
        (start, stop),
        None if mask.all() else mask,
        0.2,
    )


def _focal(case, function):
    mask = None if case["mask"].all() else case["mask"]
    return function(case["query"], case["key"], case["value"], mask, 0.2)


def _listed(case):
    """Which rows of the cache :func:`_sparse` attends to, ``(batch, length)``."""
    start, stop = case["dense"].tolist()
    seen = torch.zeros(len(case["rows"]), case["key"].shape[2], dtype=torch.bool)
    for b, (rows, keep) in enumerate(zip(case["rows"], case["rows_mask"], strict=True)):
        seen[b, rows[keep]] = True
    seen[:, start:stop] = case["mask"][:, 0, 0, start:stop]
    return seen


def _oracle(case, seen):
    """Attention with -inf where nothing is seen, and its mean over the heads, in float64."""
    query, key, value = (case[name].double() for name in ("query", "key", "value"))
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, 1) for part in (key, value))
    logits = (query @ key.transpose(2, 3)) * 0.2
    weights = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return weights @ value, weights.mean((1, 2))


def _check_lse(shape, dtype, lse):
    """The logsumexp of the logits that are seen, which the kernel keeps in float32."""
    case = _case(shape, dtype)
    query, key = case["query"].double(), case["key"].double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query @ key.transpose(2, 3))[:, :, 0] * 0.2
    wanted = logits.masked_fill(~_listed(case)[:, None], -torch.inf).logsumexp(2)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.cpu().double(), wanted, atol=5e-6, rtol=0)


def _check(shape, dtype, sparse, focal, weights, tolerances):
    case = _case(shape, dtype)
    atol, weights_atol = tolerances[dtype]
    wanted, _ = _oracle(case, _listed(case))
    assert sparse.dtype == focal.dtype == dtype and weights.dtype == torch.float32
    torch.testing.assert_close(sparse.cpu().double(), wanted, atol=atol, rtol=0)
    wanted, lies = _oracle(case, case["mask"][:, 0, 0])
    torch.testing.assert_close(focal.cpu().double(), wanted, atol=atol, rtol=0)
    torch.testing.assert_close(weights.cpu().double(), lies, atol=weights_atol, rtol=0)


def _hidden(case, seen):
    """The case with a cache in which no row is a number that is not seen."""
    hidden = {**case}
    for name in ("key", "value"):
        hidden[name] = case[name].masked_fill(~seen[:, None, :, None], torch.nan)
    return hidden


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_the_references_are_attention_with_minus_infinity(shape, dtype):
    case = _case(shape, dtype)
    sparse = _sparse(case, kernels.sparse_decode_reference)
    focal, weights = _focal(case, kernels.focal_decode_reference)
    _check(shape, dtype, sparse, focal, weights, PLAIN)


# ---- interpreted ---------------------------------------------------------------------------------

# The interpreter keeps bfloat16 as its bits and multiplies these: its dot product gets numbers.
INTERPRET = """
import importlib.util, sys
import torch
from safetensors.torch import save_file
from triton.runtime import interpreter

spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
cases = importlib.util.module_from_spec(spec)
sys.modules["cases"] = cases
spec.loader.exec_module(cases)

def numbers(handle):
    if handle.dtype.scalar != interpreter.tl.bfloat16:
        return handle
    return interpreter.interpreter_builder.cast_impl(handle, interpreter.tl.float32)

dot = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *others: dot(
    self, numbers(a), numbers(b), *others
)
made = {}
for splits in ("one", "many"):
    if splits == "many":
        cases.kernels.PROGRAMS, cases.kernels.LEAST_TILES = 1000, 1
        cases.kernels.TILE_BYTES, cases.kernels.SCORES = 1, 32
    for dtype in cases.DTYPES:
        for number, shape in enumerate(cases.SMALL):
            case, name = cases._case(shape, dtype), f"{splits} {dtype} {number}"
            hidden = cases._hidden(case, cases._listed(case))
            made[f"{name} sparse"] = cases._sparse(hidden, cases.kernels.sparse_decode)
            made[f"{name} lse"] = cases._sparse(hidden, cases.kernels.sparse_decode_lse)[1]
            hidden = cases._hidden(case, case["mask"][:, 0, 0])
            focal, weights = cases._focal(hidden, cases.kernels.focal_decode)
            made |= {f"{name} focal": focal, f"{name} weights": weights}
save_file(made, sys.argv[2])
"""


def _python(code, *arguments, **variables):
    environment = {**os.environ, **variables}
    command = [sys.executable, "-P", "-c", code, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    made = tmp_path_factory.mktemp("interpreted") / "made"
    _python(INTERPRET, __file__, str(made), TRITON_INTERPRET="1")
    return load_file(made)


@TRITON
@pytest.mark.parametrize("splits", ["one", "many"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(SMALL)))
def test_interpreted_they_are_attention_with_minus_infinity(interpreted, splits, dtype, number):
    found = [
        interpreted[f"{splits} {dtype} {number} {what}"] for what in ("sparse", "focal", "weights")
    ]
    _check(SMALL[number], dtype, *found, KERNEL)
    _check_lse(SMALL[number], dtype, interpreted[f"{splits} {dtype} {number} lse"])


@TRITON
@pytest.mark.parametrize(
    "file, chosen",
    [
        ("test_fastocr.py", "static_cache and qwen2_5_vl"),
        # the kernels take no added mask; the interpreter multiplies bfloat16 by its bits, and
        # serves one thread
        ("test_fastocr_periphery.py", "not added and not bfloat16"),
        pytest.param(
            "test_fastocr.py", "not half_precision and not two_threads", marks=pytest.mark.slow
        ),
    ],
)
def test_fastocr_decodes_with_interpreted_kernels(file, chosen):
    """As these tests want it: every family, padding, caches, knobs, summaries."""
    tests = Path(__file__).parent / file
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, str(tests), "-k", chosen],
        cwd=tests.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "COMPRESS_KERNELS": "triton"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout


# ---- compiled ------------------------------------------------------------------------------------

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from compress.kernels import sparse_decode as module

OTHERS = {
    "rows_ptr": "*i64", "rows_mask_ptr": "*u8", "dense_mask_ptr": "*u8", "parts_ptr": "*fp32",
    "lse_ptr": "*fp32", "logits_ptr": "*fp32", "weights_ptr": "*fp32", "scale": "fp32",
}

def compiled(kernel, capability, dtype, constants, stages):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = OTHERS.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
    # as at a launch, where torch's tensors and their strides are multiples of 16
    even = [
        name.endswith("_ptr") or name.split("_")[-1] in ("batch", "head", "row")
        and name != "logits_row"
        for name in kernel.arg_names
    ]
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names) if even[place] and name not in constants
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": module.WARPS, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(capability, dtype, len(made.asm["cubin"]), made.metadata.shared, sep=",")

SIZES = {"fp16": 2, "bf16": 2, "fp32": 4}
for capability in map(int, sys.argv[1].split(",")):
    for dtype, dim in [part.split(":") for part in sys.argv[2:]]:
        dim = int(dim)
        block = module._block(dim)
        rows = module._tile_rows(block, block, SIZES[dtype])
        for focal in (False, True):
            absent = ["rows_ptr", "rows_mask_ptr"] if focal else ["logits_ptr"]
            compiled(
                module._read_kernel, capability, dtype,
                {
                    **dict.fromkeys(absent), **dict.fromkeys(["query_dim", "key_dim"], 1),
                    "value_dim": 1, "GROUP": 7, "DIM": dim, "VALUE_DIM": dim, "BLOCK_GROUP": 16,
                    "BLOCK_DIM": block, "BLOCK_VALUE": block, "BLOCK_ROWS": rows,
                },
                module._stages(listed=not focal),
            )
            absent = [] if focal else ["logits_ptr", "weights_ptr"]
            compiled(
                module._merge_kernel, capability, dtype,
                {
                    **dict.fromkeys(absent), "VALUE_DIM": dim, "BLOCK_VALUE": block,
                    "BLOCK_SPLITS": module.MOST_SPLITS, "BLOCK_ROWS": module.SCORES,
                },
                module.STAGES,
            )
"""


@TRITON
@pytest.mark.parametrize(
    "capabilities, cases",
    [
        (["90"], ["fp16:128", "bf16:80", "fp32:64"]),
        pytest.param(
            ["80", "90"],
            [f"{dtype}:{dim}" for dtype in ("fp16", "bf16", "fp32") for dim in (64, 96, 128, 256)],
            marks=pytest.mark.slow,
        ),
    ],
    ids=len,
)
def test_they_compile_for_gpus_that_are_not_here(capabilities, cases, tmp_path):
    variables = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    printed = _python(COMPILE, ",".join(capabilities), *cases, **variables)
    made = [line.split(",") for line in printed.splitlines()]
    wanted = [(capability, case.split(":")[0]) for capability in capabilities for case in cases]
    assert [(capability, dtype) for capability, dtype, _, _ in made[::4]] == wanted
    assert len(made) == 4 * len(wanted) and all(int(size) > 0 for _, _, size, _ in made)
    assert max(int(shared) for *_, shared in made) <= 99 * 1024  # of the smallest such GPU


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
    case = _case(shape, dtype)
    sparse = _sparse(_on_gpu(_hidden(case, _listed(case))), kernels.sparse_decode)
    hidden = _on_gpu(_hidden(case, case["mask"][:, 0, 0]))
    focal, weights = _focal(hidden, kernels.focal_decode)
    _check(shape, dtype, sparse, focal, weights, KERNEL)
    _check_lse(shape, dtype, _sparse(_on_gpu(case), kernels.sparse_decode_lse)[1])


@pytest.mark.gpu
@TRITON
@pytest.mark.parametrize("capture", [False, True], ids=["eager", "graph"])
def test_a_decode_step_does_not_wait_for_the_gpu(capture):
    from compress.methods.fastocr.gaze import MovingGaze
    from compress.methods.fastocr.state import Counts, Pages, Request
    from compress.models.visual import VisualLayout

    layers, visual, length = 4, 500, 520
    grid = torch.stack([torch.zeros(visual), *(torch.arange(visual) // n for n in (25, 1))], 1)
    layout = VisualLayout(torch.arange(visual), grid.long(), torch.zeros(visual).long())
    pages = Pages.of([layout] * 2, length, torch.device("cuda"))
    gaze = MovingGaze(
        pages, layers, keep=0.1, focal=[1], warmup=2, dilate=0, min_mass=0, reuse=True, periphery=0
    )
    request = Request(pages, gaze, Counts(layers))
    query = torch.randn(2, 8, 1, 64, device="cuda")
    cache = torch.randn(2, 2, length + 8, 64, device="cuda")

    def step():
        request.start_step()
        return [request.attend(layer, query, cache, cache, None, 0.1) for layer in range(layers)]

    with torch.no_grad():
        for _ in range(2):  # the dense one, and one that compiles
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            if capture:
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    step()
            else:
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- the rest ------------------------------------------------------------------------------------


def test_it_counts_the_bytes_of_the_tensors():
    shape = Shape(3, 6, 2, 50, 64, 20, 7, "none", value_dim=80)
    case = _case(shape, torch.float16)
    sizes = {"batch": 3, "heads": 6, "kv_heads": 2, "dim": 64, "value_dim": 80, "itemsize": 2}

    def size(*tensors):
        return sum(part.numel() * part.element_size() for part in tensors)

    output = torch.empty(3, 6, 1, 80, dtype=torch.float16)
    read = [case[name][:, :, : 20 + 7] for name in ("key", "value")]
    listed = size(case["query"], output, *read, case["rows"], case["rows_mask"])
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
    ],
)
def test_they_say_what_they_expect(changes, words):
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


def test_they_say_what_they_do_not_serve():
    query, cache = torch.zeros(1, 128, 1, 8), torch.zeros(1, 1, 5, 8)
    assert "64 query heads should share a key head; 128 do" in kernels.obstacle(query, cache, cache)
    wide = torch.zeros(1, 1, 5, 320)
    assert "at most 256" in kernels.obstacle(torch.zeros(1, 1, 1, 320), wide, wide)
    trained = cache.clone().requires_grad_()
    assert "gradients" in kernels.obstacle(query[:, :4], trained, cache)
    with torch.no_grad():
        assert kernels.obstacle(query[:, :4], trained, cache) is None
    with pytest.raises(ValueError, match=r"mask of shape \(1, 1, 1, 5\)"):
        kernels.focal_decode(
            query[:, :4], cache, cache, torch.ones(1, 1, 1, 4, dtype=torch.bool), 1.0
        )
