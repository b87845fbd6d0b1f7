"""What a UNet is trained on: targets, latents and conditions, held to diffusers' own ones."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from builders import pipelines
from compress.data.batches import Batch, Examples
from compress.data.sources import ImageData
from compress.methods.gradflow.criterion import denoising_loss
from compress.methods.gradflow.layout import build_layout
from compress.methods.gradflow.masks import SoftUNet
from compress.methods.gradflow.unets import find_groups
from compress.models import objective
from compress.models.objective import inputs_of, noise_schedule, prediction_target

PROMPTED = ("sd1", "sd2", "sdxl", "ldm_text")
CAPTIONS = ["a red square", "", "blue 7 blue 7 blue 7 and much more", "!"]


def examples(count: int = 4, channels: int = 3, conditions=None) -> Examples:
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(count, channels, 16, 16, generator=generator) * 2 - 1
    return Examples(images, conditions)


def batch_of(pipeline, given: Examples, seed: int = 0, step: int = 5, **options) -> Batch:
    return inputs_of(pipeline).batch(given, 50, seed, step, **options)


# ---- targets -------------------------------------------------------------------------------


def noisy_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(5, 2, 4, 4, generator=generator) for _ in range(2))
    return Batch(images, noise, torch.tensor([0, 10, 25, 40, 49]))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_targets_are_what_the_prediction_types_mean(schedule):
    batch = noisy_batch()

    def target(kind: str) -> torch.Tensor:
        scheduler = PNDMScheduler(50, beta_schedule=schedule, prediction_type=kind)
        return prediction_target(noise_schedule(scheduler), batch)

    assert torch.equal(target("epsilon"), batch.noise)
    scheduler = DDPMScheduler(50, beta_schedule=schedule, prediction_type="sample")
    assert torch.equal(prediction_target(scheduler, batch), batch.images)
    kept = np.cumprod(1 - scheduler.betas.double().numpy())[batch.timesteps.numpy()]
    kept = torch.from_numpy(kept)[:, None, None, None]
    velocity = kept.sqrt() * batch.noise - (1 - kept).sqrt() * batch.images
    assert torch.allclose(target("v_prediction").double(), velocity, atol=1e-5)
    theirs = DDIMScheduler(50, beta_schedule=schedule).get_velocity(*batch[:3])
    assert torch.allclose(target("v_prediction"), theirs, atol=1e-6)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(50),
        DDIMScheduler(50, beta_schedule="scaled_linear", rescale_betas_zero_snr=True),
        PNDMScheduler(50, trained_betas=np.linspace(0.001, 0.3, 50).astype(np.float32)),
        EulerDiscreteScheduler(50, beta_schedule="scaled_linear", beta_end=0.012),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_schedule_for_training_is_that_of_the_pipelines_scheduler(scheduler):
    found = noise_schedule(scheduler)
    assert torch.equal(found.alphas_cumprod, scheduler.alphas_cumprod)
    batch = noisy_batch()
    share = scheduler.alphas_cumprod[batch.timesteps][:, None, None, None]
    noisy = share.sqrt() * batch.images + (1 - share).sqrt() * batch.noise
    assert torch.allclose(found.add_noise(*batch[:3]), noisy, atol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EDMEulerScheduler(), "EDMEulerScheduler has another one"),
        (DDPMScheduler(prediction_type="velocity"), "epsilon, v_prediction, sample.*'velocity'"),
        (
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "timestep_type 'continuous'",
        ),
        (LCMScheduler(), "LCMScheduler is of models distilled so"),
    ],
    ids=["edm", "prediction", "continuous", "consistency"],
)
def test_other_schedulers_are_refused_by_name(scheduler, message):
    with pytest.raises(ValueError, match=message):
        noise_schedule(scheduler)


@pytest.mark.parametrize("name", ["ddim", "sd2", "sdxl", "labels"])
def test_the_criterions_loss_is_that_of_the_unet_with_its_condition(family, name):
    pipeline = family(name)
    given = examples(channels=pipeline.unet.config.in_channels) if name == "ddim" else examples()
    if name == "labels":
        given = examples(channels=1, conditions=[3, 0, 9, 3])
    elif name != "ddim":
        given = given._replace(conditions=CAPTIONS)
    batch, scheduler = batch_of(pipeline, given), noise_schedule(pipeline.scheduler)
    groups = find_groups(pipeline.unet)
    layout = build_layout(pipeline.unet, groups, pipeline.unet.config.block_out_channels)
    with torch.no_grad():
        found = denoising_loss(SoftUNet(pipeline.unet, layout).eval(), scheduler)(batch)
        noisy = scheduler.add_noise(*batch[:3])
        predicted = pipeline.unet(noisy, batch.timesteps, **batch.condition).sample
    target = {
        "ddim": batch.images,
        "sd2": scheduler.get_velocity(*batch[:3]),
        "sdxl": batch.noise,
        "labels": batch.noise,
    }[name]
    assert found.item() == pytest.approx((predicted - target).square().mean().item(), rel=1e-5)


# ---- clean samples -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sdxl", "ldm_text"])
def test_latents_are_a_scaled_draw_of_the_posterior(family, name):
    pipeline, given = family(name), examples(11, conditions=["x"] * 11)
    autoencoder = getattr(pipeline, "vae", None) or pipeline.vqvae
    with torch.no_grad():
        posterior = autoencoder.encode(given.images).latent_dist

    def noise(**where) -> torch.Tensor:
        latents = batch_of(pipeline, given, **where).images / autoencoder.config.scaling_factor
        return (latents - posterior.mean) / posterior.std

    drawn = noise()
    assert drawn.shape[1:] == (4, pipeline.unet.config.sample_size) + drawn.shape[-1:]
    # n values: five standard errors
    assert abs(drawn.mean()) < 5 / drawn.numel() ** 0.5
    assert abs(drawn.std() - 1) < 5 / (2 * drawn.numel()) ** 0.5
    assert torch.equal(drawn, noise())
    assert not any(torch.allclose(drawn, noise(**other)) for other in ({"step": 6}, {"seed": 1}))
    # the noise of the diffusion is another draw
    assert not torch.allclose(drawn, batch_of(pipeline, given).noise, atol=0.1)


def test_vq_latents_are_scaled_and_not_quantised(family):
    pipeline, given = family("ldm"), examples(11)
    with torch.no_grad():
        latents = pipeline.vqvae.encode(given.images).latents
    found = batch_of(pipeline, given).images
    assert torch.allclose(found, latents * pipeline.vqvae.config.scaling_factor, atol=1e-6)
    assert pipeline.vqvae.config.scaling_factor != 1


def test_pixels_are_the_images_themselves(family):
    given = examples(channels=1)
    batch = batch_of(family("ddpm"), given)
    assert batch.images is given.images and batch.condition == {}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_shares_of_a_batch_put_together_are_the_whole(family, name):
    given = examples(6, conditions=[f"picture {k}" for k in range(6)])
    whole = batch_of(family(name), given, dropout=0.5)
    parts = [
        batch_of(family(name), part, first=2 * k, total=6, dropout=0.5)
        for k, part in enumerate(given.chunk(3))
    ]
    for key in ("images", "noise", "timesteps"):
        together = torch.cat([getattr(part, key) for part in parts])
        assert torch.allclose(together, getattr(whole, key), atol=1e-6)
    states = torch.cat([part.condition["encoder_hidden_states"] for part in parts])
    assert torch.allclose(states, whole.condition["encoder_hidden_states"], atol=1e-5)


# ---- conditions ----------------------------------------------------------------------------


def encoded_by_the_pipeline(pipeline, captions) -> dict:
    """What diffusers' own pipelines hand to the UNet, and what they take for no prompt."""
    count = len(captions)
    if not hasattr(pipeline, "encode_prompt"):
        states = [
            pipeline.bert(
                pipeline.tokenizer(
                    texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
                ).input_ids
            )[0]
            for texts in (captions, [""] * count)
        ]
        return dict(zip(("states", "no states"), states, strict=True))
    found = pipeline.encode_prompt(
        captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    return dict(zip(("states", "no states", "pooled", "no pooled"), found, strict=False))


def check_condition(pipeline, condition, expected, prefix: str) -> None:
    states = condition["encoder_hidden_states"]
    assert torch.allclose(states, expected[f"{prefix}states"], atol=1e-6)
    if "pooled" in expected:
        added = condition["added_cond_kwargs"]
        assert torch.allclose(added["text_embeds"], expected[f"{prefix}pooled"], atol=1e-6)
        side = (16, 16)
        times = pipeline._get_add_time_ids(side, (0, 0), side, torch.float32, 10)
        assert torch.equal(added["time_ids"], times.expand(len(states), -1))


@torch.no_grad()
@pytest.mark.parametrize("name", PROMPTED)
def test_captions_reach_the_unet_as_in_the_pipeline_itself(family, name):
    pipeline = family(name)
    condition = batch_of(pipeline, examples(conditions=CAPTIONS)).condition
    check_condition(pipeline, condition, encoded_by_the_pipeline(pipeline, CAPTIONS), "")
    states = condition["encoder_hidden_states"]
    assert (states[0] - states[2]).abs().max() > 0.01


@torch.no_grad()
def test_an_encoder_that_wants_a_mask_gets_it(family):
    pipeline = copy.deepcopy(family("sd1"))
    pipeline.text_encoder.config.use_attention_mask = True
    condition = batch_of(pipeline, examples(conditions=CAPTIONS)).condition
    check_condition(pipeline, condition, encoded_by_the_pipeline(pipeline, CAPTIONS), "")
    without = batch_of(family("sd1"), examples(conditions=CAPTIONS)).condition
    key = "encoder_hidden_states"
    assert (condition[key] - without[key]).abs().max() > 1e-3


def test_a_caption_that_is_no_text_is_named(family):
    with pytest.raises(ValueError, match="captions should be texts; got None"):
        batch_of(family("sd1"), examples(conditions=["a", None, "b", "c"]))


@torch.no_grad()
@pytest.mark.parametrize("name", [*PROMPTED, "sdxl without zeros"])
def test_a_dropped_caption_is_what_the_pipeline_takes_for_no_prompt(family, name, tmp_path):
    if name == "sdxl without zeros":
        pipeline = pipelines.stable_diffusion_xl(tmp_path, zeros=False)
    else:
        pipeline = family(name)
    dropped = batch_of(pipeline, examples(conditions=CAPTIONS), dropout=1.0).condition
    check_condition(pipeline, dropped, encoded_by_the_pipeline(pipeline, CAPTIONS), "no ")
    if name != "sdxl":
        empty = batch_of(pipeline, examples(conditions=[""] * 4)).condition
        assert torch.equal(dropped["encoder_hidden_states"], empty["encoder_hidden_states"])
    else:
        assert not dropped["encoder_hidden_states"].any()


def test_the_asked_share_of_captions_is_dropped_by_seed_step_and_sample():
    seen = []

    def condition(given, dropped, device):
        seen.append(list(dropped))
        return {}

    inputs = objective.Inputs("caption", condition=condition)
    given = examples(64, conditions=["x"] * 64)
    for step in range(30):
        inputs.batch(given, 50, 0, step, dropout=0.1)
    # 1920 draws: five standard deviations of the share are 0.034
    assert abs(np.mean(seen) - 0.1) < 0.034
    assert len({tuple(row) for row in seen}) > 25
    inputs.batch(given.chunk(2)[1], 50, 0, 3, first=32, total=64, dropout=0.1)
    assert seen[-1] == seen[3][32:]
    inputs.batch(given, 50, 0, 3, dropout=0.0)
    assert not any(seen[-1])


def test_labels_reach_the_unet_and_are_never_dropped(family):
    given = examples(channels=1, conditions=[3, 0, 9, 3])
    condition = batch_of(family("labels"), given, dropout=1.0).condition
    assert condition["class_labels"].tolist() == [3, 0, 9, 3]


@pytest.mark.parametrize("name", ["sd1", "sdxl", "ldm", "ldm_text"])
def test_frozen_parts_are_used_without_a_trace(family, name):
    pipeline = copy.deepcopy(family(name))
    inputs = inputs_of(pipeline).to("cpu")
    before = [copy.deepcopy(module.state_dict()) for module in inputs.modules]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    batch = inputs.batch(examples(conditions=CAPTIONS), 50, 0, 0, dropout=0.5)
    # the global generator is neither read nor moved
    assert torch.equal(torch.get_rng_state(), state)
    tensors = [batch.images, *(v for v in batch.condition.values() if torch.is_tensor(v))]
    assert not any(tensor.requires_grad for tensor in tensors)
    for module, old in zip(inputs.modules, before, strict=True):
        assert not module.training and all(p.grad is None for p in module.parameters())
        assert all(torch.equal(value, old[key]) for key, value in module.state_dict().items())


# ---- data that does not say what is needed -------------------------------------------------


def images(count: int = 4) -> torch.Tensor:
    return torch.zeros(count, 1, 16, 16)


@pytest.mark.parametrize(("name", "what"), [("sd1", "caption"), ("labels", "label")])
def test_data_without_conditions_is_refused(family, name, what):
    data = ImageData("mine", images(), images())
    with pytest.raises(ValueError, match=f"takes a {what} .* mine gives images alone"):
        inputs_of(family(name)).check(data)
    inputs_of(family("ddpm")).check(data)


def test_labels_that_the_unet_does_not_know_are_refused(family):
    inputs = inputs_of(family("labels"))
    inputs.check(ImageData("mine", images(), images(), [0, 9, 1, 1], [5] * 4))
    for label in (10, -1):
        data = ImageData("mine", images(), images(), [0, 9, 1, 1], [label] * 4)
        with pytest.raises(ValueError, match="labels from 0 to 9; mine has labels from"):
            inputs.check(data)


def test_as_many_conditions_as_images():
    with pytest.raises(ValueError, match="4 images in held_out and 3 conditions"):
        ImageData("mine", images(), images(), [0] * 4, [0] * 3)
