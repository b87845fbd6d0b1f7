"""Recipes that YAML reads in surprising ways: one message, at once."""

import time

import pytest

from compress.runs.reader import forecast
from compress.runs.recipe import RecipeError, load_recipe

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
    assert time.process_time() - started < 2


@pytest.mark.parametrize("name", HOSTILE)
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


@pytest.mark.parametrize("key", ["evaluate.samples", "calibrate.pages"])
def test_more_pages_than_memory_holds_are_refused(key):
    with pytest.raises(RecipeError, match="less than or equal to 100000"):
        load_recipe("reader_fastocr", [f"{key}=100001"])


@pytest.mark.parametrize("unseen", [False, True])
def test_a_dry_run_renders_no_pages_to_count_them(unseen):
    recipe = load_recipe(
        "reader_fastocr", ["evaluate.samples=100000", f"evaluate.unseen_font={unseen}".lower()]
    )
    predicted = forecast(recipe, "cpu")
    assert predicted["pages"] == 100_000 * (1 + unseen)
