"""The choice between kernel and plain torch: automatic, forced, logged once; and without Triton."""

import ast
import itertools
import logging
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compress.kernels import backend
from compress.kernels.backend import VARIABLE, use_triton

TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _nothing_logged(monkeypatch):
    backend._decide.cache_clear()
    backend._log_once.cache_clear()
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def _capability(monkeypatch, *version):
    backend._decide.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)


def _copies(node):
    """(a, b) of each ``a = b`` in some code."""
    assigned = (part for part in ast.walk(node) if isinstance(part, ast.Assign))
    pairs = ((copy.targets[0], copy.value) for copy in assigned)
    return [(a.id, b.id) for a, b in pairs if isinstance(a, ast.Name) and isinstance(b, ast.Name)]


@pytest.mark.parametrize("file", sorted(Path(backend.__file__).parent.glob("*.py")), ids=str)
def test_no_name_is_a_copy_of_the_same_name_before_a_loop_and_in_it(file):
    # Triton compares what a name is before and behind the body, which it first reads with v as it
    # was: it takes such a copy for one that the loop leaves alone. Its interpreter does not.
    for function in ast.walk(ast.parse(file.read_text())):
        if isinstance(function, ast.FunctionDef) and "jit" in map(_name, function.decorator_list):
            loops = [part for part in ast.walk(function) if isinstance(part, ast.For | ast.While)]
            inside = {copy for loop in loops for copy in _copies(loop)}
            everywhere = _copies(function)
            assert all(everywhere.count(copy) == 1 for copy in inside)


def _name(decorator):
    return getattr(getattr(decorator, "func", decorator), "id", None)


@TRITON
def test_the_kernel_runs_on_a_gpu_that_it_was_compiled_for(monkeypatch):
    _capability(monkeypatch, 9, 0)
    assert use_triton("first", GPU)
    assert not use_triton("first", CPU)
    assert not use_triton("first", GPU, "heads should have at most 256 numbers; they have 320")
    _capability(monkeypatch, 7, 5)
    assert not use_triton("first", GPU)
    _capability(monkeypatch, 9, 0)
    monkeypatch.setattr(backend.triton, "__version__", "3.2.0")
    assert not use_triton("first", GPU)


@TRITON
def test_the_variable_forces(monkeypatch):
    _capability(monkeypatch, 9, 0)
    monkeypatch.setenv(VARIABLE, "torch")
    assert not use_triton("first", GPU)
    monkeypatch.setenv(VARIABLE, "triton")
    assert use_triton("first", GPU)
    with pytest.raises(ValueError, match="requests the kernel first.*on cpu, not on a GPU; fix"):
        use_triton("first", CPU)
    with pytest.raises(ValueError, match="cannot run: too wide; fix that, or set COMPRESS_KERN"):
        use_triton("first", GPU, "too wide")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton("first", CPU)
    monkeypatch.setenv(VARIABLE, "")
    assert not use_triton("first", CPU)


def test_an_unknown_value_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match="one of auto, torch, triton; got 'cuda'; correct it"):
        use_triton("first", CPU)


@TRITON
def test_it_is_logged_once_and_as_a_warning_only_where_a_gpu_has_no_kernel(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "compress.kernels")
    _capability(monkeypatch, 9, 0)
    for _ in range(3):
        use_triton("first", GPU)
        use_triton("first", CPU)
        use_triton("first", GPU, "too wide")
        use_triton("second", GPU)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "first: Triton on cuda (COMPRESS_KERNELS=torch for plain torch)"),
        ("INFO", "first: plain torch: the tensors are on cpu, not on a GPU"),
        ("WARNING", "first: plain torch: too wide"),
        ("INFO", "second: Triton on cuda (COMPRESS_KERNELS=torch for plain torch)"),
    ]


def test_transport_is_plain_torch_where_the_variable_is_torch(monkeypatch):
    from compress.methods.rtprune.transport import transport_plans

    scores = torch.rand(2, 3, 4)
    plain = transport_plans(scores)
    monkeypatch.setenv(VARIABLE, "torch")
    assert torch.equal(transport_plans(scores), plain)
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match="requests the kernel sinkhorn"):
        transport_plans(scores)


def test_the_command_line_logs_it_on_stderr():
    from compress.cli import app

    shape = "model=tiny,visual=16,text=4"
    arguments = ["bench", "fastocr", "--shape", shape, "--repeats", "6", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    messages = [
        f"{kernel}: plain torch: the tensors" for kernel in ("sparse_decode", "focal_decode")
    ]
    assert all(result.stderr.count(line) == 1 and line not in result.stdout for line in messages)


def test_a_launch_goes_to_the_gpu_of_its_first_tensor(monkeypatch):
    current, launched = [0], []

    class Tensor:
        is_cuda = True

        def get_device(self):
            return 1

        def data_ptr(self):
            return 64

    class Kernel:
        arg_names = ["first", "second"]

        def __getitem__(self, grid):
            def launch(*arguments):
                launched.append(current[-1])
                return {grid: launch}

            return launch

    @contextmanager
    def device_of(tensor):
        current.append(tensor.get_device())
        yield
        current.pop()

    monkeypatch.setattr(backend, "_several_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launch = backend.Launch(Kernel(), (1, 1, 1), (), {})
    for _ in range(2):  # compiled, and launched again
        launch(Tensor(), None)
    launch(torch.zeros(1), None)  # as the interpreter does
    assert launched == [1, 1, 0] and current == [0]


@TRITON
def test_what_triton_compiled_is_launched_again_for_arguments_of_the_same_kind():
    """The kinds are those that Triton itself tells apart, and the arguments those that it binds."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from compress.kernels.sparse_decode import _merge_kernel

    target = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(_merge_kernel.signature, _merge_kernel.params, target)
    kinds, again = [], []

    class Kernel:
        arg_names = _merge_kernel.arg_names

        def __getitem__(self, grid):
            def first(*arguments, **constants):
                _, kind, _ = bind(*arguments, **constants)
                kinds.append(kind)
                return {grid: lambda *arguments: again.append((kind, arguments))}

            return first

    names = Kernel.arg_names[11:]
    constants = {name: size for size, name in enumerate(names, 1)}
    numbers = (3, 100, 64, 128, 16, 1)
    launch = backend.Launch(Kernel(), (2, 3, 1), numbers, constants | {"num_warps": 4})
    memory = torch.zeros(64)
    places = list(itertools.product((0, 1, 4, 7), repeat=2)) * 2  # in numbers of 4 bytes
    for first, second in places:
        tensors = memory[first:], memory[second:], memory, None, None
        before = len(kinds)
        launch(*tensors)
        bound, kind, _ = bind(*tensors, *numbers, **constants)
        if len(kinds) == before:
            addresses = [part if part is None else part.data_ptr() for part in tensors]
            assert again[-1] == (kind, (*addresses, *list(bound.values())[5:]))
    assert len(kinds) == 4
