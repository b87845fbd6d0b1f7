"""Pipelines of transformers with prompts: inputs, flow matching, and runs from end to end."""

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch.utils._pytree import tree_map

import compress
from builders import pipelines
from builders.events import leave
from builders.tiers import few
from compress.common import cost
from compress.common.events import drain
from compress.common.journal import Journal
from compress.data.batches import Batch, Examples
from compress.data.sources import load_images
from compress.eval.sampling import sample
from compress.methods.base import PruneJob
from compress.methods.gradflow import GradFlow
from compress.methods.gradflow.train import PruningRun
from compress.methods.training import Training
from compress.models.objective import (
    FlowNoise,
    check_trainable,
    check_usable,
    inputs_of,
    noise_schedule,
    predicted,
    prediction_target,
)
from compress.models.pipelines import check_pipeline, condition_of, image_shape, with_parts
from compress.runs.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick_runs")

NAMES = ("pixart", "sd3", "flux")
CAPTIONS = ["red 1", "blue", "a", "b"]
METHOD = {"keep_macs": 0.8, "steps": 2, "max_move": 1.0, "update_every": 1, "criterion_batches": 1}


@pytest.fixture(autouse=True)
def small_flux(monkeypatch):
    monkeypatch.setattr(cost, "FLUX_TOKENS", 16)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return pipelines.pictures(tmp_path_factory.mktemp("data") / "pictures")


def batch_of(pipeline, conditions=CAPTIONS, **options) -> Batch:
    torch.manual_seed(5)
    images = torch.rand(len(conditions), 3, *image_shape(pipeline)[0]) * 2 - 1
    examples = Examples(images, conditions)
    return inputs_of(pipeline).batch(examples, pipelines.STEPS, 0, 5, **options)


def given_by_the_pipeline(pipeline, prompts) -> dict:
    """What a pipeline hands its transformer when it draws, without guidance."""
    seen = {}

    def watch(_, arguments, named):
        seen.update(named)
        seen.setdefault("hidden_states", *arguments)

    handle = pipeline.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    options = dict.fromkeys(("clean_caption", "use_resolution_binning"), False)
    drawing = with_parts(pipeline, {"scheduler": copy.deepcopy(pipeline.scheduler)})
    drawing.set_progress_bar_config(disable=True)
    try:
        drawing(
            prompts,
            num_inference_steps=1,
            output_type="latent",
            **dict(zip(("height", "width"), image_shape(pipeline)[0], strict=True)),
            **({} if isinstance(pipeline, FluxPipeline) else {"guidance_scale": 1.0}),
            **(options if condition_of(pipeline) and "PixArt" in type(pipeline).__name__ else {}),
        )
    finally:
        handle.remove()
    unheard = ("timestep", "return_dict", "joint_attention_kwargs")
    return {key: value for key, value in seen.items() if key not in unheard}


# ---- inputs --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, "pixart-alpha"])
def test_the_transformer_is_given_what_the_pipeline_gives_it(family, name):
    if name == "pixart-alpha":
        torch.manual_seed(0)
        # knows sizes as the model of 1024 pixels does, whose config does not say so
        sizes = {"sample_size": 128, "patch_size": 32, "attention_head_dim": 12}
        pipeline = pipelines.pixart(PixArtAlphaPipeline, cross_attention_dim=24, **sizes)
        without = pipelines.AutoencoderKL(**pipelines.AUTOENCODER, mid_block_add_attention=False)
        pipeline = with_parts(pipeline, {"vae": without})
        check_trainable(pipeline)
        pipeline.text_encoder.eval()
    else:
        pipeline = family(name)
    for given, dropped in ((CAPTIONS, 0.0), ([""] * 4, 1.0)):
        batch = batch_of(pipeline, dropout=dropped)
        seen = given_by_the_pipeline(pipeline, given)
        assert {*seen} - {"guidance"} == {"hidden_states", *batch.condition} - {"guidance"}
        ours, theirs = ({**d, **d.get("added_cond_kwargs", {})} for d in (batch.condition, seen))
        ours.pop("added_cond_kwargs", None)
        for key, value in ours.items():
            if isinstance(value, torch.Tensor):
                assert torch.allclose(theirs[key], value, atol=1e-5), key
            else:
                assert theirs[key] is value is None, key


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_counted_with_the_tokens_that_the_pipeline_pads_it_to(family, name):
    pipeline = family(name)
    if name == "pixart":
        pipeline = PixArtAlphaPipeline(**pipeline.components)
    states = inputs_of(pipeline).condition(["a"], [False], "cpu")["encoder_hidden_states"]
    # the tiny CLIPs of SD3 read shorter prompts than all real ones
    shorter = 77 - pipeline.tokenizer.model_max_length if name == "sd3" else 0
    counted = cost.unet_inputs(pipeline.transformer)["encoder_hidden_states"]
    assert counted.shape[1] == states.shape[1] + shorter


