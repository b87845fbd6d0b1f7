"""Exported pipelines: only the UNet is new, plain diffusers draws the same, the size is known."""

import copy
import hashlib
import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DModel,
)
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import CLIPTextModel

from builders import models, pipelines, programs
from builders.drawing import draw
from builders.tiers import few
from compress.checkpoints.exporting import export, part_files
from compress.checkpoints.load import load
from compress.checkpoints.slim import save_slim
from compress.common.cost import unet_cost
from compress.methods.gradflow import GradFlow, surgery
from compress.methods.gradflow.allocation import plan
from compress.methods.gradflow.groups import dense_widths
from compress.methods.gradflow.masks import SoftUNet
from compress.methods.gradflow.unets import find_groups
from compress.models.loading import load_pipeline
from compress.models.locate import locate
from compress.runs.forecast import dry_run
from compress.runs.recipe import Recipe

# diffusers' Euler scheduler converts tensors in a way that NumPy 2 has deprecated
pytestmark = [
    pytest.mark.usefixtures("quick_runs"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
TOLERANCE = 1e-5
UPSCALE = "upscale"  # a class-conditional UNet2DConditionModel: the label is a noise level
NAMES = ["labels", "ldm", "sd1", "sd2", "sdxl", "ldm_text", UPSCALE]
# a UNet of images, one of latents and a class-conditional one of latents, by default
names = pytest.mark.parametrize("name", few(NAMES, "labels", "sdxl", UPSCALE))
OURS = {"README.md", "compress.json"}


def upscaler(folder) -> DiffusionPipeline:
    torch.manual_seed(1)
    tokens = pipelines.tokenizer(folder)
    four = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (4, 4, 4),
    }
    return StableDiffusionUpscalePipeline(
        vae=AutoencoderKL(**pipelines.AUTOENCODER | four, scaling_factor=0.08333),
        text_encoder=CLIPTextModel(pipelines.text_config(tokens)),
        tokenizer=tokens,
        unet=pipelines.conditional_unet(in_channels=7, out_channels=4, num_class_embeds=50),
        low_res_scheduler=DDPMScheduler(num_train_timesteps=50),
        scheduler=DDIMScheduler(**pipelines.LATENT_NOISE, clip_sample=False),
        max_noise_level=40,
    )


def write_source(name, folder):
    """A dense pipeline's folder, with files beside the weights that nobody reads."""
    if name == UPSCALE:
        pipeline = upscaler(folder / "words")
    elif name == "sdxl":
        torch.manual_seed(1)
        pipeline = pipelines.stable_diffusion_xl(folder / "words", zeros=False)
    else:
        pipeline = pipelines.build(name, folder / "words")
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            if parameter.dim() == 1:  # far from 0 and 1: a removed channel has something to leak
                parameter.add_(0.3 * torch.randn_like(parameter))
    source = folder / "dense"
    pipeline.save_pretrained(source)
    # another tool's formatting, which writing anew would not keep
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | {"_diffusers_version": "0.40.0"}))
    part = next(p for p in ("text_encoder", "vqvae", "unet") if (source / p).is_dir())
    save_file({"a": torch.zeros(3)}, source / part / "model.fp16.safetensors")
    (source / part / "pytorch_model.bin").write_bytes(b"pickled")
    return source


def slim_unet(unet, groups, method):
    layout, _ = plan(unet, groups, method)
    unet = models.narrowed(unet, layout)
    soft = SoftUNet(unet, layout).eval()
    soft.mask.copy_(models.binary_mask(layout))
    soft.adopt_slim_membership()
    return soft, surgery.perform(unet, layout, soft.mask).eval()


def masked_unet(unet, soft):
    """The dense UNet to look at, the masked one to call."""
    masked = copy.deepcopy(unet)

    def forward(sample, timestep, *given, return_dict=True, **inputs):
        names = list(inspect.signature(type(unet).forward).parameters)[3:]
        inputs |= dict(zip(names, given, strict=False))
        output = soft(
            sample, timestep, condition={k: v for k, v in inputs.items() if v is not None}
        )
        return type("Output", (), {"sample": output})() if return_dict else (output,)

    masked.forward = forward
    return masked


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """For each family: source, UNets, the dense and the masked images, the knobs, the groups."""
    folder = tmp_path_factory.mktemp("families")
    found = {}
    items = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params.get("name") for item in items if hasattr(item, "callspec")}
    for name in sorted(asked):
        source = write_source(name, folder / name)
        pipeline = load_pipeline(str(source))
        dense = pipeline.unet.eval()
        method = GradFlow(keep_macs=pipelines.KEEP.get(name, 0.55))
        groups = find_groups(dense)
        soft, slim = slim_unet(dense, groups, method)
        dense_images = draw(pipeline)
        pipeline.register_modules(unet=masked_unet(dense, soft))
        masked_images = draw(pipeline)
        pipeline.register_modules(unet=slim)
        save_slim(pipeline, folder / "slim" / name, {"base_model": name}, source=source)
        found[name] = (source, dense, slim, dense_images, masked_images, method, groups)
    folders = [folder / "slim" / name for name in found]
    done = programs.run("stranger", folder / "images.npz", *folders, cwd=folder)
    if "sdxl" in found:
        assert json.loads(done.stdout)["sdxl"]["force_zeros_for_empty_prompt"] is False
    return folder / "slim", found, np.load(folder / "images.npz")


