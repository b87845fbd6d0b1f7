"""Laws of recipes: shipped ones load, what is dumped loads again, all mistakes come at once."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from compress.eval.settings import Sampling
from compress.methods.fastocr import FastOCR
from compress.methods.gradflow import GradFlow, OneShot
from compress.methods.registry import RUNTIME_METHODS, WEIGHT_METHODS
from compress.methods.rtprune import RTPrune
from compress.methods.training import Recover, Train
from compress.runs.recipe import (
    METHODS,
    ReaderRecipe,
    Recipe,
    RecipeError,
    dump,
    list_recipes,
    load_recipe,
)

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.y*ml"))
ALL, RUNTIME = ", ".join(METHODS), ", ".join(RUNTIME_METHODS)
MINIMAL = "model: builtin:ddpm-digits\ndata: builtin:digits\nmethod: {name: gradflow}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_the_recipes_in_the_folder_are_those_that_are_listed():
    assert RECIPES and [path.stem for path in RECIPES] == [name for name, _ in list_recipes()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_by_path_and_by_name(path, monkeypatch, tmp_path):
    by_path = load_recipe(path)
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path.stem) == load_recipe(path.name) == by_path
    assert by_path.output == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_says_what_it_does_and_how_to_run_it(path):
    lines = path.read_text().splitlines()
    assert len(lines[0]) > 20 and lines[0].startswith("# ")
    assert f"compress run recipes/{path.name}" in lines[1]


@pytest.mark.parametrize("name", ["ddpm_cifar10", "ddpm_celeba64", "ddpm_church256", "sd15"])
def test_a_recipe_of_a_paper_says_what_it_takes_and_what_to_beat(name):
    [path] = [path for path in RECIPES if path.stem == f"{name}_gradflow"]
    head = path.read_text().split("model:")[0]
    for what in ("# Hardware: ", "# Time: ", "# Published, to beat: ", "# Protocol: "):
        assert head.count(what) == 1
    assert "NOT RUN by the authors" in head
    assert re.search(r"FID \d+\.\d", head) and re.search(r"arXiv \d{4}\.\d{5}", head)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_dump_loads_back_to_the_same_recipe(path, write):
    recipe = load_recipe(path)
    text = dump(recipe, header=["torch 2.6", "seed 0"])
    assert text.startswith("# torch 2.6\n# seed 0\nmodel:")
    assert load_recipe(write(text)) == recipe
    # and any other YAML reader understands the same
    assert type(recipe).model_validate(yaml.safe_load(text)) == recipe


@pytest.mark.parametrize("awkward", ["no", "5e-4", "1e5", "null", "012", "1:30", "~", "a: b", " x"])
def test_text_that_looks_like_something_else_survives_a_round_trip(awkward, write):
    recipe = Recipe(model=awkward, data="builtin:digits", method=OneShot(), output=awkward)
    assert load_recipe(write(dump(recipe))) == recipe


def test_defaults_are_those_of_the_classes(write):
    recipe = load_recipe(write(MINIMAL))
    assert recipe.method == GradFlow()
    assert (recipe.recover, recipe.train, recipe.evaluate) == (Recover(), Train(), Sampling())
    assert recipe.output == "runs/mine"


def test_methods_are_told_apart_by_name(write):
    for name, kind in METHODS.items():
        recipe = load_recipe(write(MINIMAL), [f"method={{name: {name}}}"])
        [method] = recipe.method if isinstance(recipe, ReaderRecipe) else [recipe.method]
        assert type(method) is kind and method.name == name


def test_run_time_methods_stand_alone_or_in_a_list(write):
    base = "model: builtin:reader-qwen\ndata: builtin:pages\n"
    alone = load_recipe(write(base + "method: {name: fastocr, focal_layers: [1, 3]}\n"))
    assert alone.method == [FastOCR(focal_layers=(1, 3))]
    both = load_recipe(
        write(base + "method: [{name: rtprune}, {name: fastocr, keep_visual: 0.1}]\n"),
        ["compare=[{name: rtprune, select: random}]"],
    )
    assert both.method == [RTPrune(), FastOCR(keep_visual=0.1)]
    assert both.compare == [RTPrune(select="random")]
    assert load_recipe(write(dump(both))) == both


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("method: {name: fastocr, keep_visual: 2}", "method.keep_visual: expected a number less"),
        ("method: {name: fastocr, keep_visul: 1}", "nearest known key: method.keep_visual"),
        ("method: [{name: rtprune, mergee: 1}]", "nearest known key: method[0].merge)"),
        ("method: [{name: gradflow}]", f"method[0].name: expected one of {RUNTIME}; got"),
        ("method: [{keep_tokens: 1}]", f"method[0].name: expected one of {RUNTIME}; got not"),
        ("method: []", "method: expected"),
        ("method: {name: rtprune}\ncompare: [{name: oneshot}]", "compare[0].name: expected one of"),
        ("method: {name: rtprune}\nrecover: {steps: 1}", "expected one of the keys model, data"),
        (
            "method: {name: fastocr, fixation: static, dilate: 1}",
            "dilate, min_mass and reuse belong to the dynamic fixation",
        ),
        ("method: {name: rtprune}\nevaluate: {steps: 20}", "evaluate.steps: expected"),
    ],
)
def test_a_mistake_in_a_recipe_of_a_reader_is_named_with_its_place(text, part, write):
    [problem] = problems(write("model: builtin:reader-qwen\ndata: builtin:pages\n" + text + "\n"))
    assert part in problem


def test_numbers_are_read_as_yaml_1_2_and_words_stay_words(write):
    text = MINIMAL + "recover: {lr: 5e-4}\ntrain: {mixed_precision: no}\n"
    recipe = load_recipe(write(text))
    assert recipe.recover.lr == 5e-4
    assert recipe.train.mixed_precision == "no"


def test_overrides_reach_every_depth_and_the_last_one_wins(write):
    recipe = load_recipe(
        write(MINIMAL),
        [
            "method.keep_macs=0.3",
            "method.keep_macs=0.4",
            "recover.lr=1e-3",
            "train.trackers=[tensorboard]",
            "seed=7",
            "output=runs/a=b",
        ],
    )
    assert recipe.method.keep_macs == 0.4
    assert recipe.recover.lr == 1e-3
    assert recipe.train.trackers == ("tensorboard",)
    assert (recipe.seed, recipe.output) == (7, "runs/a=b")


def test_an_override_does_not_reach_through_a_yaml_alias(write):
    text = MINIMAL.replace("{name: gradflow}", "{name: oneshot, steps: 5}")
    text += "recover: &steps {steps: 5}\nevaluate: *steps\n"
    recipe = load_recipe(write(text), ["recover.steps=6"])
    assert (recipe.recover.steps, recipe.evaluate.steps) == (6, 5)


def test_all_mistakes_come_in_one_message(write):
    text = """\