def test_samples_that_are_no_squares_are_counted(family):
    transformer = copy.deepcopy(family("sd3").transformer)
    transformer.register_to_config(sample_size=[8, 4])
    assert cost.unet_inputs(transformer)["hidden_states"].shape == (1, 4, 8, 4)
    transformer.register_to_config(sample_size=[8, 4, 2])
    with pytest.raises(ValueError, match=r"sample_size, .*; got \[8, 4, 2\]; set it"):
        cost.unet_inputs(transformer)


@pytest.mark.parametrize("broken", [[8, 8], None, {}])
def test_a_config_that_cannot_run_is_named(broken):
    transformer = pipelines.FluxTransformer2DModel(
        **pipelines.JOINT, in_channels=16, num_single_layers=1, axes_dims_rope=broken
    )
    with pytest.raises(ValueError, match="a Flux.* as its config describes.*restore its config"):
        cost.unet_cost(transformer)


@pytest.mark.parametrize(
    ("name", "change"),
    [("pixart", {"caption_channels": None}), ("sd3", {"joint_attention_dim": "24"})],
)
def test_a_config_that_has_no_inputs_is_named(family, name, change):
    transformer = copy.deepcopy(family(name).transformer)
    transformer.register_to_config(**change)
    changed = with_parts(family(name), {"transformer": transformer})
    for count in (cost.unet_cost, cost.unet_inputs, lambda _: check_pipeline(changed)):
        with pytest.raises(ValueError, match="a .* as its config describes.*restore its config"):
            count(transformer)


def test_a_config_that_divides_by_zero_is_named(family):
    transformer = copy.deepcopy(family("pixart").transformer)
    transformer.config.patch_size = transformer.pos_embed.patch_size = 0
    with pytest.raises(ValueError, match="a PixArt.* as its config describes.*restore its config"):
        cost.unet_cost(transformer)


@pytest.mark.parametrize("guidance", [True, False])
def test_a_distilled_guidance_is_the_one_that_images_are_drawn_with(tmp_path, guidance):
    pipeline = pipelines.flux(tmp_path, guidance=guidance)
    condition = batch_of(pipeline).condition
    assert ("guidance" in condition) == guidance
    assert not guidance or condition["guidance"].tolist() == [3.5] * 4


@torch.no_grad()
def test_flux_reads_packed_latents_and_time_from_0_to_1(family):
    pipeline, batch = family("flux"), batch_of(family("flux"))
    found = predicted(pipeline.transformer, batch.images, batch.timesteps, batch.condition)
    packed = pipeline._pack_latents(batch.images, *batch.images.shape)
    tokens = pipeline.transformer(packed, timestep=batch.timesteps / 1000, **batch.condition).sample
    scale = pipeline.vae_scale_factor
    assert torch.equal(found, pipeline._unpack_latents(tokens, 16, 16, scale))
    assert found.shape == batch.images.shape


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_latents_are_shifted_and_scaled_as_the_pipeline_takes_them_back(family, name):
    pipeline = family(name)
    batch = batch_of(pipeline)
    torch.manual_seed(5)
    posterior = pipeline.vae.encode(torch.rand(4, 3, 16, 16) * 2 - 1).latent_dist
    back = batch.images / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    drawn = (back - posterior.mean) / posterior.std
    assert abs(drawn.mean()) < 5 / drawn.numel() ** 0.5 and abs(drawn.std() - 1) < 0.2