def files_of(folder) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@names
def test_plain_diffusers_draws_what_the_masked_pipeline_draws(made, name):
    _, found, images = made
    _, _, _, dense, masked, *_ = found[name]
    assert images[name].shape == masked.shape
    assert np.abs(images[name] - masked).max() <= TOLERANCE
    # a blank picture would agree with anything
    assert masked.std() > 0.01 and np.abs(masked - dense).max() > 0.01


@names
def test_every_part_but_the_unet_is_the_sources_file_for_file(made, name):
    folder, found, _ = made
    source, _, slim, *_ = found[name]
    before, after = files_of(source), files_of(folder / name)
    unused = {path for path in before if path.endswith(("fp16.safetensors", ".bin"))}
    assert len(unused) == 2

    def others(paths):
        return {path for path in paths if not path.startswith("unet/")}

    assert others(after) - OURS == others(before) - unused
    for path in others(after) - OURS:
        assert after[path] == before[path], path
    unet = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert set(after) - others(after) == unet
    assert all(after[path] != before[path] for path in unet)
    loaded = load(folder / name)
    assert dense_widths(loaded.unet) == dense_widths(slim)
    for key, value in slim.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[key], value)


@names
def test_a_dry_run_predicts_groups_widths_macs_and_the_size(made, tmp_path, name):
    folder, found, _ = made
    source, dense, slim, _, _, method, groups = found[name]
    data = pipelines.pictures(tmp_path / "pictures", 40)
    recipe = {
        "model": str(source),
        "data": f"folder:{data}",
        "method": {"name": "gradflow", "keep_macs": method.keep_macs},
        "output": str(tmp_path / "run"),
    }
    prediction = dry_run(Recipe.model_validate(recipe), device="cpu")
    assert prediction["problems"] == []
    before, after = unet_cost(dense), unet_cost(slim)
    assert prediction["macs"] == [f"{before.macs:,} -> {after.macs:,}"]
    assert prediction["params"] == [f"{before.params:,} -> {after.params:,}"]
    assert prediction["widths"] == [f"{dense_widths(dense)} -> {dense_widths(slim)}"]
    # the weights, and the other parts' files; a UNet's configuration and header are not counted
    files = [p for p in (folder / name).rglob("*") if p.is_file() and p.name not in OURS]
    size = sum(path.stat().st_size for path in files)
    assert float(prediction["size"][0].split()[-2]) == pytest.approx(size / 1e6, abs=0.15)
    assert prediction["groups"][0].startswith(f"{len(groups)} in all")
    levels = [int(line.split()[2].rstrip(",")) for line in prediction["groups"][1:]]
    assert sum(levels) == len(groups) and len(levels) == len(dense_widths(dense))
    assert not (tmp_path / "run").exists()


# ---- sizes ----------------------------------------------------------------------------------


def test_a_flat_folder_is_exported_with_a_folder_for_each_part(tmp_path):
    pipeline = pipelines.build("ddpm", tmp_path)
    flat, target = tmp_path / "flat", tmp_path / "target"
    pipeline.unet.save_pretrained(flat)
    pipeline.scheduler.save_pretrained(flat)
    pipeline.save_config(flat)
    target.mkdir()
    loaded = load_pipeline(str(flat))
    assert part_files(flat, "scheduler") == []
    export(loaded, target, flat)
    again = load_pipeline(str(target))
    assert np.array_equal(draw(again), draw(loaded))
    assert again.scheduler.config.num_train_timesteps == pipelines.STEPS


def test_a_model_of_the_hub_is_exported_from_its_snapshot(tmp_path, monkeypatch):
    # a cache as the hub's client lays it out
    cache = tmp_path / "models--somebody--model"
    snapshot = cache / "snapshots" / "0123abcd"
    pipelines.build("ldm", tmp_path).save_pretrained(snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert locate("somebody/model", "diffusion").folder == snapshot


def test_bounds_hold_where_the_scores_decide_the_widths(tmp_path):
    from diffusers import DDPMPipeline

    unet = models.build("plain", block_out_channels=(16, 32), sample_size=16)
    source = tmp_path / "dense"
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=50)).save_pretrained(source)
    recipe = {
        "model": str(source),
        "data": "builtin:digits",
        "method": {"name": "gradflow", "keep_macs": 0.5, "allocation": "global"},
        "output": str(tmp_path / "run"),
    }
    prediction = dry_run(Recipe.model_validate(recipe), device="cpu")
    low, high = (
        int(n.replace(",", "")) for n in prediction["params"][0].split(" -> ")[1].split("to")
    )
    pipeline = load_pipeline(str(source))
    dense = pipeline.unet
    layout, allocator = plan(dense, find_groups(dense), GradFlow(allocation="global"))
    for seed in range(2):
        scores = torch.rand(layout.units, generator=torch.Generator().manual_seed(seed))
        slim = surgery.slim_unet(dense, allocator.layout(scores))
        assert type(slim) is not UNet2DModel
        pipeline.register_modules(unet=slim)
        folder = save_slim(pipeline, tmp_path / f"slim{seed}", {}, source=source)
        index = json.loads((folder / "model_index.json").read_text())
        assert index["unet"] == ["compress.models.free_width", "FreeWidthUNet2DModel"]
        assert (folder / "unet" / f"{index['unet'][0]}.py").is_file()
        assert low <= sum(p.numel() for p in slim.parameters()) <= high
        assert type(load(folder).unet) is type(slim)
    # a thin layer is cheap in MACs or in parameters, as its place has it: the bounds are wide
    assert high < sum(p.numel() for p in dense.parameters())
