"""What every test gets: a seed, its own cache, few threads, and a look at what it leaves behind."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

gc.disable()  # while a million objects are imported, which stay: see _frozen_imports
REPOSITORY = Path(__file__).parents[1]
# caches that tools keep in the checkout by design
LITTER_ALLOWED = {".git", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".venv", "build", "runs"}


def _files(folder: Path) -> Iterator[str]:
    for path in folder.iterdir():
        if path.name in LITTER_ALLOWED or path.name == "__pycache__":
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        elif path.suffix != ".py":  # somebody may be writing code while the tests run
            yield str(path.relative_to(REPOSITORY))


# a method that tests/test_method_contract.py puts into a copy of the checkout
collect_ignore = ["toy"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The tests of a file go to one process: what they share is made once.

    So do all that run programs, which are forks of one process: see builders/server.py.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            runs_programs = "programs.run(" in (config.rootpath / file).read_text(encoding="utf8")
            return "programs" if runs_programs else file

    return Scheduling(config, log)


@pytest.fixture(autouse=True, scope="session")
def _leaves_no_files() -> Iterator[None]:
    before = set(_files(REPOSITORY))
    yield
    left = sorted(set(_files(REPOSITORY)) - before)
    if left:
        raise RuntimeError(f"the tests left files in the checkout: {', '.join(left)}")


@pytest.fixture(autouse=True, scope="module")
def _frozen_imports() -> None:
    # runs collect garbage when they end: without the million objects that imports have made, and
    # those of the files before, but for what these left behind
    if gc.get_freeze_count():
        gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # tests make many objects, and few cycles
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    import torch
    from diffusers.utils import logging

    # its handler keeps the stderr of when it is first used: that of one test would be closed later
    logging.get_verbosity()
    # tiny models gain nothing from a second thread and wait for it on a busy machine
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    import random

    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    # torch.manual_seed notes where it was called for a CUDA that may begin later: milliseconds
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    seed(0)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    # one cache for the session's tests: dense samples need not be drawn again, and the user's
    # own cache is neither read nor filled
    base = tmp_path_factory.getbasetemp() / "compress-cache"
    monkeypatch.setenv("COMPRESS_CACHE", str(base))


@pytest.fixture(autouse=True, scope="session")
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp()
    # tiny models have few visual tokens: FastOCR shall do what it does, however slow; for the runs
    # of module-wide fixtures too, which begin before any test
    table = base / "no-crossovers.json"
    table.write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESS_CROSSOVERS", str(table))
        # where transformers and diffusers put code that comes with a model
        patch.setenv("HF_MODULES_CACHE", str(base / "modules"))
        yield


@pytest.fixture(scope="module")
def quick_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Figures are drawn for modules that say ``FIGURES = True``."""
    from builders import quick

    with quick.quick_runs(getattr(request.module, "FIGURES", False)):
        yield


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory):
    """Tiny pipelines by family, made when first asked for; nobody may change them."""
    from builders import pipelines

    made = {}

    def get(name: str):
        if name not in made:
            made[name] = pipelines.build(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get
