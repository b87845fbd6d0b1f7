"""The UNet with inner widths of its own: built from its config, saved, and loaded by diffusers."""

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import constants

from builders import models, programs
from builders.drawing import draw
from compress.checkpoints.load import load
from compress.checkpoints.slim import save_slim
from compress.common.cost import unet_cost
from compress.methods.gradflow import OneShot, surgery
from compress.methods.gradflow.allocation import plan
from compress.methods.gradflow.unets import find_groups
from compress.methods.gradflow.units import any_mask
from compress.models.free_width import FreeWidthUNet2DModel, inner_width
from compress.models.loading import load_pipeline
from compress.models.pipelines import with_parts

INNER = {
    "down_blocks.0.resnets.0": 12,
    "down_blocks.1.attentions.0": 4,
    "mid_block.resnets.1": 8,
    "mid_block.attentions.0": 12,
    "up_blocks.1.resnets.0": 4,
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CODE = "unet/compress.models.free_width.py"


def free(name: str = "plain", inner=INNER, **changes) -> FreeWidthUNet2DModel:
    torch.manual_seed(0)
    config = models.CONFIGS[name] | {"block_out_channels": (8, 16)} | changes
    return FreeWidthUNet2DModel(inner_widths=inner, **config).eval()


@pytest.fixture
def pipeline():
    return DDPMPipeline(unet=free(), scheduler=DDPMScheduler(num_train_timesteps=50))


@pytest.fixture
def folder(pipeline, tmp_path):
    return save_slim(pipeline, tmp_path / "checkpoint", {"base_model": "somebody/model"})


def predict(unet) -> torch.Tensor:
    with torch.no_grad():
        return unet(torch.linspace(-1, 1, 128).view(2, 1, 8, 8), torch.tensor([3, 700])).sample


# ---- the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "one_head", "scale_shift"])
def test_layers_are_as_wide_as_the_config_says_and_others_as_their_level(name):
    unet, plain = free(name), models.build(name)
    assert predict(unet).shape == (2, 1, 8, 8)
    for module, inside in unet.named_modules():
        if hasattr(inside, "conv1") or hasattr(inside, "to_q"):
            expected = INNER.get(module, inner_width(plain.get_submodule(module)))
            assert inner_width(inside) == expected, module
            if hasattr(inside, "to_q") and name != "one_head":
                assert inside.heads == expected // 4
    assert list(unet.state_dict()) == list(plain.state_dict())
    assert unet_cost(unet).macs < unet_cost(plain).macs


def test_without_inner_widths_it_is_the_plain_model():
    plain = models.build("plain")
    for inner in (None, {}, {"mid_block.resnets.0": 16, "mid_block.attentions.0": 16}):
        unet = free(inner=inner)
        unet.load_state_dict(plain.state_dict())
        assert torch.equal(predict(unet), predict(plain))


def test_its_config_takes_every_key_of_the_plain_class():
    own = FreeWidthUNet2DModel._get_init_keys(FreeWidthUNet2DModel)
    plain = set(inspect.signature(UNet2DModel.__init__).parameters)
    assert own == plain | {"inner_widths", "sinusoid_width"}


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"mid_block": 8}, "resnets and attentions of the model; got 'mid_block'"),
        ({"no.such.module": 8}, "got 'no.such.module'"),
        ({"mid_block.resnets.0": 6}, r"mid_block\.resnets\.0 .* the norm's groups, 4; got 6"),
        ({"mid_block.resnets.0": 0}, "got 0"),
        ({"mid_block.attentions.0": 6}, "the head's size, 4; got 6"),
    ],
)
def test_impossible_inner_widths_are_refused_by_name(inner, message):
    with pytest.raises(ValueError, match=message):
        free(inner=inner)


def test_it_is_not_pruned_again():
    with pytest.raises(ValueError, match="inner widths of its own; prune the model that it was"):
        find_groups(free())


# ---- saved and loaded -----------------------------------------------------------------------


