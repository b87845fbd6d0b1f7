"""Rules of the house that no reviewer should have to check by hand."""

import ast
import re
import subprocess
import sys
import tomllib
import types
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("kernels", "eval", "recipes")
SHIPPED = [p for folder in ("compress", *MAPPED) for p in sorted((ROOT / folder).rglob("*.py"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# import name -> distribution, where the two differ
DISTRIBUTIONS = {
    "huggingface_hub": "huggingface-hub",
    "ot": "pot",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
    "torch_pruning": "torch-pruning",
    "yaml": "pyyaml",
}
# imported only where it is present, with a message of our own where it is not
OPTIONAL = {"datasets", "triton"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}
# Inception's weights exist only as a pickle: this call refuses all but tensors in it
GUARDED = {
    ("eval/fidelity.py", "torch.load(weights, map_location='cpu', weights_only=True)"),
}
# keyword arguments that are data of the caller's, not options that could be misspelt
ROWS = {("compress/common/journal.py", "log")}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_module_lies_in_a_package():
    assert [relative(p) for p in SHIPPED if not (p.parent / "__init__.py").is_file()] == []


def test_built_in_models_and_recipes_are_packed():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    builtin = ROOT / "compress" / "models" / "builtin"
    files = {p for p in builtin.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    packed = {p for pattern in data["compress.models.builtin"] for p in builtin.glob(pattern)}
    assert sorted(map(relative, files - packed - set(SHIPPED))) == []
    recipes = {p for p in (ROOT / "recipes").rglob("*") if p.suffix in (".yaml", ".yml")}
    assert recipes == {
        p for pattern in data["compress.recipes"] for p in ROOT.glob(f"recipes/{pattern}")
    }


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_packages_begin_with_a_docstring_and_nothing_else(folder):
    # `import transformers` may execute kernels/__init__.py as a top-level module
    body = ast.parse((ROOT / folder / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr]
    assert isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str)


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


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_shipped_code_has_no_assert_no_pickle_no_bare_except_no_relative_import(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Assert():
                found.append((node.lineno, "assert"))
            case ast.ExceptHandler(type=None):
                found.append((node.lineno, "bare except"))
            case ast.ImportFrom(level=level) if level:
                found.append((node.lineno, "relative import"))
            case ast.Import() | ast.ImportFrom():
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                if PICKLES & {name.split(".")[0] for name in names}:
                    found.append((node.lineno, "pickle"))
            case ast.Call(func=ast.Attribute(value=ast.Name("torch"), attr="load" | "save")):
                call = (relative(path), ast.unparse(node))
                if call not in GUARDED:
                    found.append((node.lineno, call[1]))
    assert found == []


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_public_signatures_are_honest(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        if node.args.kwarg and (relative(path), node.name) not in ROWS:
            found.append((node.lineno, node.name, "**kwargs"))
        defaults = [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        if any(isinstance(d, ast.List | ast.Dict | ast.Set) for d in defaults):
            found.append((node.lineno, node.name, "mutable default"))
    assert found == []


def test_imports_are_declared_dependencies():
    declared = {re.split(r"[<>=~!; ]", d)[0] for d in PROJECT["project"]["dependencies"]}
    imported: dict[str, str] = {}
    for path in SHIPPED:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            imported |= {name.split(".")[0]: relative(path) for name in names}
    foreign = imported.keys() - sys.stdlib_module_names - {"compress"} - OPTIONAL
    assert {m: imported[m] for m in foreign if DISTRIBUTIONS.get(m, m) not in declared} == {}


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


def test_arrows_between_packages():
    """Methods know neither recipe, pipeline nor cli; kernels know torch and nothing else."""
    above = {"recipe", "pipeline", "cli", "report", "comparison", "eval"}
    forbidden = {
        "compress/gradflow": above | {"doctor", "fastocr", "rtprune"},
        "compress/rtprune": above | {"doctor", "fastocr", "gradflow", "data"},
        "compress/fastocr": above | {"doctor", "gradflow", "rtprune", "data"},
        "compress/models": above | {"fastocr", "gradflow", "rtprune"},
        "compress/data": above | {"fastocr", "gradflow", "rtprune"},
        "kernels": above | {"fastocr", "gradflow", "rtprune", "models", "data"},
    }
    found = []
    for path in SHIPPED:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                parts = name.split(".")
                for folder, barred in forbidden.items():
                    if parts[0] == "compress" and relative(path).startswith(f"{folder}/"):
                        found += [(relative(path), name)] if barred & set(parts[1:2]) else []
    assert found == []


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_has_python_and_every_name_in_it_exists():
    blocks = readme_blocks()
    assert len(blocks) == 3
    for block in blocks:
        tree = ast.parse(block)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names: dict[str, object] = {}
        exec(compile(ast.Module(imports, []), "README.md", "exec"), names)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in names:
                    assert hasattr(names[node.value.id], node.attr), ast.unparse(node)


def test_no_module_hides_a_public_name():
    import importlib

    import compress

    for path in (ROOT / "compress").glob("*.py"):
        importlib.import_module(f"compress.{path.stem}")
    for name in compress.__all__:
        assert not isinstance(getattr(compress, name), types.ModuleType), name


def test_readme_recipes_are_valid(tmp_path):
    from compress.runs.recipe import load_recipe

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        path = tmp_path / "readme.yaml"
        path.write_text(block)
        load_recipe(path)


def test_readme_names_commands_and_recipes_that_exist():
    from typer.main import get_command

    from compress.cli import app

    text = (ROOT / "README.md").read_text()
    verbs = set(get_command(app).commands)
    used = set(re.findall(r"^compress (\w+)", text, re.MULTILINE))
    assert used == verbs
    for recipe in re.findall(r"recipes/(\w+\.yaml)", text):
        assert (ROOT / "recipes" / recipe).is_file()
    benches = (f"bench_{name}" for name in ("gradflow", "rtprune", "fastocr", "kernels"))
    for table in (
        "main",
        "ablation",
        "attempts",
        "readers",
        "fastocr",
        "rtprune",
        "processes",
        *benches,
    ):
        assert text.count(f"<!-- table:{table} -->") == text.count(f"<!-- /table:{table} -->") == 1


def test_readme_states_the_declared_ranges():
    text = (ROOT / "README.md").read_text()
    for requirement in PROJECT["project"]["dependencies"]:
        found = re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", requirement)
        row = f"| {found[1]} | {found[2]} up to, not including, {found[3]} |" if found else ""
        if found and found[1] in re.findall(r"^\| ([\w-]+) \| [\d.]+ up to", text, re.MULTILINE):
            assert row in text
