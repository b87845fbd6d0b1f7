"""FID and its like through torch-fidelity: laws, and closed forms computed by other means."""

import socket
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from compress.data.digits import digits
from compress.eval import fidelity as module
from compress.eval.fidelity import fidelity, floor
from compress.eval.sampling import to_uint8
from compress.models.classifiers import load_classifier

NAMES = {"fid_digits", "kid_digits", "is_digits", "precision_digits", "recall_digits"}


@pytest.fixture(scope="module")
def halves():
    return tuple(to_uint8(digits(half)[0])[:300] for half in "ab")


def noisy(images, amount):
    generator = torch.Generator().manual_seed(0)
    noise = amount * torch.randn(images.shape, generator=generator)
    return (images + noise).clamp(0, 255).round().to(torch.uint8)


def features(images):
    network = load_classifier("digits-features")
    return network.features(images.float() / 127.5 - 1).double().numpy()


def root(matrix):
    values, vectors = scipy.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(min=0)) @ vectors.T


def test_fid_is_the_frechet_distance_of_two_gaussians(halves):
    samples, reference = noisy(halves[0], 60), halves[1]
    one, two = features(samples), features(reference)
    # tr (S1 S2)^(1/2) is the nuclear norm of S1^(1/2) S2^(1/2); unlike scipy.linalg.sqrtm of the
    # product this is exact for singular covariances, which units that never fire make
    roots = root(np.cov(one.T)) @ root(np.cov(two.T))
    expected = np.square(one.mean(0) - two.mean(0)).sum()
    expected += np.trace(np.cov(one.T) + np.cov(two.T)) - 2 * np.linalg.norm(roots, "nuc")
    # torch-fidelity takes roots of eigenvalues: 1e-16 of rounding becomes 1e-8 per silent unit
    assert fidelity(samples, reference)["fid_digits"] == pytest.approx(expected, rel=1e-6)


def test_kid_is_the_unbiased_mmd(halves):
    samples, reference = noisy(halves[0], 60), halves[1]
    one, two = features(samples), features(reference)

    def kernel(x, y):
        return (x @ y.T * module.kid_gamma(module.DIGITS) + 1) ** 3

    n = len(one)
    within = sum(kernel(x, x).sum() - np.trace(kernel(x, x)) for x in (one, two)) / (n * (n - 1))
    expected = within - 2 * kernel(one, two).mean()
    # equal sizes within a subset's limit: every subset is the whole set
    assert fidelity(samples, reference)["kid_digits"] == pytest.approx(expected, rel=1e-6)


def test_gamma_makes_the_kernel_of_a_digit_with_itself_about_eight(halves):
    lengths = np.square(features(halves[0])).sum(1) * module.kid_gamma(module.DIGITS)
    assert (lengths.mean() + 1) ** 3 == pytest.approx(8, rel=0.2)


def test_a_set_is_at_distance_zero_from_itself(halves):
    same = fidelity(halves[1], halves[1])
    assert set(same) == NAMES
    assert same["fid_digits"] == pytest.approx(0, abs=1e-4)
    assert same["precision_digits"] == same["recall_digits"] == 1
    # an unbiased estimate: around 0, a little below when both sets hold the same images
    assert -0.1 < same["kid_digits"] <= 0


def test_distances_are_symmetric_and_precision_is_recall_reversed(halves):
    one, two = fidelity(*halves), fidelity(*halves[::-1])
    assert one["fid_digits"] == pytest.approx(two["fid_digits"], rel=1e-6)
    assert one["kid_digits"] == pytest.approx(two["kid_digits"], abs=1e-9)
    assert one["precision_digits"] == two["recall_digits"]
    assert one["recall_digits"] == two["precision_digits"]


def test_kid_of_random_splits_is_around_zero():
    images = to_uint8(digits("b")[0])
    values = []
    for seed in range(4):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        values.append(fidelity(images[order[:200]], images[order[200:400]])["kid_digits"])
    far = fidelity(noisy(images[:200], 120), images[200:400])["kid_digits"]
    assert abs(np.mean(values)) < 0.1 * far


