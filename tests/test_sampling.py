"""Samples: which noise an image starts from, and that a pipeline is left as it was."""

import copy

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel

from compress.eval import sampling

SETTINGS = {"count": 5, "steps": 4, "sampler": "ddim", "seed": 3}


def unet(widths=(8, 16), seed=0, **changes):
    torch.manual_seed(seed)
    options = {
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": widths,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**options | changes)


def pipeline(**changes):
    return DDPMPipeline(unet(**changes), DDPMScheduler(beta_schedule="squaredcos_cap_v2"))


@pytest.fixture(scope="module")
def tiny():
    return pipeline()


def test_levels_are_rounded_and_clipped():
    given = torch.tensor([-7.0, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0])
    assert sampling.to_uint8(given).tolist() == [0, 0, 64, 128, 191, 255, 255]
    levels = torch.arange(256)
    assert torch.equal(sampling.to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))


def test_noise_is_a_function_of_seed_and_index():
    def noise(seed, first, count):
        return [torch.randn(9, generator=g) for g in sampling.generators(seed, first, count)]

    whole, part = noise(0, 0, 6), noise(0, 4, 2)
    assert torch.equal(whole[4], part[0]) and torch.equal(whole[5], part[1])
    others = [*whole, *noise(1, 0, 6)]
    assert len({tuple(n.tolist()) for n in others}) == 12


def test_samples_are_uint8_images(tiny):
    images = sampling.sample(tiny, **SETTINGS)
    assert images.shape == (5, 1, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images, sampling.sample(tiny, **SETTINGS))
    assert not torch.equal(images, sampling.sample(tiny, **SETTINGS | {"seed": 4}))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_batch_size_does_not_decide_the_images(tiny, sampler):
    settings = SETTINGS | {"sampler": sampler}
    together = sampling.sample(tiny, **settings).int()
    for batch in (1, 2):
        apart = sampling.sample(tiny, **settings, batch=batch).int()
        # convolutions of another batch size round otherwise: at most one grey level, here and there
        assert (together - apart).abs().max() <= 1
        assert (together != apart).float().mean() < 0.01


def test_count_is_a_prefix(tiny):
    longer = sampling.sample(tiny, **SETTINGS, batch=1)
    shorter = sampling.sample(tiny, **SETTINGS | {"count": 3}, batch=1)
    assert torch.equal(longer[:3], shorter)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_images_are_those_of_diffusers_own_pipeline(tiny, sampler):
    settings = SETTINGS | {"sampler": sampler}
    ours = sampling.sample(tiny, **settings)
    kind = {"ddim": DDIMPipeline, "ddpm": DDPMPipeline}[sampler]
    theirs = kind(tiny.unet, sampling.SAMPLERS[sampler].from_config(tiny.scheduler.config))
    theirs.set_progress_bar_config(disable=True)
    images = theirs(
        batch_size=5,
        generator=sampling.generators(3, 0, 5),
        num_inference_steps=4,
        output_type="np",
    ).images
    expected = (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round()
    assert (ours.float() - expected).abs().max() <= 1


def test_two_models_start_from_the_same_noise():
    # networks that predict zero: what remains is the noise, scaled and clipped
    images = []
    for widths in ((8, 16), (16, 24)):
        slim = pipeline(widths=widths)
        for parameter in slim.unet.conv_out.parameters():
            torch.nn.init.zeros_(parameter)
        images.append(sampling.sample(slim, **SETTINGS))
    assert torch.equal(*images)
    assert images[0].unique().numel() > 2


def test_pipeline_is_left_as_it_was():
    tiny = pipeline()
    tiny.unet.train()
    tiny.unet.mid_block.eval()
    before = copy.deepcopy(tiny.unet.state_dict())
    flags = [module.training for module in tiny.unet.modules()]
    scheduler, timesteps = tiny.scheduler, tiny.scheduler.timesteps.clone()
    assert len(sampling.sample(tiny, **SETTINGS, batch=2)) == 5 and torch.is_grad_enabled()
    assert [module.training for module in tiny.unet.modules()] == flags
    assert tiny.scheduler is scheduler and torch.equal(scheduler.timesteps, timesteps)
    assert all(torch.equal(value, before[name]) for name, value in tiny.unet.state_dict().items())


def test_half_precision_models_can_be_sampled(tiny):
    half = DDPMPipeline(copy.deepcopy(tiny.unet).to(torch.bfloat16), tiny.scheduler)
    images = sampling.sample(half, **SETTINGS).float()
    assert (images - sampling.sample(tiny, **SETTINGS).float()).abs().mean() < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "euler"}, r"one of \['ddim', 'ddpm'\]; got 'euler'"),
        ({"steps": 0}, r"1\.\.1000.*steps=0"),
        ({"steps": 1001}, r"1\.\.1000.*steps=1001"),
    ],
)
def test_impossible_settings(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        sampling.sample(tiny, **SETTINGS | change)


def test_models_that_need_more_than_noise_are_refused(tiny):
    conditional = DDPMPipeline(unet(num_class_embeds=10), tiny.scheduler)
    with pytest.raises(ValueError, match="num_class_embeds"):
        sampling.sample(conditional, **SETTINGS)
    with pytest.raises(ValueError, match="sample_size"):
        sampling.sample(DDPMPipeline(unet(sample_size=None), tiny.scheduler), **SETTINGS)
    with pytest.raises(ValueError, match="a pipeline with a unet or a transformer"):
        sampling.sample(tiny.unet, **SETTINGS)


def test_a_diverged_model_is_named():
    broken = pipeline()
    torch.nn.init.constant_(broken.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        sampling.sample(broken, **SETTINGS)
