"""No code of a model folder runs, and nobody is asked whether it shall."""

import builtins
import json
import shutil
import sys

import pytest

from builders import vlm
from compress.checkpoints.load import load
from compress.models.locate import BUILTIN
from compress.models.vlm import load_processor_of, load_vlm

CODE = """
import pathlib

pathlib.Path({mark!r}).touch()
from transformers import *


class Config(PreTrainedConfig):
    model_type = "mine"


class Model(PreTrainedModel):
    config_class = Config


class Processor(ProcessorMixin):
    pass


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "mine.Config",
    "AutoModel": "mine.Model",
    "AutoModelForImageTextToText": "mine.Model",
    "AutoProcessor": "mine.Processor",
    "AutoImageProcessor": "mine.Processor",
    "AutoVideoProcessor": "mine.Processor",
    "AutoTokenizer": ["mine.Tokenizer", "mine.Tokenizer"],
}


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """Somebody at the terminal who answers every question with yes."""
    mark = tmp_path / "the-code-ran"

    def answer(question=""):
        mark.touch()
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    before = set(sys.modules)
    yield mark
    assert not mark.exists()
    assert not [name for name in set(sys.modules) - before if name.endswith("mine")]


def infect(folder, mark, without=()):
    """Put code into a folder, and let all of its settings name it."""
    (folder / "mine.py").write_text(CODE.format(mark=str(mark)))
    (folder / "custom_generate").mkdir()
    generate = CODE.format(mark=str(mark)) + "def generate(**_):\n    pass\n"
    (folder / "custom_generate" / "generate.py").write_text(generate)
    for path in folder.glob("*config.json"):
        content = json.loads(path.read_text()) | {"auto_map": AUTO_MAP}
        path.write_text(json.dumps({k: v for k, v in content.items() if k not in without}))


# transformers looks for its own class in one file after the other
NAMES = ("processor_class", "tokenizer_class", "image_processor_type")


@pytest.mark.parametrize("without", [(), NAMES, (*NAMES, "model_type")])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm_ocr", "deepseek_ocr2", "mine"])
def test_a_reader_runs_no_code_of_its_folder(name, without, mark, tmp_path):
    folder = tmp_path / "model"
    model, processor = vlm.build("qwen2_5_vl" if name == "mine" else name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    infect(folder, mark, without)
    if name == "mine":
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mine"}))
    try:
        loaded, _ = load_vlm(folder)
    except ValueError as error:
        assert without or name == "mine", error
    else:
        assert type(loaded) is type(model) and "model_type" not in without


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(template, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.models.vlm.TEMPLATE_SECONDS", 0.2)
    folder = shutil.copytree(BUILTIN / "reader-qwen", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    before = sys.gettrace()
    with pytest.raises(ValueError, match="the chat template is not done after 0.2 seconds"):
        load_processor_of(folder)
    assert sys.gettrace() is before


@pytest.mark.parametrize("where", ["index", "class", "part"])
def test_a_pipeline_runs_no_code_of_its_folder(where, mark, tmp_path):
    folder = shutil.copytree(BUILTIN / "ddpm-digits", tmp_path / "model")
    for place in (folder, folder / "unet"):
        (place / "mine.py").write_text(CODE.format(mark=str(mark)))
    index = json.loads((folder / "model_index.json").read_text())
    if where == "class":
        index["_class_name"] = ["mine", "Model"]
    elif where == "index":
        index["unet"] = ["mine", "Model"]
    else:
        config = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
        index["unet"] = ["diffusers", "AutoModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError):
        load(folder)
