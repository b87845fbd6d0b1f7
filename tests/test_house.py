"""Rules of the house that neither ruff nor mypy, import-linter or deptry can check."""

import ast
import subprocess
import sys
import tomllib
import types
from importlib import metadata
from pathlib import Path

import pytest

from compress.common.extras import EXTRAS

ROOT = Path(__file__).parents[1]
MAPPED = ("kernels", "eval", "recipes")
SHIPPED = [p for folder in ("compress", *MAPPED) for p in sorted((ROOT / folder).rglob("*.py"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# keyword arguments that are data of the caller's, not options that could be misspelt
KEYWORDS = {
    ("compress/common/journal.py", "log"),
    # those of what is called
    ("compress/common/files.py", "image_png"),
    ("compress/common/plots.py", "to_png"),
    ("compress/methods/fastocr/hooks.py", "generate"),
    ("compress/methods/fastocr/hooks.py", "step"),
    ("compress/tables/table.py", "has"),
    # refused, with the names of those that there are
    ("compress/api.py", "apply"),
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_module_lies_in_a_package():
    assert [relative(p) for p in SHIPPED if not (p.parent / "__init__.py").is_file()] == []


def test_every_file_of_a_package_is_packed():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    files, packed = set(), set()
    for init in {p.parent for p in SHIPPED}:
        name = relative(init).replace("/", ".")
        name = f"compress.{name}" if name in MAPPED else name
        for pattern in (*data.get(name, ()), *data["*"]):
            packed.update(init.glob(pattern))
    for folder in ("compress", *MAPPED):
        files |= {p for p in (ROOT / folder).rglob("*") if p.is_file()}
    unpacked = {"__pycache__", "results"}  # the rows of eval/results stay in the checkout
    files = {p for p in files - set(SHIPPED) if not unpacked.intersection(p.parts)}
    assert sorted(map(relative, files - packed)) == []


def test_mapped_packages_begin_with_a_docstring_and_nothing_else():
    # `import transformers` may execute kernels/__init__.py as a top-level module
    for folder in MAPPED:
        [node] = ast.parse((ROOT / folder / "__init__.py").read_text()).body
        assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant), folder


@pytest.mark.parametrize("arguments", [(), ("-P",)], ids=["cwd on the path", "safe path"])
def test_kernels_never_shadows_a_top_level_module(arguments, tmp_path):
    code = "from importlib.util import find_spec; s = find_spec('kernels'); print(s and s.origin)"
    # -P is what the Makefile's PYTHONSAFEPATH=1 does; without it only a foreign folder is safe
    folder = ROOT if arguments else tmp_path
    command = [sys.executable, *arguments, "-c", code]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert str(ROOT) not in found.stdout


def test_this_pytest_does_not_see_the_checkout_as_top_level_modules():
    from importlib.util import find_spec

    spec = find_spec("kernels")
    assert spec is None or not Path(spec.origin).is_relative_to(ROOT)
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_public_functions_name_their_arguments():
    found = [
        (relative(path), node.name)
        for path in SHIPPED
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.args.kwarg
    ]
    assert set(found) == KEYWORDS


def test_every_extra_is_known_and_part_of_all():
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras) == {*EXTRAS, "all", "dev"}
    assert extras["all"] == [f"compress-models[{','.join(EXTRAS)}]"]


def test_the_version_stands_in_one_place():
    version = PROJECT["project"]["version"]
    assert metadata.version("compress-models") == version
    sources = [*SHIPPED, ROOT / "Makefile", ROOT / "README.md", ROOT / ".ci" / "run"]
    assert [relative(p) for p in sources if f'"{version}"' in p.read_text()] == []


def test_both_commands_are_installed():
    scripts = metadata.distribution("compress-models").entry_points.select(group="console_scripts")
    assert {s.name: s.value for s in scripts} == {
        "compress": "compress.cli:main",
        "compress-models": "compress.cli:main",
    }


def test_no_module_hides_a_public_name():
    import importlib

    import compress

    for path in (ROOT / "compress").glob("*.py"):
        importlib.import_module(f"compress.{path.stem}")
    for name in compress.__all__:
        assert not isinstance(getattr(compress, name), types.ModuleType), name
