"""Folders of pipelines as people have them: half precision, variants, removed and damaged parts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from compress.cli import app
from compress.models.loading import load_pipeline


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory) -> Path:
    """Stable Diffusion as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("saved") / "sd1"
    family("sd1").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


# ---- damaged folders -----------------------------------------------------------------------

Damage = Callable[[Path], object]


def index(**changes) -> Damage:
    return content("model_index.json", **changes)


def content(name: str, **changes) -> Damage:
    """Change keys of a JSON file; those that are to be `...` go."""

    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in found.items() if value is not ...}
        (folder / name).write_text(json.dumps(kept))

    return change


def text(name: str, written: str) -> Damage:
    return lambda folder: (folder / name).write_text(written)


def gone(name: str) -> Damage:
    def remove(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def renamed(part: str, *names: str) -> Damage:
    """Leave a part's weights under other names alone."""

    def rename(folder: Path) -> None:
        (weights,) = (folder / part).glob("*.safetensors")
        for name in names:
            shutil.copyfile(weights, folder / part / name)
        weights.unlink()

    return rename


def weights(part: str, change: Callable[[dict], dict]) -> Damage:
    def rewrite(folder: Path) -> None:
        (path,) = (folder / part).glob("*.safetensors")
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return rewrite


UNET = "unet/diffusion_pytorch_model.safetensors"
DAMAGED: dict[str, tuple[Damage, str]] = {
    "no class": (index(_class_name=...), "_class_name; got None, .*saved with 0"),
    "a class of the future": (
        index(_class_name="StableDiffusion9Pipeline", _diffusers_version="0.99.0"),
        "'StableDiffusion9Pipeline', which diffusers 0.* does not have .*saved with 0.99.0.*install",
    ),
    "a class that is a number": (index(_class_name=5), "_class_name; got 5"),
    "a class with code of its own": (index(_class_name=["mine", "Mine"]), "got .'mine', 'Mine'"),
    "a class that is no pipeline": (index(_class_name="AutoencoderKL"), "got 'AutoencoderKL'"),
    "no version": (index(_class_name="X", _diffusers_version=...), "version that it does not name"),
    "a list as index": (text("model_index.json", "[]"), "model_index.json should hold a JSON obj"),
    "no JSON as index": (text("model_index.json", "{"), "model_index.json should hold JSON"),
    "a number as part": (index(unet=5), "of the unet .*; got 5"),
    "a part without class": (index(unet=["diffusers"]), "of the unet .*; got .'diffusers'"),
    "a part that is null": (index(vae=[None, None]), "of the vae .*; got .None, None"),
    "a part that is not named": (index(scheduler=...), "of the scheduler .*; got None"),
    "another library": (index(unet=["antigravity", "fly"]), "of the unet .* fly of antigravity"),
    "code of the folder": (index(unet=["mine", "Mine"]), "Mine of mine.*code .* is not run"),
    "a class of the library's future": (index(unet=["diffusers", "UNet9"]), "UNet9 of diffusers"),
    "a part in another's place": (index(vae=["diffusers", "UNet2DModel"]), "the vae in .*vae"),
    "no scheduler": (gone("scheduler"), "has a scheduler, a PNDMScheduler, .* no such folder"),
    "no tokenizer": (gone("tokenizer"), "has a tokenizer, a CLIPTokenizer, .* no such folder"),
    "no vae": (gone("vae"), "has a vae, a AutoencoderKL, .* no such folder"),
    "no unet": (gone("unet"), "has a unet, .* no such folder"),
    "no config": (gone("vae/config.json"), "the vae, .* has a config.json; .* has none"),
    "no schedule": (gone("scheduler/scheduler_config.json"), "has a scheduler_config.json"),
    "an empty tokenizer": (gone("tokenizer/tokenizer.json"), "the tokenizer"),
    "a list as config": (text("unet/config.json", "[]"), "unet/config.json should hold"),
    "a list as text config": (text("text_encoder/config.json", "[]"), "encoder/config.json should"),
    "a list as schedule": (text("scheduler/scheduler_config.json", "[]"), "scheduler_config.json"),
    "a list as tokenizer": (text("tokenizer/tokenizer.json", "[]"), "the tokenizer"),
    "no JSON as config": (text("vae/config.json", "?"), "vae/config.json should hold JSON"),
    "an empty config": (text("text_encoder/config.json", "{}"), "text_encoder"),
    "words as widths": (content("unet/config.json", block_out_channels="wide"), "the unet in"),
    "groups that do not fit": (content("vae/config.json", norm_num_groups=3), "the vae in"),
    "an unknown activation": (content("text_encoder/config.json", hidden_act="x"), "text_encoder"),
    "an unknown schedule": (
        content("scheduler/scheduler_config.json", beta_schedule="mine"),
        "the scheduler in .*mine",
    ),
    "words as steps": (
        content("scheduler/scheduler_config.json", num_train_timesteps="many"),
        "the scheduler in",
    ),
    "quantised weights": (
        content("unet/config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "quantization_config",
    ),
    "pickled vae": (renamed("vae", "diffusion_pytorch_model.bin"), "the vae .*model.bin .*pickled"),
    "pickled text encoder": (
        renamed("text_encoder", "pytorch_model.bin"),
        "the text_encoder .*pic",
    ),
    "two variants": (
        renamed("vae", "model.fp16.safetensors", "model.bf16.safetensors"),
        "one variant are expected in .*vae; got those of bf16, fp16",
    ),
    "two variants in two parts": (
        lambda folder: [
            renamed("vae", "diffusion_pytorch_model.fp16.safetensors")(folder),
            renamed("text_encoder", "model.bf16.safetensors")(folder),
        ],
        "one variant are expected in .*; its parts have those of bf16, fp16",
    ),
    "an unusual name": (renamed("unet", "mine.safetensors"), "unet"),
    "cut weights": (
        lambda folder: (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-9]),
        "model.safetensors .*",
    ),
    "too few tensors": (
        weights("vae", lambda found: dict(list(found.items())[1:])),
        "vae.* 1 are missing",
    ),
    "tensors of another shape": (
        weights("unet", lambda found: found | {"conv_in.bias": torch.zeros(3)}),
        "unet.*conv_in.bias",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_one_line_that_names_what_is_wrong(folder, name):
    damage, message = DAMAGED[name]
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_pipeline(str(folder))
    told = CliRunner().invoke(app, ["eval", str(folder)])
    assert told.exit_code == 2 and told.stdout == "", told.output
    assert told.stderr.splitlines() == [f"error: {caught.value}"]
