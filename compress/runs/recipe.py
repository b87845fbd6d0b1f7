"""Typed recipes: YAML in, one frozen object out, every mistake reported in a single message."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from compress.common.foreign import one_line, reason
from compress.common.settings import READS, Seed, Settings, did_you_mean
from compress.data.columns import Columns
from compress.eval.settings import Calibration, OcrEvaluation, Sampling
from compress.methods.registry import (
    METHODS,
    RUNTIME_METHODS,
    AnyRuntimeMethod,
    AnyWeightMethod,
)
from compress.methods.training import Recover, Train, Training

# a recipe has some fifty values on four levels, in a few kilobytes
MOST_VALUES, DEEPEST, LARGEST = 10_000, 20, 200_000


class RecipeError(ValueError):
    """A recipe that cannot be used; the message lists every problem found in it."""


class Recipe(Settings):
    """One run of `compress` on a diffusion pipeline: a method that makes new weights."""

    model: str = Field(min_length=1, json_schema_extra=READS)
    """``builtin:NAME``, a hub id, or a local diffusers folder."""
    data: str = Field(min_length=1, json_schema_extra=READS)
    """``builtin:digits``, ``folder:PATH`` or ``hub:NAME``."""
    method: AnyWeightMethod
    """The compression method and its knobs; ``name`` chooses which."""
    columns: Columns = Columns()
    """Where the data has captions or labels, for models that take them."""
    recover: Recover = Recover()
    """Training of the slim net."""
    train: Train = Train()
    """How optimiser steps are executed."""
    evaluate: Sampling = Sampling()
    """How the samples are drawn that are measured."""
    seed: Seed = 0
    """Seed of every random draw in the run."""
    output: str | None = Field(None, min_length=1)
    """Folder of the run; ``runs/NAME-OF-THE-RECIPE`` when null."""

    def training(self) -> Training:
        """The knobs of training, together."""
        return Training(**dict(self.recover), **dict(self.train), seed=self.seed)


class ReaderRecipe(Settings):
    """One run of `compress` on a reader of pages: methods that change how it runs."""

    model: str = Field(min_length=1, json_schema_extra=READS)
    """``builtin:NAME``, a hub id, or a local transformers folder."""
    data: str = Field(min_length=1, json_schema_extra=READS)
    """``builtin:pages``, ``builtin:square-pages``, or a folder of pages."""
    method: list[AnyRuntimeMethod] = Field(min_length=1)
    """One method, or a list of those that work together, the first one applied first."""
    compare: list[AnyRuntimeMethod] = []
    """Further methods, each measured alone on the same pages."""
    calibrate: Calibration = Calibration()
    """Pages on which open settings of a method are measured."""
    evaluate: OcrEvaluation = OcrEvaluation()
    """How pages are read and scored."""
    weights: Literal["copy", "reference"] = "copy"
    """Whether the checkpoint holds a copy of the model's weights or a reference to them."""
    seed: Seed = 0
    """Seed of every random draw in the run."""
    output: str | None = Field(None, min_length=1)
    """Folder of the run; ``runs/NAME-OF-THE-RECIPE`` when null."""


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe | ReaderRecipe:
    """Read, override and validate a recipe; its method says of which kind it is.

    Parameters
    ----------
    source : path of a YAML file, or the bare name of a recipe that ships with `compress`.
    overrides : ``path.to.key=value`` each; values are YAML.

    Raises
    ------
    FileNotFoundError : if there is no such recipe.
    RecipeError : listing all problems of the file and the overrides together.
    """
    data, lines, problems = _parse(_read(source), f"recipe {source}")
    for override in overrides:
        problem = _override(data, override, lines)
        if problem:
            problems.append(problem)
    method = data.get("method")
    kind: type[Recipe] | type[ReaderRecipe] = Recipe
    if isinstance(method, list) or _name(method) in RUNTIME_METHODS:
        kind = ReaderRecipe
        # a list of one, whose place in the file is that of the mapping
        data = data | {"method": method if isinstance(method, list) else [method]}
    try:
        # as JSON, because strict validation of Python objects would refuse plain mappings
        recipe = kind.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        if not isinstance(method, list):
            errors = [e | {"loc": _without_index(e["loc"])} for e in errors]
        problems += [_describe(e, list(_known_paths(kind, data)), lines) for e in errors]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        in_order = map(one_line, sorted(problems, key=_line_number))
        raise RecipeError("\n  ".join([f"recipe {source} has {count}:", *in_order]))
    if recipe.output is None:
        recipe = recipe.model_copy(update={"output": str(Path("runs") / Path(source).stem)})
    return recipe


def load_pipeline_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """:func:`load_recipe` for a recipe that is known to be one of a diffusion pipeline.

    Raises
    ------
    RecipeError : when it is one of a reader.
    """
    recipe = load_recipe(source, overrides)
    if isinstance(recipe, ReaderRecipe):
        raise RecipeError(
            f"recipe {source} should prune a diffusion pipeline; its methods are "
            f"{', '.join(m.name for m in recipe.method)}; name another recipe"
        )
    return recipe