# ---- flow matching -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_noise_is_that_of_the_scheduler_and_the_target_leads_back(family, name):
    scheduler = FlowMatchEulerDiscreteScheduler(**family(name).scheduler.config)
    noise, batch = noise_schedule(scheduler), batch_of(family(name))
    for timestep in scheduler.timesteps[[0, 20, -1]]:
        times = timestep.expand(4)
        noisy = noise.add_noise(batch.images, batch.noise, times)
        assert torch.allclose(
            noisy, scheduler.scale_noise(batch.images, times, batch.noise), atol=1e-5
        )
        share = (timestep / pipelines.STEPS).item()
        assert torch.allclose(
            noisy - share * prediction_target(noise, batch), batch.images, atol=1e-5
        )


def test_timesteps_are_logit_normal_and_shifted_as_images_are_drawn():
    uniform = torch.arange(1000)
    plain = FlowNoise(1000).spread(uniform, tokens=16) / 1000
    logits = plain.logit()
    assert logits.mean().abs() < 1e-3 and abs(logits.std() - 1) < 0.01
    assert logits.sort().values[841] == pytest.approx(1, abs=0.01)  # a standard deviation
    # where the scheduler moves these shares of the way to, when it draws
    shares = plain.flip(0)[::100].numpy()
    static = FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    static.set_timesteps(sigmas=shares)
    dynamic = FlowMatchEulerDiscreteScheduler(1000, use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=shares, mu=calculate_shift(1024))
    for scheduler in (static, dynamic):
        found = noise_schedule(scheduler).spread(uniform, tokens=1024).flip(0)[::100]
        assert torch.allclose(found, scheduler.timesteps, rtol=1e-4)


# ---- what is refused -----------------------------------------------------------------------


