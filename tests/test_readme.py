"""The documents: their commands and blocks run, and what they name exists."""

import ast
import importlib
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename
from typer.main import get_command
from typer.testing import CliRunner

from compress.cli import app
from compress.runs.recipe import list_recipes, load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
VERBS = get_command(app).commands
FOLDERS = ("compress", "eval", "kernels", "recipes")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))]
)
documents = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)
# a block that begins so is checked, and not run
NOT_RUN = "# needs"
# what makes a run of the built-in models short, in addition to what a document sets
SHORT = (
    "method.steps=10",
    "method.update_every=1",
    "recover={steps: 1, batch: 4}",
    "evaluate={samples: 4, batch: 4, steps: 2, sampling_seeds: 1}",
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    lines = (shlex.split(line, comments=True) for line in block.splitlines())
    return [line for line in lines if line]


def ran(block: str) -> list[list[str]]:
    """The commands of a block, but for one that is not run."""
    return [] if block.startswith(NOT_RUN) else commands(block)


def trains(arguments: list[str]) -> bool:
    return arguments[0] == "run" and "--dry-run" not in arguments


def quickly(arguments: list[str]) -> list[str]:
    """The arguments of a command, with further ones where it trains or reads pages."""
    if trains(arguments):
        return [*arguments, *(part for override in SHORT for part in ("--set", override))]
    if arguments[0] in ("read", "eval", "calibrate"):
        pages = ["--pages", "1"] * (arguments[0] == "calibrate")
        return [*arguments, *pages, "--max-new-tokens", "8"]
    return arguments


def smaller(code: str) -> str:
    """The code with fewer steps, images and words, which decide nothing but its time."""
    code = re.sub(r"(steps|batch)=\d+", r"\1=2", code)
    code = re.sub(r"(GradFlow\(\w[^)]*)", r"\1, criterion_batches=1", code)
    code = re.sub(r"(\.read\(\[\w+\])", r"\1, max_new_tokens=8", code)
    return re.sub(r'("evaluate.)(samples=\d+")', r'\1\2, \1max_new_tokens=8"', code)


@pytest.fixture
def short_runs(tmp_path, monkeypatch, quick_runs):
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, (arguments, result.output)
    return result.output


# ---- the README ----------------------------------------------------------------------------------


def test_readme_is_short():
    assert README.count("\n") <= 200
    assert len(README.encode()) <= 14_000


def test_readme_installs_what_there_is():
    [install] = [block for block in blocks(README, "bash") if "pip install" in block]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE)
    extras = set(PROJECT["optional-dependencies"])
    for command in commands(install):
        if command[0] == "make":
            assert command[1] in targets
            continue
        assert command[:2] == ["pip", "install"]
        path, extra = re.fullmatch(r"(.*)\[(\w+)\]", command[2]).groups()
        if path == ".":
            assert extra in extras and (ROOT / "pyproject.toml").is_file()
            continue
        name, version, _, _ = parse_wheel_filename(Path(path).name)
        assert (name, str(version)) == (PROJECT["name"], PROJECT["version"]) and extra in extras
    named = re.findall(r"`\[(\w+)\]`", README)
    assert set(named) == extras - {"dev"}


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_readme_commands_run(training, short_runs):
    lines = [line for block in blocks(README, "bash") for line in ran(block)]
    lines = [line[1:] for line in lines if line[0] == "compress"]
    # those that need what a trained run leaves come right behind it
    first = next(n for n, line in enumerate(lines) if trains(line))
    last = next(n for n, line in enumerate(lines) if n > first and line[0] not in ("run", "show"))
    chosen = lines[first:last] if training else lines[:first] + lines[last:]
    assert len(chosen) > 1 and all(invoke(*quickly(arguments)) for arguments in chosen)


def test_readme_python_runs(short_runs):
    made = next(line for b in blocks(README, "bash") for line in commands(b) if "pages" in line)
    invoke(*made[1:])
    python = blocks(README, "python")
    assert len(python) == 3
    for block in python:
        exec(compile(smaller(block), "README.md", "exec"), {})


def test_readme_recipe_is_that_of_the_main_job(tmp_path):
    [block] = blocks(README, "yaml")
    path = tmp_path / "ddpm_gradflow.yaml"
    path.write_text(block)
    assert load_recipe(path) == load_recipe("ddpm_gradflow")


def test_readme_names_every_verb():
    assert set(re.findall(r"\bcompress ([a-z]+)\b", README)) >= set(VERBS)


def test_readme_states_the_declared_ranges():
    head, _, row = re.search(r"^(\| Python .*)\n(.*)\n(.*)$", README, re.MULTILINE).groups()
    names, ranges = ([cell.strip() for cell in line.strip("|").split("|")] for line in (head, row))
    declared = {"Python": PROJECT["requires-python"]}
    for text in PROJECT["dependencies"]:
        name, version = re.fullmatch(r"([\w-]+)(.*)", text).groups()
        declared[name] = version
    assert dict(zip(names, ranges, strict=True)) == {name: declared[name] for name in names}


# ---- all documents -------------------------------------------------------------------------------


@documents
def test_commands_have_verbs_options_and_recipes_that_exist(document):
    text = document.read_text(encoding="utf8")
    shipped = {name for name, _ in list_recipes()}
    for block in blocks(text, "bash"):
        for command in commands(block):
            assert command[0] in ("compress", "pip", "make"), command
            if command[0] != "compress":
                continue
            verb, *arguments = command[1:]
            context = VERBS[verb].make_context(verb, arguments)
            if verb == "run":
                load_recipe(context.params["recipe"], context.params["overrides"] or ())
    for name in re.findall(r"recipes/(\w+)\.yaml|compress run (\w+)", text):
        assert (name[0] or name[1]) in {*shipped, "RECIPE", "MODEL_NAME"}, name
    options = {option for verb in VERBS.values() for p in verb.params for option in p.opts}
    # in the text, and not in what another program is called with
    for code in re.findall(r"`(compress [^`]*|--[^`]*)`", text):
        if code.startswith("compress "):
            assert code.split()[1] in {*VERBS, "eval"}, code
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", code):
            assert option in options | OF_SCRIPTS, code


# of the scripts that train the built-in models, and of launchers
OF_SCRIPTS = {"--run", "--polish", "--bf16", "--warm-start"}


@documents
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf8")):
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            continue
        assert (document.parent / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (document.parent / path).read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, target


@documents
def test_python_parses_and_imports_what_exists(document):
    for block in blocks(document.read_text(encoding="utf8"), "python"):
        for node in ast.parse(block).body:
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


@documents
def test_recipes_of_documents_are_valid(document, tmp_path):
    for block in blocks(document.read_text(encoding="utf8"), "yaml"):
        path = tmp_path / "document.yaml"
        path.write_text(block)
        assert load_recipe(path).output


# ---- the notebook --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_notebook_runs(short_runs):
    notebook = json.loads((ROOT / "recipes" / "quickstart.ipynb").read_text(encoding="utf8"))
    assert notebook["nbformat"] == 4
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(code):
        source = smaller("".join(cell["source"]))
        exec(compile(source, f"cell {number}", "exec"), names)
    assert "quickstart" not in {name for name, _ in list_recipes()}
