"""Recipes that YAML reads in surprising ways: one message, at once."""

import re
import time

import pytest

from compress.common.settings import Settings
from compress.methods.registry import METHODS, WEIGHT_METHODS
from compress.runs.reader import forecast
from compress.runs.recipe import ReaderRecipe, Recipe, RecipeError, load_recipe

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "surrogate": 'model: "\\ud800"\n',
    "surrogate as a key": '"\\udfff": 1\n',
    "nested": "model: " + "[" * 300 + "]" * 300,
    "deeply nested": "[" * 100_000,
    "no int": "seed: !!int ''\n",
    "no bool": "seed: !!bool maybe\n",
    "no timestamp": "seed: !!timestamp x\n",
    "binary key": "{!!binary aGk=: 1}\n",
    "laughs": LAUGHS,
    "many values": "[" + "1," * 90_000 + "]",
    "many keys": "".join(f"k{i}: 1\n" for i in range(15_000)),
    "large": "model: " + "a " * 1_000_000,
    "a list in itself": "model: &a [*a]\n",
    "a mapping in itself": "&a model: 1\nmethod: &b {name: *b}\n",
    "a long number": f"seed: {'9' * 5000}\n",
    "null": "\0",
    "a python object": "model: !!python/object/apply:os.system [true]\n",
    "a set": "model: !!set {a, b}\n",
    "pairs": "model: !!pairs [a: 1]\n",
    "infinite": "seed: .inf\n",
    "a key of another type": "? [a, b]\n: 1\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_refused_at_once(name, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(HOSTILE[name])
    started = time.process_time()
    with pytest.raises(RecipeError, match=r"recipe\.yaml") as caught:
        load_recipe(path)
    str(caught.value).encode()
    if name in ("no int", "no bool", "no timestamp"):
        assert re.search(r"line 1, column 7: '\w*' does not fit its tag !!", str(caught.value))
    assert time.process_time() - started < 2


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "large"])
def test_a_hostile_override_is_refused_at_once(name):
    started = time.process_time()
    with pytest.raises(RecipeError):
        load_recipe("ddpm_gradflow", [f"model={HOSTILE[name].replace('model: ', '')}"])
    assert time.process_time() - started < 2


def test_aliases_within_bounds_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: &m builtin:ddpm-digits\ndata: builtin:digits\nmethod: {name: oneshot, "
        "keep_macs: 0.5}\noutput: *m\n"
    )
    assert load_recipe(path).output == "builtin:ddpm-digits"


@pytest.mark.parametrize(
    "override",
    [
        "evaluate.samples=3000000",
        "method.steps=99999999999",
        "recover.steps=99999999999",
        "recover.batch=99999999999",
        "evaluate.batch=99999999999",
        "evaluate.steps=99999999999",
        "evaluate.sampling_seeds=99999999999",
    ],
)
def test_numbers_beyond_any_use_are_refused(override):
    with pytest.raises(RecipeError, match="less than or equal to"):
        load_recipe("ddpm_gradflow", [override])


def numbers(kind, above=""):
    """Dotted keys of the whole numbers of settings that are no seeds."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from numbers(field.annotation, f"{above}{name}.")
        elif "int" in (kinds := str(field.annotation)) and "tuple" not in kinds and name != "seed":
            yield f"{above}{name}"


@pytest.mark.parametrize("name", METHODS)
def test_every_whole_number_has_an_upper_bound(name):
    kind, recipe = ReaderRecipe, "reader_fastocr"
    if name in WEIGHT_METHODS:
        kind, recipe = Recipe, "ddpm_gradflow"
    for key in (*numbers(kind), *(f"method.{key}" for key in numbers(METHODS[name]))):
        with pytest.raises(RecipeError, match=r"less than"):
            load_recipe(recipe, [f"method={{name: {name}}}", f"{key}=10000001"])


@pytest.mark.parametrize("key", ["seed", "method.seed"])
def test_seeds_are_what_generators_take(key):
    random = "method={name: fastocr, fixation: random}"
    for seed in (-1, 2**63):
        with pytest.raises(RecipeError, match="than"):
            load_recipe("reader_fastocr", [random, f"{key}={seed}"])
    load_recipe("reader_fastocr", [random, f"{key}={2**31 - 1}"])


@pytest.mark.parametrize("unseen", [False, True])
def test_a_dry_run_renders_no_pages_to_count_them(unseen):
    recipe = load_recipe(
        "reader_fastocr", ["evaluate.samples=100000", f"evaluate.unseen_font={unseen}".lower()]
    )
    predicted = forecast(recipe, "cpu")
    assert predicted["pages"] == 100_000 * (1 + unseen)