REFUSED = {
    "diffusion for flow": ("flux", {"scheduler": DDIMScheduler()}, "is trained and sampled by flo"),
    "flow for diffusion": (
        "pixart",
        {"scheduler": FlowMatchEulerDiscreteScheduler()},
        "is not trained and sampled by flow",
    ),
    "chance": (
        "sd3",
        {"scheduler": FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)},
        "has stochastic_sampling; choose",
    ),
    "sizes": (
        "pixart",
        {"transformer": pipelines.pixart(use_additional_conditions=True).transformer},
        "gives its transformer no sizes",
    ),
    "no third encoder": ("sd3", {"text_encoder_3": None}, "needs its text_encoder_3"),
    "no shift": (
        "sd3",
        {"vae": pipelines.AutoencoderKL(**pipelines.AUTOENCODER)},
        "shift_factor=None",
    ),
    "no number": (
        "sd3",
        {
            "vae": pipelines.AutoencoderKL(
                **pipelines.AUTOENCODER, shift_factor=0.1, scaling_factor=[1]
            )
        },
        r"scaling_factor=\[1\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(family, case):
    name, parts, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_pipeline(with_parts(family(name), parts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift": 0}, "a shift above 0.*has shift=0; restore"),
        ({"use_dynamic_shifting": True, "max_image_seq_len": 256}, "max_image_seq_len=256; rest"),
        ({"use_dynamic_shifting": True, "max_shift": [2]}, r"max_shift=\[2\], base_image"),
    ],
)
def test_shifts_that_move_nowhere_are_refused(changes, message):
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    scheduler.register_to_config(**changes)
    with pytest.raises(ValueError, match=message):
        noise_schedule(scheduler)


def test_a_model_distilled_as_schnell_is_refused(tmp_path):
    pipeline = pipelines.flux(tmp_path, guidance=False)
    check_trainable(pipeline)
    static = {"scheduler": FlowMatchEulerDiscreteScheduler(pipelines.STEPS)}
    with pytest.raises(ValueError, match="FluxPipeline with neither.*distilled so, as FLUX.1-sc"):
        check_trainable(with_parts(pipeline, static))
    check_usable(with_parts(pipeline, static))  # but measured


@pytest.mark.parametrize("name", NAMES)
def test_the_families_are_not_refused_but_for_another_transformer(family, name):
    check_trainable(family(name))
    other = family("sd3" if name == "pixart" else "pixart").transformer
    with pytest.raises(ValueError, match="the denoiser of a .* is a .*; this one is a"):
        check_pipeline(with_parts(family(name), {"transformer": other}))
    with pytest.raises(ValueError, match="use ddim"):
        if name == "pixart":
            pytest.skip("its scheduler is given generators")
        sample(family(name), count=1, steps=2, sampler="ddpm", seed=0, conditions=["a"])


# ---- from end to end -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "granularity"),
    few([("pixart", "both"), ("sd3", "both"), ("sd3", "block"), ("flux", "unit")], ("sd3", "both")),
)
def test_a_run_leaves_a_pipeline_that_draws_the_same(
    family, pictures, tmp_path, monkeypatch, name, granularity
):
    for part in ("SD3", "PIXART", "FLUX"):  # longer prompts would be nearly all of the cost
        monkeypatch.setattr(cost, f"{part}_PROMPT_TOKENS", 77)
    family(name).save_pretrained(tmp_path / "model")
    asked = Recipe.model_validate(
        {
            "model": str(tmp_path / "model"),
            "data": f"folder:{pictures}",
            "method": {"name": "gradflow", "granularity": granularity, **METHOD},
            "recover": {"steps": 1, "batch": 4, "distill": 0.5},
            "evaluate": {
                "samples": 4,
                "steps": 2,
                "sampling_seeds": 1,
                "metrics": ["validation_loss", "macs", "ssim_to_dense"],
            },
        }
    )
    result = compress.run(asked, output=tmp_path / "run", device="cpu")
    assert result.metrics["run"]["surgery"]["max_difference"] <= 1e-5
    measured = result.metrics["metrics"]
    assert 0.6 < measured["macs"]["ratio"] <= 0.8 and measured["validation_loss"]["ratio"] < 2
    folder = tmp_path / "run" / "checkpoint"
    plain = DiffusionPipeline.from_pretrained(folder, trust_remote_code=granularity != "block")
    drawn = [
        sample(p, count=2, steps=2, sampler="ddim", seed=0, conditions=["red 1", "blue"])
        for p in (compress.load(folder), plain)
    ]
    assert torch.equal(*drawn) and drawn[0].shape == (2, 3, 16, 16)
    assert drawn[0].float().std() > 1


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(family, pictures, tmp_path):
    def begin(folder=None, *, resume=False):
        pipeline = family("flux")
        data = load_images(
            f"folder:{pictures}", *image_shape(pipeline), condition_of(pipeline), None
        )
        settings = Training(steps=2, batch=4, save_every=1, condition_dropout=0.5)
        job = PruneJob(pipeline, data, settings, "cpu", Journal(folder), resume)
        return PruningRun(GradFlow(granularity="block", **METHOD), job)

    expected = drain(begin().events()).model.state_dict()
    for step in (1, 3):  # in the flow and in the recovery
        (tmp_path / str(step)).mkdir()
        leave(begin(tmp_path / str(step)).events(), step)
        found = drain(begin(tmp_path / str(step), resume=True).events()).model.state_dict()
        assert tree_map(torch.equal, dict(found), dict(expected)) == dict.fromkeys(expected, True)