model: 3
keep_macs: 0.5
method:
  name: gradflow
  keep_mac: 0.4
  keep_macs: -1
  criterion: tailor
  steps: many
recover: {steps: true, lr: .nan, batch: 1.5}
train: {mixed_precision: "yes", mixed_precision: "no", trackers: [1]}
seed: -1
seed: 0
"""
    found = problems(write(text), "train.save_evry=9", "evaluate.samples=zero", "nonsense", "=3")
    expected = [
        ("line 1, model:", "string", "got 3"),
        ("line 2, keep_macs:", "nearest known key: method.keep_macs", "got 0.5"),
        ("line 5, method.keep_mac:", "nearest known key: method.keep_macs", "got 0.4"),
        ("line 6, method.keep_macs:", "greater than 0", "got -1"),
        ("line 7, method.criterion:", "did you mean 'taylor'?", 'got "tailor"'),
        ("line 8, method.steps:", "integer", 'got "many"'),
        ("line 9, recover.steps:", "integer", "got true"),
        ("line 9, recover.batch:", "integer", "got 1.5"),
        ("line 9, recover.lr:", "number", "got NaN"),
        ("line 10, train.mixed_precision:", "each key once", "after line 10"),
        ("line 10, train.trackers[0]:", "string", "got 1"),
        ("line 12, seed:", "each key once", "after line 11"),
        ("data:", "required", "got nothing"),
        ("--set train.save_evry:", "nearest known key: train.save_every", "got 9"),
        ("--set evaluate.samples:", "integer", 'got "zero"'),
        ("--set nonsense:", "expected path.to.key=value", ""),
        ("--set =3:", "expected path.to.key=value", ""),
    ]
    for parts in expected:
        assert sum(all(part in problem for part in parts) for problem in found) == 1, parts
    assert len(found) == len(expected)
    lines = [int(p.split(",")[0].split()[1]) for p in found if p.startswith("line ")]
    assert lines == sorted(lines)


def _sections() -> dict[str, type]:
    sections: dict[str, type] = {"": Recipe}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections[name] = field.annotation
    return sections


@pytest.mark.parametrize("section", [*_sections(), "gradflow", "oneshot"])
def test_every_key_is_named_when_it_is_misspelt(section, write):
    if section in METHODS:
        keys = list(METHODS[section].model_fields)
        path, base = "method", f"method={{name: {section}}}"
    else:
        keys, path, base = list(_sections()[section].model_fields), section, "seed=0"
    for key in keys:
        dotted = f"{path}.{key}".strip(".")
        [problem] = problems(write(MINIMAL), base, f"{dotted}_x=1")
        assert f"nearest known key: {dotted})" in problem
        assert all(other in problem for other in keys)


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("{name: gradflo}", "did you mean 'gradflow'?"),
        ("{name: [1]}", f"expected one of {ALL}"),
        ("{name: null}", f"expected one of {ALL}"),
        ("{keep_macs: 0.5}", f"expected one of {ALL}; got nothing"),
        ("gradflow", "expected a mapping"),
        ("null", "expected a mapping"),
    ],
)
def test_a_method_that_does_not_exist_lists_those_that_do(method, part, write):
    [problem] = problems(write(MINIMAL), f"method={method}")
    assert part in problem


@pytest.mark.parametrize("keep", ["-0.1", "0", "1.01", ".nan", ".inf", "'0.5'", "null", "[0.5]"])
@pytest.mark.parametrize("name", WEIGHT_METHODS)
def test_keep_macs_is_a_fraction(name, keep, write):
    [problem] = problems(write(MINIMAL), f"method={{name: {name}, keep_macs: {keep}}}")
    assert problem.startswith("--set method.keep_macs: expected a")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: a\n  b: c: d\n", "line 2, column 4"),
        ("model: [a\n", "line 2, column 1"),
        ("model: &a {x: *a}\n", "aliases written out"),
        ("model: !!python/object:os.system a\n", "line 1, column 8"),
        ("? [a, b]\n: 3\n", "unhashable"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("- 1\n", "must be a mapping with the keys model, data, method"),
        ("model: \x01\n", "special characters"),
    ],
)
def test_what_is_no_recipe_at_all_is_one_clear_message(text, part, write):
    with pytest.raises(RecipeError, match="mine.yaml") as caught:
        load_recipe(write(text))
    assert part in str(caught.value)


def test_an_empty_file_lacks_what_is_required(write):
    assert [p.split(":")[0] for p in problems(write(""))] == ["model", "data", "method"]


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"model: \xff\n")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(path)


def test_a_recipe_that_is_not_there_names_those_that_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean ddpm_gradflow"):
        load_recipe("ddpm_gradflo")
    with pytest.raises(FileNotFoundError, match="ddpm_oneshot"):
        load_recipe(tmp_path)


def test_recipes_are_frozen():
    recipe = load_recipe("ddpm_gradflow")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
