"""Damaged recipes and model folders: each is read, or refused in one line that names it."""

import copy
import json
import random
import re
import signal
import struct
from pathlib import Path

import pytest
import yaml

import compress
from builders import pipelines, vlm
from compress.runs.recipe import RecipeError, list_recipes, load_recipe

SECONDS = 5  # after which a case counts as one that never ends
ODD = [None, True, -1, 0, 7, 0.5, 1e308, "", "x", "a\nb", "x" * 100_000, [], {}, [[]], [{"a": {}}]]
ODD += [{"a": None}, [None], -(10**30), "../x", "torch.float64"]
KEYS = ["", "a\nb", "\x1b[2J", "\ud800", "x" * 10_000, "auto_map", "../x"]
RECIPES = Path(__file__).parents[1] / "recipes"
TIERS = [pytest.param(0), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 9))]
CASES = {"recipe": 2, "json": 1, "safetensors": 2}  # for each file and seed


def places(value, path=()):
    """Every key and index in nested mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def damaged_value(content, draw):
    """A copy with a key removed or renamed, or a value of another kind; and what was done."""
    content = copy.deepcopy(content)
    path = draw.choice(list(places(content)))
    at = content
    for key in path[:-1]:
        at = at[key]
    way = draw.random()
    if way < 0.2:
        del at[path[-1]]
        return content, f"{path} removed"
    if way < 0.3 and isinstance(at, dict):
        key = draw.choice(KEYS)
        at[key] = at.pop(path[-1])
        return content, f"{path} renamed {key!r:.40}"
    value = copy.deepcopy(draw.choice(ODD))
    at[path[-1]] = value
    return content, f"{path} = {value!r:.40}"


def damaged_bytes(content, draw):
    """Bytes with some flipped or with an end that is missing; and what was done."""
    at = draw.randrange(len(content))
    if draw.random() < 0.3:
        return content[:at], f"cut at {at}"
    changed = bytearray(content)
    places = [draw.randrange(len(content)) for _ in range(draw.choice([1, 1, 4]))]
    for at in places:
        changed[at] ^= 1 << draw.randrange(8)
    return bytes(changed), f"bits of {places} flipped"


def damaged_recipe(content, draw):
    if draw.random() < 0.3:
        return damaged_bytes(content, draw)
    value, what = damaged_value(yaml.safe_load(content), draw)
    return yaml.safe_dump(value).encode(), what


def damaged_json(content, draw):
    if draw.random() < 0.2:
        return damaged_bytes(content, draw)
    value, what = damaged_value(json.loads(content), draw)
    return json.dumps(value).encode(), what


def damaged_safetensors(content, draw):
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    way = draw.random()
    if way < 0.2:
        length = draw.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + header + data, f"length of the header = {length}"
    if way < 0.4:
        return damaged_bytes(content, draw)
    changed, what = damaged_bytes(header, draw) if way < 0.6 else damaged_json(header, draw)
    return struct.pack("<Q", len(changed)) + changed + data, f"header: {what}"


DAMAGED = {"recipe": damaged_recipe, "json": damaged_json, "safetensors": damaged_safetensors}


@pytest.fixture
def watched(monkeypatch):
    """Fails a test that asks its user, or whose case does not end."""

    def fail(*_):
        pytest.fail("asked its user" if not _ or isinstance(_[0], str) else "did not end")

    monkeypatch.setattr("builtins.input", fail)
    before = signal.signal(signal.SIGALRM, fail)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def lists(error):
    """How many problems an error lists below its line, as those of recipes do."""
    listing = re.match(r"recipe \S+ has (\d+) problem", str(error))
    return int(listing[1]) if isinstance(error, RecipeError) and listing else 0


def try_damage(path, kind, seed, read):
    """Damage a file in several ways, one after the other, and read what it is a part of."""
    whole, wrong = path.read_bytes(), []
    for case in range(CASES[kind]):
        draw = random.Random(f"{seed} {case} {path.name}")
        content, what = DAMAGED[kind](whole, draw)
        path.write_bytes(content)
        signal.alarm(SECONDS)
        try:
            read()
        except (ValueError, OSError) as error:
            text = str(error)
            named = path.name in text or str(path.parent) in text
            short = all(len(line) < 3000 and line.isprintable() for line in text.split("\n"))
            if not named or not short or text.count("\n") != lists(error):
                wrong.append(f"seed {seed}, case {case}, {what}: {type(error).__name__}: {text}")
        except BaseException as error:  # a case that never ends, too
            wrong.append(f"seed {seed}, case {case}, {what}: {type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
            path.write_bytes(whole)
    assert not wrong, f"{path}\n" + "\n".join(wrong)


@pytest.mark.parametrize("seed", TIERS)
@pytest.mark.parametrize("name", [name for name, _ in list_recipes()])
def test_a_damaged_recipe(name, seed, tmp_path, watched):
    path = tmp_path / f"{name}.yaml"
    path.write_bytes((RECIPES / path.name).read_bytes())

    try_damage(path, "recipe", seed, lambda: load_recipe(path))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline with prompts and a reader, saved."""
    made = {name: tmp_path_factory.mktemp(name) / "model" for name in ("sd1", "qwen2_5_vl")}
    pipelines.build("sd1", tmp_path_factory.mktemp("words")).save_pretrained(made["sd1"])
    for part in vlm.build("qwen2_5_vl"):
        part.save_pretrained(made["qwen2_5_vl"])
    return made


FILES = {
    "sd1": """
        model_index.json
        scheduler/scheduler_config.json
        text_encoder/config.json text_encoder/model.safetensors
        tokenizer/tokenizer.json tokenizer/tokenizer_config.json
        unet/config.json unet/diffusion_pytorch_model.safetensors
        vae/config.json vae/diffusion_pytorch_model.safetensors
    """,
    "qwen2_5_vl": """
        config.json generation_config.json model.safetensors
        processor_config.json tokenizer.json tokenizer_config.json
    """,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", TIERS)
@pytest.mark.parametrize(
    ("model", "file"), [(model, file) for model in FILES for file in FILES[model].split()]
)
def test_a_damaged_file_of_a_model(model, file, seed, folders, watched):
    path = folders[model] / file
    kind = path.suffix.removeprefix(".")
    try_damage(path, kind, seed, lambda: compress.load(folders[model]))


def test_every_file_of_the_models_is_damaged(folders):
    for model, folder in folders.items():
        found = [path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")]
        assert sorted(FILES[model].split()) == sorted(
            path.relative_to(folder).as_posix() for path in found
        )
