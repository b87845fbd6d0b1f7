"""SSIM and MSE: laws, and scikit-image as the independent reference."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from compress.eval.consistency import mse_to, ssim_to


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 20, 24), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-40, 41, images.shape, generator=generator)
    return images, (images + noise).clamp(0, 255).to(torch.uint8)


def test_equal_images(pairs):
    images, _ = pairs
    assert torch.allclose(ssim_to(images, images), torch.ones(6, dtype=torch.float64), atol=1e-12)
    assert torch.equal(mse_to(images, images), torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("metric", [ssim_to, mse_to])
def test_symmetric_and_image_by_image(pairs, metric):
    together = metric(*pairs)
    assert together.shape == (6,)
    assert torch.allclose(together, metric(*pairs[::-1]), atol=1e-12)
    alone = torch.cat([metric(a[None], b[None]) for a, b in zip(*pairs, strict=True)])
    assert torch.allclose(together, alone, atol=1e-12)


def test_batches_do_not_matter(pairs):
    assert torch.allclose(ssim_to(*pairs), ssim_to(*pairs, batch=4), atol=1e-12)


def test_ssim_is_that_of_scikit_image(pairs):
    expected = [
        structural_similarity(
            a.numpy() / 255,
            b.numpy() / 255,
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(*pairs, strict=True)
    ]
    # scikit-image cuts its Gaussian at 3.5 sigma too: window 11, and both leave the border out
    assert np.allclose(ssim_to(*pairs), expected, atol=1e-6)


def test_mse_of_one_grey_level_off():
    images = torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
    others = images.clone()
    others[1] += 51
    assert mse_to(images, others).tolist() == pytest.approx([0, 0.04])


def test_more_noise_is_further_away():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(8, 1, 16, 16, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    levels = [
        ((clean + s * noise).clamp(0, 1) * 255).round().to(torch.uint8) for s in (0, 0.1, 0.2, 0.4)
    ]
    similar = [ssim_to(level, levels[0]).mean() for level in levels]
    distant = [mse_to(level, levels[0]).mean() for level in levels]
    assert similar == sorted(similar, reverse=True) and distant == sorted(distant)


@pytest.mark.parametrize("metric", [ssim_to, mse_to])
def test_impossible_pairs(pairs, metric):
    images, others = pairs
    with pytest.raises(ValueError, match=r"\(6, 3, 20, 24\) and \(5, 3, 20, 24\)"):
        metric(images, others[:5])
    with pytest.raises(ValueError, match="uint8.*float32"):
        metric(images.float(), others)
    with pytest.raises(ValueError, match="n >= 1"):
        metric(images[:0], others[:0])


def test_images_under_the_window_are_refused(pairs):
    small = pairs[0][..., :10, :10]
    with pytest.raises(ValueError, match="11x11.*10x10"):
        ssim_to(small, small)