def list_recipes() -> list[tuple[str, str]]:
    """Names of the shipped recipes, each with the first line of its comment."""
    recipes = []
    for name, text in _shipped().items():
        first = text.partition("\n")[0]
        recipes.append((name, first.removeprefix("#").strip() if first.startswith("#") else ""))
    return recipes


def dump(recipe: Recipe | ReaderRecipe, header: Sequence[str] = ()) -> str:
    """Write a recipe as YAML that ``load_recipe`` reads back to an equal object.

    Parameters
    ----------
    recipe : what to write, defaults included.
    header : lines of the comment on top (versions, date, command).
    """
    comment = "".join(f"# {line}\n" for line in header)
    content = recipe.model_dump(mode="json")
    return comment + yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: ``no`` and ``012`` are text, ``5e-4`` is a number."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = values = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        """Stop at what no recipe has, before all of it is read."""
        self.depth, self.values = self.depth + 1, self.values + 1
        _check_bounds(self.values, self.depth)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Name what does not fit its tag; PyYAML lets what it meets there pass."""
        try:
            return super().construct_object(node, deep)
        except (AttributeError, IndexError, KeyError, ValueError) as error:
            kind, value = node.tag.rpartition(":")[2], f"{node.value!r:.60}"
            problem = f"{value} does not fit its tag !!{kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or `_Loader` would not read back as text."""


_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
for _tag, _pattern, _first in (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))

Path_ = tuple[str | int, ...]
Lines = dict[Path_, str]


def _shipped() -> dict[str, str]:
    folder = resources.files("compress.recipes")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf8") for f in files}


def _read(source: str | Path) -> str:
    path = Path(source)
    if path.is_file():
        if (size := path.stat().st_size) > LARGEST:
            raise RecipeError(
                f"recipe {source} should have at most {LARGEST:,} bytes; got {size:,}; name the "
                "file of a recipe"
            )
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe {source} is not UTF-8 text: {error}; save it so") from error
    shipped = _shipped()
    name = path.name.removesuffix(".yaml")
    if str(path) == path.name and name in shipped:
        return shipped[name]
    raise FileNotFoundError(
        f"no recipe {source}: expected a YAML file, or one of {', '.join(shipped)}"
        + did_you_mean(name, shipped)
    )


def _parse(text: str, where: str) -> tuple[dict[str, Any], Lines, list[str]]:
    """Parse YAML into plain data, the line of every key, and a problem for every repeated key."""
    lines: Lines = {}
    problems: list[str] = []
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _check_size(node, {})
        data = _plain({} if node is None else loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        why = "; ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{where} is not valid YAML: {at}{why}; correct it") from error
    except Exception as error:  # PyYAML lets what its constructors meet pass
        raise RecipeError(f"{where} is not valid YAML: {reason(error)}; correct it") from error
    if not isinstance(data, dict):
        keys = ", ".join(Recipe.model_fields)
        raise RecipeError(f"{where} must be a mapping with the keys {keys}; got {_show(data)}")
    if node is not None:
        _walk(node, (), lines, problems)
    return data, lines, problems


def _plain(content: Any) -> Any:
    """Values of JSON alone, none of them shared; refuses what is no text and what has no end."""
    data = json.loads(json.dumps(content))
    json.dumps(data, ensure_ascii=False).encode()  # half of a surrogate pair is no character
    return data


def _check_size(node: yaml.Node, sizes: dict[int, int], depth: int = 1) -> int:
    """Number of values below a node with all aliases written out, which is bounded."""
    if id(node) not in sizes:
        sizes[id(node)] = MOST_VALUES  # of an alias to what it is a part of
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [p for item in inner for p in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_check_size(part, sizes, depth + 1) for part in parts)
    _check_bounds(sizes[id(node)], depth)
    return sizes[id(node)]


def _check_bounds(values: int, depth: int) -> None:
    if values > MOST_VALUES or depth > DEEPEST:
        raise ValueError(
            f"at most {MOST_VALUES} values, aliases written out, and {DEEPEST} levels are "
            "expected; got more"
        )


def _walk(node: yaml.Node, path: Path_, lines: Lines, problems: list[str]) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[*path, index] = f"line {item.start_mark.line + 1}, "
            _walk(item, (*path, index), lines, problems)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            line = f"line {key.start_mark.line + 1}, "
            if here in lines:
                problems.append(
                    f"{line}{_dotted(here)}: expected each key once; got a second one, after "
                    f"{lines[here].removesuffix(', ')}; remove one of the two"
                )
            lines[here] = line
            _walk(value, here, lines, problems)


