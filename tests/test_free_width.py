"""The UNet with inner widths of its own: built from its config, saved, and loaded by diffusers."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from compress.checkpoint import load, save_slim
from compress.cost import unet_cost
from compress.gradflow.free_width import FreeWidthUNet2DModel, inner_width
from compress.gradflow.groups import find_groups

INNER = {
    "down_blocks.0.resnets.0": 12,
    "down_blocks.1.attentions.0": 4,
    "mid_block.resnets.1": 8,
    "mid_block.attentions.0": 12,
    "up_blocks.1.resnets.0": 4,
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LOAD = """
import sys

{first}
import numpy as np
import torch
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained(sys.argv[1], local_files_only=True)
pipeline.set_progress_bar_config(disable=True)
with torch.no_grad():
    images = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
    output = pipeline.unet(images, torch.tensor([3, 700])).sample
np.save(sys.argv[2], output.numpy())
images = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
print(type(pipeline.unet).__name__, images.shape)
"""


def free(models, name: str = "plain", inner=INNER, **changes) -> FreeWidthUNet2DModel:
    torch.manual_seed(0)
    config = models.CONFIGS[name] | {"block_out_channels": (8, 16)} | changes
    return FreeWidthUNet2DModel(inner_widths=inner, **config).eval()


@pytest.fixture
def folder(models, tmp_path):
    pipeline = DDPMPipeline(unet=free(models), scheduler=DDPMScheduler(num_train_timesteps=50))
    return save_slim(pipeline, tmp_path / "checkpoint", {"base_model": "somebody/model"})


def predict(unet) -> torch.Tensor:
    with torch.no_grad():
        return unet(torch.linspace(-1, 1, 128).view(2, 1, 8, 8), torch.tensor([3, 700])).sample


# ---- the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "one_head", "scale_shift"])
def test_layers_are_as_wide_as_the_config_says_and_others_as_their_level(models, name):
    unet, plain = free(models, name), models.build(name)
    assert predict(unet).shape == (2, 1, 8, 8)
    for module, inside in unet.named_modules():
        if hasattr(inside, "conv1") or hasattr(inside, "to_q"):
            expected = INNER.get(module, inner_width(plain.get_submodule(module)))
            assert inner_width(inside) == expected, module
            if hasattr(inside, "to_q") and name != "one_head":
                assert inside.heads == expected // 4
    assert list(unet.state_dict()) == list(plain.state_dict())
    assert unet_cost(unet).macs < unet_cost(plain).macs


def test_without_inner_widths_it_is_the_plain_model(models):
    plain = models.build("plain")
    for inner in (None, {}, {"mid_block.resnets.0": 16, "mid_block.attentions.0": 16}):
        unet = free(models, inner=inner)
        unet.load_state_dict(plain.state_dict())
        assert torch.equal(predict(unet), predict(plain))


def test_its_config_takes_every_key_of_the_plain_class():
    own = FreeWidthUNet2DModel._get_init_keys(FreeWidthUNet2DModel)
    plain = set(inspect.signature(UNet2DModel.__init__).parameters)
    assert own == plain | {"inner_widths"}


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
def test_impossible_inner_widths_are_refused_by_name(models, inner, message):
    with pytest.raises(ValueError, match=message):
        free(models, inner=inner)


def test_it_is_not_pruned_again(models):
    with pytest.raises(ValueError, match="inner widths of its own; prune the model that it was"):
        find_groups(free(models))


# ---- saved and loaded -----------------------------------------------------------------------


def test_what_is_loaded_predicts_the_same_bit_for_bit(models, folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    assert config["inner_widths"] == INNER and config["block_out_channels"] == [8, 16]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["compress.gradflow.free_width", "FreeWidthUNet2DModel"]
    loaded = load(folder)
    assert type(loaded) is DDPMPipeline and type(loaded.unet) is FreeWidthUNet2DModel
    assert torch.equal(predict(loaded.unet.eval()), predict(free(models)))
    alone = FreeWidthUNet2DModel.from_pretrained(folder / "unet").eval()
    assert torch.equal(predict(alone), predict(free(models)))
    assert dict(loaded.unet.config) | {"_name_or_path": ""} == dict(alone.config) | {
        "_name_or_path": ""
    }


def test_a_changed_byte_is_named(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="diffusion_pytorch_model"):
        load(folder)


def test_the_card_says_what_must_be_installed_and_imported(folder):
    card = (folder / "README.md").read_text()
    assert "import compress.gradflow.free_width\nfrom diffusers import DDPMPipeline" in card
    assert "needs no extra package" not in card


def test_plain_diffusers_loads_it_once_the_class_is_imported(models, folder, tmp_path):
    def run(first: str):
        script = LOAD.format(first=first)
        command = [sys.executable, "-P", "-c", script, str(folder), str(tmp_path / "out.npy")]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    done = run("import compress.gradflow.free_width")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "FreeWidthUNet2DModel (1, 8, 8, 1)"
    # another process may split sums over threads in another way
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), predict(free(models)), atol=1e-5)
    # diffusers imports no module because a folder names it, and says which one to import
    refused = run("")
    assert refused.returncode != 0
    assert "import compress.gradflow.free_width before calling" in refused.stderr
