"""Every family of pipelines is trained, sampled, saved and resumed by the same code."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel
from typer.testing import CliRunner

import compress
from builders import models, pipelines, programs
from builders.events import leave
from builders.forks import free_port
from builders.tiers import few
from compress.cli import app
from compress.common.cost import unet_cost
from compress.common.events import drain
from compress.common.journal import Journal
from compress.data.columns import Columns
from compress.data.sources import Pairs, load_images, stacked
from compress.eval import fidelity, sampling
from compress.eval.settings import Sampling, SamplingSettings
from compress.methods.base import PruneJob
from compress.methods.gradflow import GradFlow, OneShot, surgery
from compress.methods.gradflow.layout import build_layout
from compress.methods.gradflow.masks import SoftUNet
from compress.methods.gradflow.train import PruningRun
from compress.methods.gradflow.unets import find_groups
from compress.methods.training import Training
from compress.models.loading import load_pipeline
from compress.models.objective import validation_loss
from compress.models.pipelines import (
    cast,
    check_pipeline,
    condition_of,
    image_shape,
    placed,
    with_parts,
)
from compress.reports.comparison import compare
from compress.runs import diffusion as runs
from compress.runs.forecast import dry_run
from compress.runs.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick_runs")

NAMES = ("ddpm", "ddim", "labels", "ldm", "sd1", "sd2", "sdxl", "ldm_text")
PROMPTED = ("sd1", "sd2", "sdxl", "ldm_text")
FLOW, RECOVER = 3, 2
SIDES = ("dense", "compressed")
METHOD = {
    "steps": FLOW,
    "update_every": 1,
    "criterion_every": 2,
    "criterion_batches": 1,
    "max_move": 0.8,
    "settle": 0.34,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return pipelines.pictures(tmp_path_factory.mktemp("data") / "pictures", 40)


@pytest.fixture(scope="module")
def start(family, pictures):
    """Begin a pruning run of a family."""

    def begin(name: str, folder=None, *, resume=False, **changes):
        pipeline = family(name)
        size = image_shape(pipeline)
        source = "builtin:digits" if size == ((16, 16), 1) else f"folder:{pictures}"
        settings = {"steps": RECOVER, "batch": 4, "save_every": 1} | changes
        job = PruneJob(
            pipeline,
            load_images(source, *size, condition_of(pipeline)),
            Training(**{"condition_dropout": 0.5, "distill_features": 0.1} | settings),
            "cpu",
            Journal(folder),
            resume,
        )
        method = GradFlow(keep_macs=pipelines.KEEP[name], criterion="gradient_flow", **METHOD)
        return PruningRun(method, job)

    return begin


@pytest.fixture(scope="module")
def finished(start):
    """A run of every family to the end, made when first asked for."""
    made = {}

    def get(name: str):
        if name not in made:
            run = start(name)
            made[name] = (run, drain(run.events()))
        return made[name]

    return get


def losses(run: PruningRun) -> list[float]:
    """Of the optimiser steps; rows of validation have a loss, too."""
    return [row["loss"] for row in run.journal.rows if "lr" in row]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def frozen(pipeline) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module) and name != "unet"
        for key, value in part.state_dict().items()
    }


# ---- training ------------------------------------------------------------------------------


# the first is that of test_pipeline.py; with labels, with captions and latents, with sizes
@pytest.mark.parametrize("name", few(NAMES[1:], "labels", "sd1", "sdxl"))
def test_every_family_goes_through_flow_surgery_and_recovery(family, finished, name):
    before = frozen(family(name))
    run, pruned = finished(name)
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in run.model.parameters()}
    dense, slim = family(name).unet, pruned.model
    assert type(slim) is type(dense)
    widths = [row["compressed"] for row in pruned.widths]
    assert list(slim.config.block_out_channels) == widths
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in dense.parameters())
    facts = pruned.report["surgery"]
    assert facts["loss_slim"] == pytest.approx(facts["loss_masked"], abs=1e-4)
    assert facts["max_difference"] < 1e-3
    assert len(losses(run)) == FLOW + RECOVER and all(0 < loss < 10 for loss in losses(run))
    assert same(frozen(family(name)), before)
    slim_pipeline = with_parts(family(name), {"unet": slim})
    conditions = {"caption": ["red"], "label": [1], None: ()}[condition_of(slim_pipeline)]
    images = sampling.sample(
        slim_pipeline, count=2, steps=2, sampler="ddim", seed=0, conditions=conditions
    )
    size, channels = image_shape(slim_pipeline)
    assert images.shape == (2, channels, *size)


@pytest.mark.parametrize("name", few(["ddim", "labels", "sd2", "sdxl"], "ddim", "sd2"))
def test_losses_are_those_of_the_definition(family, start, name):
    run, dense = start(name, distill=0.0, distill_features=0.0, condition_dropout=0.0), family(name)
    scheduler = DDPMScheduler(50, beta_schedule=dense.scheduler.config.beta_schedule)

    def target(batch) -> torch.Tensor:
        return {
            "ddim": lambda: batch.images,
            "sd2": lambda: scheduler.get_velocity(*batch[:3]),
        }.get(name, lambda: batch.noise)()

    # training: before anything is masked or trained, but with the narrower sinusoid
    (given,) = run._examples(run.training.seed, 0, 1)
    batch = run.inputs.batch(given, 50, 0, 0, 0, 4)
    with torch.no_grad():
        noisy = scheduler.add_noise(*batch[:3])
        predicted = run.first(noisy, batch.timesteps, **batch.condition).sample
    expected = (predicted - target(batch)).square().mean().item()
    assert run._optimise(given) == pytest.approx(expected, rel=1e-5)
    # validation: what a network that says nothing is off by
    data, pairs = run.data, Pairs(run.data.held_out, run.data.held_out_conditions)
    examples = stacked(pairs[i] for i in range(4))
    batches = [run.inputs.batch(examples, 50, 99, draw) for draw in range(2)]
    found = validation_loss(
        lambda noisy, t, **condition: torch.zeros_like(noisy),
        examples.images,
        run.scheduler,
        inputs=run.inputs,
        conditions=data.held_out_conditions,
    )
    squares = [target(batch).square().mean().item() for batch in batches]
    assert found == pytest.approx(sum(squares) / 2, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, FLOW + 1], ids=["in the flow", "in the recovery"])
def test_a_resumed_run_ends_with_the_same_weights(start, finished, tmp_path, step):
    leave(start("sd1", tmp_path).events(), step)
    resumed = start("sd1", tmp_path, resume=True)
    assert resumed.step == step
    assert same(drain(resumed.events()).model.state_dict(), finished("sd1")[1].model.state_dict())


def test_captions_and_their_dropout_matter_to_the_loss(start, finished):
    found = [losses(finished("sd1")[0])]
    for share in (0.0, 1.0):
        run = start("sd1", condition_dropout=share)
        next(run.events())
        found.append(losses(run))
    assert len({row[0] for row in found}) == 3
    assert all(row[0] == pytest.approx(found[0][0], rel=0.2) for row in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_checkpointed_activations_give_the_same_losses(start, finished, name):
    checkpointed = start(name, gradient_checkpointing=True)
    # the flow of one and the recovery, too, of the other
    leave(checkpointed.events(), 2 if name == "sdxl" else FLOW + 1)
    found = losses(checkpointed)
    assert losses(finished(name)[0])[: len(found)] == pytest.approx(found, rel=1e-4)


@pytest.mark.slow
def test_accumulated_gradients_see_the_same_batch(start, finished):
    run = start("sd1", gradient_accumulation=2, distill_features=0.0)
    next(run.events())
    plain = start("sd1", distill_features=0.0)
    next(plain.events())
    assert losses(plain) == pytest.approx(losses(run), rel=1e-5)


@pytest.mark.slow
def test_bf16_trains_what_takes_prompts(start, finished):
    # accelerate keeps one precision per process
    plain = losses(finished("sd1")[0])
    AcceleratorState._reset_state(True)
    try:
        run = start("sd1", mixed_precision="bf16")
        pruned = drain(run.events())
    finally:
        AcceleratorState._reset_state(True)
    assert {p.dtype for p in pruned.model.parameters()} == {torch.float32}
    assert losses(run) != plain and losses(run) == pytest.approx(plain, rel=0.05)


def test_apply_gives_the_frozen_parts_back_as_they_were(family, pictures):
    pipeline = copy.deepcopy(family("sd1"))
    pipeline.vae.train()
    pipeline.text_encoder.requires_grad_(False)
    before, unet = frozen(pipeline), copy.deepcopy(pipeline.unet.state_dict())
    compressed = compress.apply(
        pipeline,
        OneShot(keep_macs=pipelines.KEEP["sd1"], steps=0, criterion="magnitude"),
        data=f"folder:{pictures}",
        training=Training(steps=1, batch=2),
        device="cpu",
    )
    assert same(frozen(pipeline), before) and same(pipeline.unet.state_dict(), unet)
    assert pipeline.vae.training and not pipeline.text_encoder.training
    assert type(compressed.model) is StableDiffusionPipeline
    assert compressed.model.vae is pipeline.vae
    with pytest.raises(ValueError, match="takes a caption"):
        images = load_images(f"folder:{pictures}", 16, 3).train
        compress.apply(pipeline, OneShot(keep_macs=0.55, steps=0), data=images, device="cpu")


# ---- pipelines in memory, as people have them ----------------------------------------------


def halved(dtype: torch.dtype):
    def change(pipeline) -> None:
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            cast(part, dtype)

    return change


def compiled(pipeline) -> None:
    pipeline.unet = torch.compile(pipeline.unet)
    pipeline.vae = torch.compile(pipeline.vae)


def frozen_parts(pipeline) -> None:
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)


def tensors(pipeline) -> dict[str, torch.Tensor]:
    unet = {f"unet.{key}": value for key, value in pipeline.unet.state_dict().items()}
    return frozen(pipeline) | unet


@pytest.fixture(scope="module")
def applied(pictures):
    def apply(pipeline):
        torch.manual_seed(0)
        method = OneShot(keep_macs=pipelines.KEEP["sd1"], steps=0, criterion="magnitude")
        training = Training(steps=1, batch=2)
        data = f"folder:{pictures}"
        return compress.apply(pipeline, method, data=data, training=training, device="cpu").model

    return apply


@pytest.fixture(scope="module")
def cut(family, applied):
    """The slim UNet of the pipeline as it is."""
    return applied(copy.deepcopy(family("sd1"))).unet


@pytest.mark.parametrize(
    "change",
    [
        halved(torch.float16),
        pytest.param(halved(torch.bfloat16), marks=pytest.mark.slow),
        pytest.param(halved(torch.float64), marks=pytest.mark.slow),
        pytest.param(lambda pipeline: cast(pipeline.vae, torch.float16), marks=pytest.mark.slow),
        pytest.param(compiled, marks=pytest.mark.slow),
        pytest.param(lambda pipeline: pipeline.unet.compile(), marks=pytest.mark.slow),
        pytest.param(frozen_parts, marks=pytest.mark.slow),
    ],
    ids=["float16", "bfloat16", "float64", "half vae", "compiled", "compiled in place", "frozen"],
)
def test_apply_trains_a_float32_copy_and_gives_back_the_dtype_it_was_given(
    family, applied, cut, change
):
    given = copy.deepcopy(family("sd1"))
    change(given)
    before = {key: value.clone() for key, value in tensors(given).items()}
    found = applied(given)
    assert same(tensors(given), before)
    assert found.unet.dtype == given.unet.dtype and found.vae is getattr(
        given.vae, "_orig_mod", given.vae
    )
    if found.vae.dtype == found.unet.dtype:
        found.set_progress_bar_config(disable=True)
        assert found("red", num_inference_steps=1, output_type="np").images.shape[0] == 1
    plain = copy.deepcopy(with_parts(given, {}))
    halved(torch.float32)(plain)
    plain.unet.requires_grad_(True)
    unchanged = same(tensors(plain), tensors(family("sd1")))
    expected = copy.deepcopy(cut if unchanged else applied(plain).unet)
    cast(expected, found.unet.dtype)
    for key, value in expected.state_dict().items():
        # half precision rounds to 3 digits; memory that lies elsewhere may be added up otherwise
        assert torch.allclose(found.unet.state_dict()[key], value, rtol=1e-2, atol=1e-3)


def replaced(pipeline) -> None:
    pipeline.unet.conv_in = torch.nn.Conv2d(4, 8, 5, padding=2)


def quantised(pipeline) -> None:
    weight = pipeline.text_encoder.final_layer_norm.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.int8)


def cast_layer_by_layer(pipeline) -> None:
    pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


NOT_IN_MEMORY = {
    "meta": (lambda p: p.unet.to("meta"), "the unet lies on the meta device"),
    "offload": (lambda p: p.enable_model_cpu_offload(device="cpu"), "the vae has hooks"),
    "layerwise": (cast_layer_by_layer, "the unet has hooks"),
    "fused": (lambda p: p.fuse_qkv_projections(), "parameters that its config describes.*to_qkv"),
    "replaced": (replaced, "parameters that its config describes; conv_in.weight"),
    "adapters": (
        lambda p: setattr(p.text_encoder, "_hf_peft_config_loaded", True),
        "the text_encoder has adapters; call unload",
    ),
    "quantised": (quantised, "the text_encoder is quantised"),
    "a stranger's network": (
        lambda p: setattr(p, "unet", torch.nn.Linear(1, 1)),
        "the unet should be a model of diffusers; got a Linear",
    ),
}


@pytest.mark.parametrize("name", NOT_IN_MEMORY)
def test_pipelines_that_are_not_plain_weights_are_refused_by_name(family, name):
    change, message = NOT_IN_MEMORY[name]
    pipeline = copy.deepcopy(family("sd1"))
    change(pipeline)
    with pytest.raises(ValueError, match=message):
        compress.apply(pipeline, "oneshot", data="folder:nowhere", device="cpu")


@pytest.mark.parametrize("changes", [{"num_class_embeds": 7}, {"class_embed_type": "timestep"}])
def test_a_class_conditional_unet_masked_is_the_slim_one(changes):
    unet = models.build("plain", **changes)
    layout = build_layout(unet, find_groups(unet), (4, 12))
    unet = models.narrowed(unet, layout)
    soft = SoftUNet(unet, layout).eval()
    noisy, times = models.inputs(unet)
    known = {"class_labels": torch.tensor([1, 5])}
    with torch.no_grad():
        dense = unet(noisy, times, **known).sample
        assert (soft(noisy, times, condition=known) - dense).abs().max() <= 1e-5
        assert (
            unet(noisy, times, class_labels=torch.tensor([5, 1])).sample - dense
        ).abs().max() > 0
    soft.mask.copy_(models.binary_mask(layout))
    soft.adopt_slim_membership()
    slim = surgery.perform(unet, layout, soft.mask).eval()
    with torch.no_grad():
        expected = slim(noisy, times, **known).sample
        assert (expected - dense).abs().max() > 0.01
        assert (soft(noisy, times, condition=known) - expected).abs().max() <= 1e-5


# ---- from a recipe to a folder -------------------------------------------------------------


def recipe(model: Path, data: Path, keep: float, **evaluate) -> Recipe:
    return Recipe.model_validate(
        {
            "model": str(model),
            "data": f"folder:{data}",
            "columns": {"caption": "words"},
            "method": {"name": "gradflow", "keep_macs": keep, **METHOD},
            "recover": {"steps": RECOVER, "batch": 4},
            "evaluate": {"samples": 6, "steps": 2, "sampling_seeds": 2, "batch": 4} | evaluate,
        }
    )


@pytest.mark.slow  # test_transformer_pipelines.py runs a recipe with captions by default
def test_a_recipe_with_captions_leaves_a_pipeline_that_plain_diffusers_loads_and_samples(
    family, tmp_path, monkeypatch
):
    # Inception's weights are not at hand; the pictures have the size of the digits
    monkeypatch.setattr(fidelity, "extractor_of", lambda data: fidelity.DIGITS)
    data = pipelines.pictures(tmp_path / "pictures", 40, column="words")
    family("sd1").save_pretrained(tmp_path / "model")
    asked = recipe(tmp_path / "model", data, pipelines.KEEP["sd1"])
    assert dry_run(asked, device="cpu")["problems"] == []
    result = compress.run(asked, output=tmp_path / "run", device="cpu")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "run" / "checkpoint")
    assert type(loaded) is StableDiffusionPipeline
    assert tuple(loaded.unet.config.block_out_channels) == (4, 12)
    assert same(frozen(loaded), frozen(family("sd1")))
    loaded.set_progress_bar_config(disable=True)
    assert loaded("red 4", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    table = result.metrics["metrics"]
    assert {"fid_digits", "ssim_to_dense", "validation_loss", "latency_ms"} <= set(table)
    assert "4 conditions in turn, guidance 7.5" in table["ssim_to_dense"]["how"]
    assert "of latents; each with its caption" in table["validation_loss"]["how"]
    # the same numbers as a stranger would measure of the folder
    found = runs.evaluate_pipeline(
        str(result.checkpoint),
        Sampling(samples=6, steps=2, sampling_seeds=2),
        data=f"folder:{data}",
        columns=Columns(caption="words"),
        device="cpu",
    )
    for name in ("validation_loss", "fid_digits", "params"):
        assert found[name]["value"] == pytest.approx(table[name]["compressed"]["value"], rel=1e-3)


def test_without_inceptions_weights_everything_else_is_measured_and_the_rows_say_why(
    family, pictures, tmp_path, monkeypatch
):
    def unreachable(weights):
        raise ValueError("its weights could not be reached; set evaluate.inception_weights")

    monkeypatch.setattr(fidelity, "check_inception", unreachable)
    family("ddpm").save_pretrained(tmp_path / "model")
    method = {"name": "oneshot", "criterion": "magnitude", "keep_macs": 0.5, "steps": 0}
    settings = {"samples": 4, "steps": 1, "sampling_seeds": 1, "batch": 4}

    def asked(**evaluate) -> Recipe:
        known = {"model": str(tmp_path / "model"), "data": f"folder:{pictures}", "method": method}
        training = {"recover": {"steps": 1, "batch": 2, "distill": 0}}
        return Recipe.model_validate(known | training | {"evaluate": settings | evaluate})

    # a refusal is for those who name what cannot be had, or the file
    for named in ({"metrics": ["fid", "params"]}, {"inception_weights": "nowhere.pth"}):
        assert "could not be reached" in dry_run(asked(**named), device="cpu")["problems"][0]
    said = dry_run(asked(), device="cpu")
    assert said["problems"] == []
    assert said["not_measured"][0].startswith("fid, kid, is, precision, recall not measured: no w")

    result = compress.run(asked(), output=tmp_path / "run", device="cpu")
    why, table = "not measured: no weights", result.metrics["metrics"]
    assert {name for name, row in table.items() if row["how"] == why} == {
        "fid", "kid", "is", "precision", "recall",
    }  # fmt: skip
    assert table["fid"]["dense"] == table["fid"]["compressed"] == {
        "value": None, "ci95": None, "n": 0, "why": why,
    }  # fmt: skip
    assert table["validation_loss"]["compressed"]["value"] > 0
    assert any(why in warning for warning in result.metrics["warnings"])
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "run")]).stdout
    row = next(line for line in shown.splitlines() if line.startswith("fid "))
    assert row.count(why) == 2
    for page in ("report.html", "checkpoint/README.md"):
        assert (tmp_path / "run" / page).read_text(encoding="utf8").count(why) >= 10
    # beside a run that has the number, no value wins and none is drawn
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "run", other)
    metrics = json.loads((other / "metrics.json").read_text(encoding="utf8"))
    metrics["metrics"]["fid"] |= {side: {"value": 2, "ci95": None, "n": 4} for side in SIDES}
    (other / "metrics.json").write_text(json.dumps(metrics), encoding="utf8")
    compared = compare([tmp_path / "run", other])
    fid = next(row for row in compared.rows if row["metric"] == "fid")
    assert fid["best"] is None and fid["runs"]["dense"]["value"] == 2
    assert why in compared.to_text(200)
    compared.plot(tmp_path / "plot.png")

    measured = runs.evaluate_pipeline(
        str(tmp_path / "model"), Sampling(**settings), data=f"folder:{pictures}", device="cpu"
    )
    assert measured["fid"]["why"] == why and measured["params"]["value"] > 0


@pytest.mark.parametrize(
    ("name", "keep"), few([("ddpm", 0.5), ("sd1", 0.55), ("sdxl", 0.6)], ("ddpm", 0.5))
)
def test_rectangles_are_cut_trained_and_drawn_in_their_shape(family, pictures, name, keep):
    size = (8, 16) if name == "ddpm" else (4, 8)
    pipeline = changed(family, name, unet=unet(family, name, sample_size=list(size)))
    pipeline.set_progress_bar_config(disable=True)
    (height, width), channels = image_shape(pipeline)
    assert 2 * height == width
    square = changed(family, name, unet=unet(family, name, sample_size=max(size)))
    assert unet_cost(pipeline.unet).macs < 0.6 * unet_cost(square.unet).macs
    found = compress.apply(
        pipeline,
        OneShot(keep_macs=keep, steps=0, criterion="taylor"),
        data=f"folder:{pictures}",
        training=Training(steps=1, batch=2),
        device="cpu",
    ).model
    prompted = {"conditions": ("red",)} if name in PROMPTED else {}
    options = {"count": 2, "steps": 2, "sampler": "ddim", "seed": 0, **prompted}
    assert sampling.sample(found, **options).shape == (2, channels, height, width)


def test_sizes_and_images_that_no_unet_of_the_kind_takes_are_refused_at_the_start(
    family, pictures, tmp_path
):
    odd = changed(family, "ddpm", unet=unet(family, "ddpm", sample_size=15))
    method = OneShot(steps=0, criterion="taylor")
    images = torch.zeros(20, 1, 16, 16)
    with pytest.raises(ValueError, match="divisible by 2.* got 15x15"):
        compress.apply(odd, method, data=images, device="cpu")
    # of other data than pictures it may have as many channels as it likes
    pair = changed(family, "ddpm", unet=unet(family, "ddpm", in_channels=2, out_channels=2))
    with pytest.raises(ValueError, match=r"takes images \(2, 16, 16\).* data has \(1, 16, 16\)"):
        compress.apply(pair, method, data=images, device="cpu")
    spectra = torch.rand(20, 2, 16, 16)
    training = Training(steps=1, batch=2)
    found = compress.apply(pair, method, data=spectra, training=training, device="cpu").model
    assert sampling.sample(found, count=1, steps=1, sampler="ddim", seed=0).shape == (1, 2, 16, 16)
    pair.save_pretrained(tmp_path / "pair")
    asked = recipe(tmp_path / "pair", pictures, 0.5)
    assert "have 1 or 3 channels; the model takes 2" in dry_run(asked)["problems"][0]
    with pytest.raises(ValueError, match="have 1 or 3 channels; the model takes 2"):
        compress.run(asked, output=tmp_path / "run", device="cpu")


def test_images_are_drawn_of_held_out_captions_and_of_all_classes(family, pictures):
    settings = Sampling(samples=4)
    data = load_images(f"folder:{pictures}", 16, 3, "caption")
    found = runs.with_conditions(settings, family("sdxl"), data)
    assert found.conditions == ("blue 0", "blue 20", "red 1", "red 21")
    assert found.guidance_scale == 5.0  # SDXL's own default
    asked = runs.with_conditions(Sampling(samples=4, guidance_scale=2.0), family("sd1"), data)
    assert asked.guidance_scale == 2.0
    data = load_images("builtin:digits", 16, 1, "label")
    assert runs.with_conditions(settings, family("labels"), data).conditions == tuple(range(10))
    assert runs.with_conditions(settings, family("ddpm"), data) == SamplingSettings(samples=4)


def test_what_the_data_or_the_recipe_lack_is_said_before_anything_is_written(family, tmp_path):
    family("sd1").save_pretrained(tmp_path / "model")
    data = pipelines.pictures(tmp_path / "pictures", 8)
    asked = recipe(tmp_path / "model", data, 0.55)
    with pytest.raises(ValueError, match="texts for file_name and words"):
        compress.run(asked, output=tmp_path / "run", device="cpu")
    assert "texts for file_name and words" in dry_run(asked)["problems"][0]
    family("ddpm").save_pretrained(tmp_path / "plain")
    guided = recipe(tmp_path / "plain", data, 0.5, guidance_scale=3.0)
    with pytest.raises(ValueError, match="guidance_scale is for pipelines that take prompts"):
        compress.run(guided, output=tmp_path / "run", device="cpu")
    long = recipe(tmp_path / "plain", data, 0.5, steps=pipelines.STEPS + 1)
    with pytest.raises(ValueError, match=r"steps must lie in 1\.\.50.* got steps=51"):
        compress.run(long, output=tmp_path / "run", device="cpu")
    assert "got steps=51" in dry_run(long)["problems"][0]
    assert not (tmp_path / "run").exists()


def test_schedules_that_a_sampler_lacks_are_refused_before_training(family):
    sigmoid = changed(family, "ddpm", scheduler=DDPMScheduler(50, beta_schedule="sigmoid"))
    assert draw(sigmoid, sampler="ddpm", count=1).shape == (1, 1, 16, 16)
    with pytest.raises(ValueError, match="DDIMScheduler has no beta_schedule 'sigmoid'"):
        draw(sigmoid, sampler="ddim")
    learned = changed(family, "ddpm", scheduler=DDPMScheduler(50, variance_type="learned_range"))
    assert draw(learned, sampler="ddim", count=1).shape == (1, 1, 16, 16)
    with pytest.raises(ValueError, match="learned_range.*use ddim"):
        draw(learned, sampler="ddpm")
    odd = changed(family, "ddpm", scheduler=DDIMScheduler(50, steps_offset="x"))
    with pytest.raises(ValueError, match="config of the DDIMScheduler should hold a noise sched"):
        draw(odd)
    # one timestep too many, where steps are counted from 1
    with pytest.raises(ValueError, match="steps_offset of 1.*steps=50; take fewer"):
        draw(family("sd1"), conditions=CAPTIONS, steps=50)


def test_texts_of_another_model_are_refused(family):
    config = pipelines.text_config(family("sd1").tokenizer)
    for changes, message in (
        ({"hidden_size": 16}, "encoder_hidden_states of width 12, and the text encoders give 16"),
        ({"vocab_size": 50}, "knows 50 tokens, and its tokenizer has 190"),
        ({"max_position_embeddings": 8}, "prompts of 8 tokens, and its tokenizer pads them to 12"),
    ):
        other = CLIPTextModel(CLIPTextConfig(**config.to_dict() | changes))
        with pytest.raises(ValueError, match=message):
            runs.check_trainable(changed(family, "sd1", text_encoder=other))
    for length in (10**30, -1, 2.5, "long"):
        tokenizer = copy.deepcopy(family("sd1").tokenizer)
        tokenizer.model_max_length = length
        with pytest.raises(ValueError, match=f"pads them to {length}"):
            runs.check_trainable(changed(family, "sd1", tokenizer=tokenizer))


@pytest.mark.parametrize("old", ["text_encoder", "vae"])
def test_names_of_older_weights_are_no_missing_weights(family, tmp_path, old):
    # as Stable Diffusion 1.5 lies on the hub
    family("sd1").save_pretrained(tmp_path)
    (weights,) = (tmp_path / old).glob("*.safetensors")

    def renamed(name: str) -> str:
        if old == "text_encoder":
            return f"text_model.{name}"
        for new, before in {
            "to_q": "query",
            "to_k": "key",
            "to_v": "value",
            "to_out.0": "proj_attn",
        }.items():
            name = name.replace(new, before)
        return name

    stored = load_file(weights)
    changed = {renamed(name): value for name, value in stored.items()}
    assert set(changed) != set(stored)
    save_file(changed, weights, metadata={"format": "pt"})
    loaded = getattr(load_pipeline(str(tmp_path)), old)
    assert same(loaded.state_dict(), getattr(family("sd1"), old).state_dict())
    save_file(dict(list(changed.items())[:-1]), weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 are missing"):
        load_pipeline(str(tmp_path))


# ---- sampling ------------------------------------------------------------------------------

CAPTIONS = ("red 1", "blue 2", "red and blue")


def draw(pipeline, **changes) -> torch.Tensor:
    settings = {"count": 5, "steps": 3, "sampler": "ddim", "seed": 2} | changes
    return sampling.sample(pipeline, **settings)


@pytest.mark.parametrize("name", ["ldm", *PROMPTED])
def test_samples_are_those_of_the_pipeline_itself(family, name):
    pipeline = family(name)
    prompted = {"conditions": CAPTIONS, "guidance_scale": 3.0} if name in PROMPTED else {}
    found = draw(pipeline, **prompted)
    # from_config would take another class's defaults for what was left to the default
    config = {k: v for k, v in pipeline.scheduler.config.items() if k != "_use_default_values"}
    scheduler = sampling.SAMPLERS["ddim"].from_config(config, clip_sample=False)
    theirs = with_parts(pipeline, {"scheduler": scheduler})
    theirs.set_progress_bar_config(disable=True)
    given = {"batch_size": 5}
    if prompted:
        given = {"prompt": [CAPTIONS[k % 3] for k in range(5)], "guidance_scale": 3.0}
    images = theirs(
        generator=sampling.generators(2, 0, 5), num_inference_steps=3, output_type="np", **given
    ).images
    expected = (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round()
    assert (found.float() - expected).abs().max() <= 1
    assert found.float().std() > 1


@pytest.mark.parametrize(("name", "sampler"), [("sd1", "ddpm"), ("labels", "ddim")])
def test_neither_batches_nor_shares_decide_a_sample(family, name, sampler):
    conditions = CAPTIONS if name == "sd1" else (4, 7)
    options = {"sampler": sampler, "conditions": conditions}
    together = draw(family(name), **options).int()
    apart = draw(family(name), **options, batch=2).int()
    tail = draw(family(name), **options, count=2, first=3).int()
    assert (together - apart).abs().max() <= 1 and (together[3:] - tail).abs().max() <= 1
    assert not torch.equal(together, draw(family(name), **options, seed=3))


def test_prompts_guidance_and_labels_decide_the_images(family):
    plain = draw(family("sd1"), conditions=CAPTIONS, guidance_scale=1.0)
    guided = draw(family("sd1"), conditions=CAPTIONS, guidance_scale=7.5)
    assert not torch.equal(plain, guided)
    assert torch.equal(draw(family("sd1"), conditions=CAPTIONS), guided)  # the pipeline's default
    other = draw(family("sd1"), conditions=("green", *CAPTIONS[1:]), guidance_scale=7.5)
    changed = [not torch.equal(a, b) for a, b in zip(guided, other, strict=True)]
    assert changed == [True, False, False, True, False]
    labelled = [draw(family("labels"), conditions=labels) for labels in ((1, 2), (1, 3))]
    changed = [not torch.equal(a, b) for a, b in zip(*labelled, strict=True)]
    assert changed == [False, True, False, True, False]


def test_labels_are_what_the_unet_is_given(family):
    pipeline = family("labels")
    alone = [draw(pipeline, conditions=(label,), count=1)[0] for label in range(3)]
    assert not torch.equal(alone[0], alone[1])
    assert torch.equal(draw(pipeline, conditions=range(3), count=1)[0], alone[0])


def test_a_safety_checker_blackens_no_sample(family):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    small = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=small, projection_dim=4))
    checker.forward = lambda clip_input, images: (images * 0, [True] * len(images))
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8)
    checked = with_parts(family("sd1"), {"safety_checker": checker, "feature_extractor": processor})
    assert torch.equal(draw(checked, conditions=CAPTIONS), draw(family("sd1"), conditions=CAPTIONS))
    assert checked.safety_checker is checker


def test_a_sampled_pipeline_is_left_as_it_was(family):
    pipeline = copy.deepcopy(family("sd1"))
    pipeline.unet.train()
    pipeline.text_encoder.train()
    scheduler, before = pipeline.scheduler, frozen(pipeline)
    draw(pipeline, conditions=CAPTIONS)
    assert pipeline.unet.training and pipeline.text_encoder.training and not pipeline.vae.training
    assert pipeline.scheduler is scheduler and same(frozen(pipeline), before)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sd1", {}, "StableDiffusionPipeline takes a caption .* got 0 conditions"),
        ("labels", {}, "DDPMPipeline takes a label .* got 0 conditions"),
        ("ddpm", {"conditions": (1,)}, "DDPMPipeline takes nothing"),
        ("ldm", {"sampler": "ddpm"}, "LDMPipeline hands its scheduler no generator"),
    ],
)
def test_conditions_and_samplers_that_do_not_fit_are_refused(family, name, changes, message):
    with pytest.raises(ValueError, match=message):
        draw(family(name), **changes)


def test_labels_as_vectors_are_not_sampled(family):
    pipeline = changed(family, "ddpm", unet=unet(family, "ddpm", class_embed_type="identity"))
    assert condition_of(pipeline) is None
    with pytest.raises(ValueError, match="class_labels as vectors"):
        draw(pipeline)


def test_no_labels_are_asked_for_where_no_pipeline_hands_them_on(family):
    assert (
        condition_of(changed(family, "ldm", unet=unet(family, "ldm", num_class_embeds=3))) is None
    )


def test_options_of_a_pipeline_survive_another_unet(family, tmp_path):
    pipeline = pipelines.stable_diffusion_xl(tmp_path, zeros=False)
    changed = with_parts(pipeline, {"unet": copy.deepcopy(pipeline.unet)})
    assert changed.config.force_zeros_for_empty_prompt is False
    assert with_parts(family("sd1"), {}).config.requires_safety_checker is False
    assert changed.unet is not pipeline.unet and changed.vae is pipeline.vae


def test_placed_modules_come_back_even_after_a_failure():
    # the one other device that every machine has
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()).to("meta")
    module[0].eval()
    flags = [part.training for part in module.modules()]
    moved = []
    module.to = lambda device: moved.append(str(device))
    with pytest.raises(RuntimeError, match="inside"), placed([module], "cpu"):
        assert moved == ["cpu"] and not any(part.training for part in module.modules())
        raise RuntimeError("inside")
    assert moved == ["cpu", "meta"]
    assert [part.training for part in module.modules()] == flags


# ---- what is refused -----------------------------------------------------------------------


def image_to_image(family) -> DiffusionPipeline:
    parts = family("sd1").components | {"image_encoder": None}
    return StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)


def changed(family, name: str, **parts) -> DiffusionPipeline:
    return with_parts(family(name), parts)


def unet(family, name: str, **changes):
    dense = family(name).unet
    config = {key: value for key, value in dense.config.items() if not key.startswith("_")}
    return type(dense)(**config | changes)


REFUSED = {
    "another family": (image_to_image, "StableDiffusionImg2ImgPipeline also has text_encoder"),
    "no text encoder": (
        lambda b: changed(b, "sd1", text_encoder=None),
        "needs its text_encoder",
    ),
    "labels beside prompts": (
        lambda b: changed(b, "sd1", unet=unet(b, "sd1", num_class_embeds=3)),
        "needs class_labels",
    ),
    "labels beside latents": (
        lambda b: changed(b, "ldm", unet=unet(b, "ldm", num_class_embeds=3)),
        "needs class_labels",
    ),
    "labels as vectors": (
        lambda b: changed(b, "ddpm", unet=unet(b, "ddpm", class_embed_type="identity")),
        "class_labels as vectors",
    ),
    "sizes without SDXL": (
        lambda b: changed(b, "sd1", unet=b("sdxl").unet),
        "needs added_cond_kwargs",
    ),
    "prompts without a pipeline": (
        lambda b: DDPMPipeline(b("sd1").unet, DDPMScheduler(50)),
        "needs encoder_hidden_states",
    ),
    "learned variance": (
        lambda b: changed(b, "ddpm", unet=unet(b, "ddpm", out_channels=2)),
        "reads 1 and predicts 2",
    ),
    "more than latents": (
        lambda b: changed(b, "sd1", unet=unet(b, "sd1", in_channels=9, out_channels=9)),
        "latents have 4 channels.* reads 9",
    ),
    "sides that the pipeline refuses": (
        lambda b: changed(b, "sd1", unet=unet(b, "sd1", sample_size=[8, 6])),
        "divisible by 8; .* makes them 16x12",
    ),
    "another autoencoder": (
        lambda b: changed(
            b,
            "sd1",
            vae=AutoencoderTiny(
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
            ),
        ),
        "AutoencoderTiny",
    ),
    "shifted latents": (
        lambda b: changed(
            b,
            "sd1",
            vae=type(b("sd1").vae).from_config(b("sd1").vae.config, latents_mean=[0.0] * 4),
        ),
        "latents_mean",
    ),
    "latents without a scale": (
        lambda b: changed(
            b, "sd1", vae=type(b("sd1").vae).from_config(b("sd1").vae.config, scaling_factor=None)
        ),
        "scaling_factor=None",
    ),
    "images of other channels": (
        lambda b: changed(
            b, "sd1", vae=type(b("sd1").vae).from_config(b("sd1").vae.config, out_channels=4)
        ),
        "reads 3 channels and draws 4",
    ),
    "no size": (
        lambda b: changed(b, "ddpm", unet=unet(b, "ddpm", sample_size=None)),
        "sample_size",
    ),
    "three sizes": (
        lambda b: changed(b, "ddpm", unet=unet(b, "ddpm", sample_size=(8, 8, 8))),
        "sample_size, as one number or as height and width; got .8, 8, 8",
    ),
    "latents that are not square": (
        lambda b: changed(b, "ldm", unet=unet(b, "ldm", sample_size=(8, 4))),
        "draws squares alone.*one number; got .8, 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(family, name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        check_pipeline(make(family))


def test_the_families_are_not_refused(family):
    for name in NAMES:
        runs.check_trainable(family(name))


# ---- several processes ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_two_processes_do_what_one_does(tmp_path, name):
    pipelines.pictures(tmp_path / "pictures", 40)
    command = [sys.executable, "-P", programs.path("family"), name, json.dumps(METHOD)]
    for count in (1, 2):
        port = free_port()
        children = []
        for rank in range(count):
            where = {
                "WORLD_SIZE": str(count),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            environment = programs.environment(**where)
            children.append(subprocess.Popen(command, env=environment, cwd=tmp_path))
        assert [child.wait(timeout=300) for child in children] == [0] * count
    one, two = (load_file(tmp_path / f"{count}.safetensors") for count in (1, 2))
    assert torch.equal(one["kept"], two["kept"])
    assert torch.allclose(one["masks"], two["masks"], atol=1e-5)
    assert torch.allclose(one["losses"], two["losses"], atol=1e-4)