def _override(data: dict[str, Any], override: str, lines: Lines) -> str | None:
    """Put one ``path.to.key=value`` into the data; returns the problem if there is one."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        return f"--set {override}: expected path.to.key=value, for example method.keep_macs=0.4"
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            _check_size(node, {})
        value = _plain(yaml.load(text, Loader=_Loader))  # noqa: S506 - derived from SafeLoader
        override.encode()
    except Exception as error:
        why = " ".join(str(getattr(error, "problem", None) or reason(error)).split())
        return f"--set {override}: expected a YAML value after the =; {why}"
    section: Any = data
    for depth, key in enumerate(keys[:-1]):
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            return (
                f"--set {override}: expected {'.'.join(keys[: depth + 1])} to be a mapping; "
                f"got {_show(section)}"
            )
    section[keys[-1]] = value
    for path in [path for path in lines if path[: len(keys)] == tuple(keys)]:
        del lines[path]
    lines[tuple(keys)] = "--set "
    return None


def _fields(kind: Any) -> Mapping[str, Any]:
    """The pydantic fields of a settings class; empty for anything else."""
    return getattr(kind, "__pydantic_fields__", {})


def _name(method: Any) -> str:
    return str(method.get("name")) if isinstance(method, dict) else ""


def _without_index(path: Path_) -> Path_:
    return (path[0], *path[2:]) if path[:2] == ("method", 0) else path


def _known_paths(
    recipe: type[Recipe] | type[ReaderRecipe], data: Mapping[str, Any]
) -> Iterator[str]:
    """Dotted path of every key that a recipe with these methods (perhaps unknown) may have."""
    for name, field in recipe.model_fields.items():
        yield name
        if name not in ("method", "compare"):
            yield from (f"{name}.{key}" for key in _fields(field.annotation))
            continue
        value = data.get(name)
        for place, method in enumerate(value if isinstance(value, list) else [value]):
            keys = _fields(METHODS.get(_name(method))) or ("name",)
            yield from (f"{name}.{key}" for key in keys)
            yield from (f"{name}[{place}].{key}" for key in keys)


def _describe(error: Any, known: Sequence[str], lines: Lines) -> str:
    """One line for one of pydantic's errors: where, what was expected, what came."""
    path: Path_ = error["loc"]
    if path[0] in ("method", "compare"):
        # behind the method's place in the list, if there is one, comes the tag of the union: no key
        tag = 2 if len(path) > 1 and isinstance(path[1], int) else 1
        path = (*path[:tag], *path[tag + 1 :])
    context = error.get("ctx", {})
    got = f"got {_show(error['input'])}"
    choices = re.findall(r"'([^']*)'", str(context.get("expected", context.get("expected_tags"))))
    match error["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{_place(path, lines)}: {_unknown_key(path, known)}; {got}"
        case "missing" | "missing_argument":
            return f"{_place(path, lines)}: expected a value (the key is required); got nothing"
        case "union_tag_not_found" | "union_tag_invalid":
            choices = _methods_at(path)
            path, expected = (*path, "name"), f"one of {', '.join(choices)}"
            got = f"got {_show(context['tag'])}" if "tag" in context else "got nothing"
        case "value_error":
            # a rule of ours, or of a method: its text already says what was expected
            return f"{_place(path, lines)}: {context['error']}; {got}"
        case "model_type" | "dataclass_type" | "model_attributes_type" | "dict_type":
            keys = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == _dotted(path)]
            expected = "a mapping" + (f" with keys such as {', '.join(keys[:3])}" if keys else "")
        case _:
            expected = re.sub(r"^(?:Input|Value) should be ", "", error["msg"])
            expected = re.sub(r"^(greater|less) than", r"a number \1 than", expected)
    value = context.get("tag", error["input"])
    nearest = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{_place(path, lines)}: expected {expected}; {got}{hint}"


def _methods_at(path: Path_) -> list[str]:
    """Methods that may stand at a place: a lone one decides of which kind the recipe is."""
    return list(METHODS if path == ("method",) else RUNTIME_METHODS)


def _unknown_key(path: Path_, known: Sequence[str]) -> str:
    section, key = _dotted(path[:-1]), str(path[-1])
    here = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    nearest = [f"{section}.{k}".strip(".") for k in difflib.get_close_matches(key, here, n=1)]
    if not nearest:
        # perhaps the right key in the wrong section
        by_name = {k.rpartition(".")[2]: k for k in reversed(known)}
        nearest = [by_name[k] for k in difflib.get_close_matches(key, by_name, n=1, cutoff=0.8)]
    hint = f" (nearest known key: {nearest[0]})" if nearest else ""
    return f"expected one of the keys {', '.join(here)}{hint}"


def _place(path: Path_, lines: Lines) -> str:
    """Where a value stands: the line of the nearest key above it that has one, and its path."""
    above = (path[:n] for n in range(len(path), 0, -1))
    return next((lines[p] for p in above if p in lines), "") + _dotted(path)


def _line_number(problem: str) -> float:
    """Sort key: the order of the file, then the command line."""
    place = re.match(r"line (\d+),", problem)
    return int(place[1]) if place else float("inf")


def _dotted(path: Path_) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