def test_what_is_loaded_predicts_the_same_bit_for_bit(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    assert config["inner_widths"] == INNER and config["block_out_channels"] == [8, 16]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["compress.models.free_width", "FreeWidthUNet2DModel"]
    loaded = load(folder)
    assert type(loaded) is DDPMPipeline and type(loaded.unet) is FreeWidthUNet2DModel
    assert torch.equal(predict(loaded.unet.eval()), predict(free()))
    alone = FreeWidthUNet2DModel.from_pretrained(folder / "unet").eval()
    assert torch.equal(predict(alone), predict(free()))
    assert dict(loaded.unet.config) | {"_name_or_path": ""} == dict(alone.config) | {
        "_name_or_path": ""
    }


def test_a_changed_byte_is_named(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="diffusion_pytorch_model"):
        load(folder)


def test_the_card_says_how_diffusers_loads_it(folder):
    card = (folder / "README.md").read_text()
    assert f"`{CODE}`" in card and (folder / CODE).is_file()
    assert 'DDPMPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)' in card
    assert "needs no extra package" not in card


def test_plain_diffusers_draws_the_same_bit_for_bit_without_this_package(
    pipeline, folder, family, tmp_path
):
    images, dense = tmp_path / "images.npz", family("dit")
    made = {folder.name: (pipeline, "unet", "FreeWidthUNet2DModel")}
    for granularity, kind in (("block", ""), ("unit", "FreeWidth"), ("both", "FreeWidth")):
        method = OneShot(keep_macs=0.7, granularity=granularity)
        layout, _ = plan(dense.transformer, find_groups(dense.transformer), method)
        slim = surgery.perform(dense.transformer, layout, any_mask(layout)).eval()
        less = with_parts(dense, {"transformer": slim})
        save_slim(less, tmp_path / granularity, {"base_model": "somebody/model"})
        made[granularity] = (less, "transformer", f"{kind}DiTTransformer2DModel")
    folders = [folder, *(tmp_path / name for name in [*made][1:])]
    done = programs.run("stranger", "--trust", images, *folders, cwd=tmp_path)
    for name, (drawn, part, kind) in made.items():
        assert json.loads(done.stdout)[name][part] == kind
        expected = draw(drawn)
        assert np.load(images)[name].tobytes() == expected.tobytes()
        assert expected.std() > 0.01


def test_what_diffusers_saved_again_is_read_without_its_code(pipeline, folder, tmp_path):
    again = tmp_path / "again"
    DDPMPipeline.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
    index = json.loads((again / "model_index.json").read_text())
    assert index["unet"][0].startswith("diffusers_modules.")
    loaded = load(again)
    assert type(loaded.unet) is FreeWidthUNet2DModel
    assert np.array_equal(draw(loaded), draw(pipeline))
    # of such a package no other class is taken
    index["unet"] = ["diffusers_modules.local.compress.models.other", "FreeWidthUNet2DModel"]
    (again / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="code that comes with a model is not run"):
        load(again)


def test_the_code_of_a_folder_is_not_run_unless_it_is_trusted(pipeline, folder):
    (folder / CODE).write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match=f"in {CODE[5:]}[^$]*Pass `trust_remote_code=True`"):
        DDPMPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"{CODE} is not what was saved"):
        load(folder)
    loaded = load_pipeline(str(folder))
    assert type(loaded.unet) is FreeWidthUNet2DModel
    assert np.array_equal(draw(loaded), draw(pipeline))


def test_a_checkpoint_on_the_hub_is_read(pipeline, folder, tmp_path, monkeypatch):
    # a cache as the hub's client lays it out
    cache = tmp_path / "models--somebody--model"
    cache.mkdir()
    (cache / "snapshots").mkdir()
    folder.rename(cache / "snapshots" / "0123abcd")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = load("somebody/model")
    assert type(loaded.unet) is FreeWidthUNet2DModel
    assert np.array_equal(draw(loaded), draw(pipeline))