def test_more_noise_is_further_away(halves):
    found = [fidelity(noisy(halves[0], amount), halves[1]) for amount in (0, 30, 60, 120)]
    for name in ("fid_digits", "kid_digits"):
        distances = [metrics[name] for metrics in found]
        assert distances == sorted(distances) and distances[-1] > distances[0]
    assert found[-1]["precision_digits"] < found[0]["precision_digits"]
    assert found[-1]["is_digits"] < found[0]["is_digits"]


def test_is_of_digits_is_near_the_number_of_classes(halves):
    assert 8 < fidelity(*halves)["is_digits"] <= 10


def test_missing_classes_cost_recall_not_precision(halves):
    samples = to_uint8(digits("a")[0][digits("a")[1] < 3])
    found = fidelity(samples, halves[1])
    assert found["precision_digits"] > 0.8 and found["recall_digits"] < 0.5


def test_sizes_may_differ_and_batches_do_not_matter(halves):
    whole = fidelity(halves[0], halves[1][:200])
    assert whole["fid_digits"] > 0
    parts = fidelity(halves[0], halves[1][:200], batch=37)
    assert parts["fid_digits"] == pytest.approx(whole["fid_digits"], rel=1e-4)


def test_grey_and_three_equal_channels_are_the_same(halves):
    grey = fidelity(*halves)
    colour = fidelity(*(images.expand(-1, 3, -1, -1) for images in halves))
    assert colour["fid_digits"] == pytest.approx(grey["fid_digits"], rel=1e-4)


def test_floor_is_the_distance_of_the_two_halves(halves):
    whole = fidelity(*halves)
    assert floor(*halves) == floor(*halves, count=1000) == whole
    # evenly spaced, the ends included; fewer images are further away: FID is biased
    some = floor(*halves, count=150)
    assert some == fidelity(halves[0][torch.linspace(0, 299, 150).round().long()], halves[1])
    assert some["fid_digits"] > 1.2 * whole["fid_digits"]


def test_nothing_is_cached(halves, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    fidelity(halves[0][:20], halves[1][:20])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (torch.zeros(3, 1, 16, 16, dtype=torch.uint8), {}, "at least 4 images.*n=3"),
        (torch.zeros(9, 1, 16, 16), {}, "samples must be uint8.*float32"),
        (torch.zeros(9, 2, 16, 16, dtype=torch.uint8), {}, r"1 or 3.*\(9, 2, 16, 16\)"),
        (torch.zeros(9, 1, 32, 32, dtype=torch.uint8), {}, "takes 16x16 images.*32x32"),
        (torch.zeros(9, 1, 16, 16, dtype=torch.uint8), {"extractor": "vgg"}, "got 'vgg'"),
    ],
)
def test_images_that_do_not_fit(halves, samples, options, message):
    with pytest.raises(ValueError, match=message):
        fidelity(samples, halves[1], **options)


def test_inception_without_weights_or_network(halves, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise socket.gaierror("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"no path was given.*no network.*inception_weights"):
        fidelity(*halves, extractor=module.INCEPTION)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"junk"])
def test_inception_with_a_file_that_holds_no_weights(halves, tmp_path, content):
    path = tmp_path / "weights.pth"
    if content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected as a PyTorch state dict in .*weights\.pth"):
        fidelity(*halves, extractor=module.INCEPTION, weights=str(path))


def test_inception_refuses_a_file_that_runs_code(halves, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": Path("x")}, path)
    with pytest.raises(ValueError, match="UnpicklingError"):
        fidelity(*halves, extractor=module.INCEPTION, weights=str(path))


def test_inception_refuses_weights_of_another_network(halves, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="Inception"):
        fidelity(*halves, extractor=module.INCEPTION, weights=str(path))


@pytest.mark.slow
def test_inception_from_a_file(tmp_path, monkeypatch, halves):
    path = tmp_path / "weights.pth"
    monkeypatch.setattr(
        "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
        lambda *_, **__: {},
    )
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    torch.manual_seed(0)
    network = FeatureExtractorInceptionV3("random", ["2048"])
    monkeypatch.undo()
    torch.save(network.state_dict(), path)
    found = fidelity(halves[0][:12], halves[1][:12], extractor=module.INCEPTION, weights=str(path))
    assert set(found) == {"fid", "kid", "is", "precision", "recall"}
    assert all(np.isfinite(value) for value in found.values())
