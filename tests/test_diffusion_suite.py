"""The suite: intervals, pairing, cached samples, time and memory, the table of metrics.json."""

import copy
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from compress.common.cost import unet_cost
from compress.data.digits import digits
from compress.eval import diffusion, latency
from compress.eval.consistency import mse_to, ssim_to
from compress.eval.diffusion import SamplingSettings, Value
from compress.eval.fidelity import fidelity
from compress.eval.metrics import DIFFUSION
from compress.eval.sampling import sample, to_uint8

SETTINGS = SamplingSettings(samples=8, steps=2, sampling_seeds=2, batch=5)


def pipeline(widths=(8, 16), seed=0):
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return DDPMPipeline(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2"))


@pytest.fixture(scope="module")
def reference():
    return to_uint8(digits("b")[0])[:60]


@pytest.fixture(scope="module")
def dense():
    return pipeline((8, 24))


def draw(pipeline):
    return diffusion.gather(diffusion.draw_batches(pipeline, SETTINGS), SETTINGS)


@pytest.fixture(scope="module")
def dense_samples(dense):
    return draw(dense)


@pytest.fixture(scope="module")
def slim():
    return pipeline((8, 16))


@pytest.fixture(scope="module")
def found(slim, dense_samples, reference):
    return diffusion.evaluate(
        slim,
        reference=reference,
        settings=SETTINGS,
        dense=dense_samples,
        extra={"validation_loss": Value(0.5, "given", 32, (0.4, 0.6))},
    )


# ---- samples ------------------------------------------------------------------------------------


def test_samples_are_those_of_each_seed(dense, dense_samples):
    assert dense_samples.shape == (2, 8, 1, 16, 16)
    for seed, images in zip(SETTINGS.seeds, dense_samples, strict=True):
        assert torch.equal(
            images, sample(dense, count=8, steps=2, sampler="ddim", seed=seed, batch=5)
        )
    assert not torch.equal(*dense_samples)


def test_the_caller_can_count_batches(dense):
    sizes = [len(batch) for batch in diffusion.draw_batches(dense, SETTINGS)]
    assert sizes == [5, 3, 5, 3] and SETTINGS.batches == 4


@pytest.mark.parametrize("name, least", [("samples", 4), ("sampling_seeds", 1), ("batch", 1)])
def test_settings_are_checked(name, least):
    with pytest.raises(ValueError, match=f"{name}: .*greater than or equal to {least}; got 0"):
        SamplingSettings(**{name: 0})
    assert getattr(SamplingSettings(**{name: least}), name) == least


def test_cache_path_follows_the_key_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    key = diffusion.samples_key("abc", SETTINGS)
    path = diffusion.samples_cache_path(key)
    assert path.is_relative_to(tmp_path) and not path.exists()
    assert diffusion.samples_cache_path(dict(reversed(key.items()))) == path
    base = {"samples": 8, "steps": 2, "sampling_seeds": 2}
    others = [
        diffusion.samples_key("abd", SETTINGS),
        *(
            diffusion.samples_key("abc", SamplingSettings(**base | change))
            for change in (
                {"samples": 9},
                {"steps": 3},
                {"sampler": "ddpm"},
                {"seed": 1},
                {"conditions": ("a cat", "a dog")},
                {"conditions": ("a cat", "a dog"), "guidance_scale": 3.0},
                {"conditions": ("a dog", "a cat")},
                {"conditions": (1, 2)},
            )
        ),
    ]
    assert len({diffusion.samples_cache_path(k) for k in others} | {path}) == len(others) + 1
    rebatched = SamplingSettings(samples=8, steps=2, sampling_seeds=2, batch=1)
    assert diffusion.samples_cache_path(diffusion.samples_key("abc", rebatched)) == path
    monkeypatch.delenv("COMPRESS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = tmp_path / "home" / ".cache" / "compress"
    assert diffusion.samples_cache_path(key).is_relative_to(home)


def test_what_images_are_drawn_of_is_said_beside_the_numbers():
    told = SamplingSettings(samples=8, steps=2, conditions=("a", "b"), guidance_scale=7.5)
    assert str(told) == ("3 seeds x 8 images, DDIM, 2 steps, 2 conditions in turn, guidance 7.5")
    assert str(SamplingSettings(samples=8, steps=2)) == "3 seeds x 8 images, DDIM, 2 steps"


def test_samples_come_back_from_the_cache(tmp_path, dense_samples):
    path = tmp_path / "new" / "folder" / "x.safetensors"
    assert diffusion.load_samples(path) is None
    diffusion.save_samples(path, dense_samples)
    assert torch.equal(diffusion.load_samples(path), dense_samples)
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_cache_is_a_miss(tmp_path, dense_samples, damage):
    path = tmp_path / "x.safetensors"
    diffusion.save_samples(path, dense_samples)
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    assert diffusion.load_samples(path) is None


def test_reference_images_are_read_in_order():
    images = torch.stack([torch.full((1, 2, 2), level) for level in (-1.0, 0.0, 1.0)])
    assert diffusion.reference_images(images).flatten(1)[:, 0].tolist() == [0, 128, 255]
    assert len(diffusion.reference_images(images, limit=2)) == 2
    with pytest.raises(ValueError, match="got none"):
        diffusion.reference_images([])


# ---- intervals ----------------------------------------------------------------------------------


def test_t_interval_is_that_of_scipy():
    values = [3.0, 4.5, 7.0]
    expected = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    assert diffusion.mean_interval(values) == pytest.approx(expected)
    assert diffusion.mean_interval([3.0]) is None


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (7, 20), (20, 20)])
def test_share_interval_is_wilson_s(hits, n):
    # its ends are the shares from which the measured one is 1.96 standard errors away
    for end in diffusion.share_interval(hits, n):
        distance = abs(hits / n - end) / math.sqrt(max(end * (1 - end), 1e-30) / n)
        assert distance == pytest.approx(0 if end == hits / n else scipy.stats.norm.ppf(0.975))


def test_median_interval_covers_the_median():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        measured = latency.summarise(list(rng.exponential(size=20)))
        inside += measured.low <= math.log(2) <= measured.high
    # at least 95% by construction; three standard deviations of 400 trials are 3.3%
    assert inside / 400 >= 0.95 - 0.033


def test_summary_of_times():
    measured = latency.summarise([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (measured.p20, measured.median, measured.p80, measured.n) == (1.8, 3.0, 4.2, 5)
    assert measured.low is None and measured.high is None
    assert latency.summarise([1.0] * 6).low == 1
    with pytest.raises(ValueError, match="at least 1"):
        latency.summarise([])


# ---- the suite ----------------------------------------------------------------------------------


def test_suite_measures_everything_with_n_and_provenance(found, slim):
    assert list(found) == [
        name
        for name in DIFFUSION
        if name.endswith(("_digits", "_dense"))
        or name in {"params", "macs", "validation_loss", "class_share_min", "class_share_max"}
    ]
    assert found["params"].value == sum(p.numel() for p in slim.unet.parameters())
    assert found["macs"].value == unet_cost(slim.unet).macs
    assert found["validation_loss"].value == 0.5
    for name in set(found) - {"params", "macs", "validation_loss"}:
        assert found[name].n == 16 and "2 seeds x 8 images, DDIM, 2 steps" in found[name].how
        low, high = found[name].ci95
        assert low <= found[name].value <= high
    assert "torch-fidelity" in found["fid_digits"].how
    assert "60 reference images" in found["fid_digits"].how


def test_distances_are_means_over_seeds(found, slim, reference):
    drawn = draw(slim)
    per_seed = [fidelity(images, reference) for images in drawn]
    for name in per_seed[0]:
        values = [metrics[name] for metrics in per_seed]
        assert found[name].value == pytest.approx(np.mean(values), rel=1e-6)
        assert found[name].ci95 == pytest.approx(diffusion.mean_interval(values), rel=1e-6)


def test_likeness_is_paired_with_the_dense_images(found, slim, dense_samples):
    drawn = draw(slim)
    for name, metric in (("ssim_to_dense", ssim_to), ("mse_to_dense", mse_to)):
        values = metric(drawn.flatten(0, 1), dense_samples.flatten(0, 1))
        assert found[name].value == pytest.approx(values.mean().item())
        half = 1.959964 * values.std().item() / 4
        assert found[name].ci95 == pytest.approx(
            (values.mean().item() - half, values.mean().item() + half)
        )


def test_given_samples_are_not_drawn_again(dense, dense_samples, reference, monkeypatch):
    monkeypatch.setattr(diffusion, "draw_batches", None)
    found = diffusion.evaluate(dense, reference=reference, settings=SETTINGS, samples=dense_samples)
    assert found["ssim_to_dense"].value == 1 and found["mse_to_dense"].value == 0


def test_unpaired_samples_are_refused(slim, dense_samples, reference):
    fewer = dense_samples[:, :5]
    for name in ("samples", "dense"):
        with pytest.raises(ValueError, match=rf"{name} must hold 2 seeds x 8.*\(2, 5\)"):
            diffusion.evaluate(
                slim,
                reference=reference,
                settings=SETTINGS,
                **{"samples": dense_samples, "dense": None} | {name: fewer},
            )


def test_real_digits_look_like_digits_and_noise_does_not():
    images, _ = digits("a")
    real = diffusion.digit_checks(to_uint8(images)[None], SETTINGS)
    assert real["looks_like_digits"].value > 0.9
    assert 0.08 < real["class_share_min"].value < real["class_share_max"].value < 0.12
    grey = torch.full((1, 50, 1, 16, 16), 128, dtype=torch.uint8)
    flat = diffusion.digit_checks(grey, SETTINGS)
    assert flat["looks_like_digits"].value in (0, 1)
    assert (flat["class_share_min"].value, flat["class_share_max"].value) == (0, 1)


def test_class_accuracy_is_the_share_of_digits_of_the_class_that_was_asked_for():
    images, labels = digits("a")
    sets = to_uint8(images)[:100][None].repeat(2, 1, 1, 1, 1)
    right = [int(label) for label in labels[:100]]
    for asked, low, high in ((right, 0.95, 1), ([(k + 1) % 10 for k in right], 0, 0.05)):
        settings = SETTINGS.model_copy(update={"conditions": tuple(asked)})
        found = diffusion.digit_checks(sets, settings)["class_accuracy"]
        assert low <= found.value <= high and found.n == 200
    assert "class_accuracy" not in diffusion.digit_checks(sets, SETTINGS)
    prompted = SETTINGS.model_copy(update={"conditions": ("a seven",)})
    assert "class_accuracy" not in diffusion.digit_checks(sets, prompted)


# ---- time and memory ----------------------------------------------------------------------------


class Recorder(nn.Module):
    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, **inputs):
        self.calls.append((self.name, torch.is_grad_enabled()))


def test_models_are_timed_in_turns_after_a_warm_up():
    calls = []
    models = {name: Recorder(name, calls) for name in "ab"}
    times = latency.taking_turns(models, "cpu", repeats=3, warmup=2)
    assert [name for name, _ in calls] == list("ab" * 5)
    assert not any(grad for _, grad in calls)
    assert {name: measured.n for name, measured in times.items()} == {"a": 3, "b": 3}
    with pytest.raises(ValueError, match="repeats=0"):
        latency.taking_turns(models, "cpu", repeats=0)


class Chain(nn.Module):
    """Weights of 4 kB, an input of 400 kB; what lives is most in the middle of the forward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, x):
        wide = x.repeat(3, 1)  # 1200 kB
        total = wide.view(-1)[:].view_as(wide).sum(0)  # 4 kB; views are no new memory
        del wide
        parts = [x[:rows] * self.weight for rows in (50, 70)]  # 480 kB
        return total + sum(part.sum() for part in parts)


def test_peak_memory_counts_weights_inputs_and_what_lives_at_once():
    memory = latency.peak_memory(Chain(), {"x": torch.ones(100, 1000)})
    assert memory.megabytes == pytest.approx(0.004 + 0.4 + 1.204, abs=1e-6)
    assert "scratch" in memory.how


def test_speed_reports_each_model_and_moves_none(dense, slim):
    unets = {"dense": dense.unet, "compressed": slim.unet}
    before = copy.deepcopy(slim.unet.state_dict())
    slim.unet.train()
    found = diffusion.speed(unets, SETTINGS, batch=4, repeats=8)
    assert list(found) == ["dense", "compressed"]
    for name in found:
        values = found[name]
        assert set(values) == {"latency_ms", "images_per_second", "peak_memory_mb"}
        assert values["latency_ms"].n == 8 and values["latency_ms"].value > 0
        low, high = values["latency_ms"].ci95
        assert low <= values["latency_ms"].value <= high
        assert "threads" in values["latency_ms"].how and "batch 4" in values["peak_memory_mb"].how
    assert found["compressed"]["peak_memory_mb"].value < found["dense"]["peak_memory_mb"].value
    assert slim.unet.training and slim.unet.dtype == torch.float32
    assert all(torch.equal(value, before[key]) for key, value in slim.unet.state_dict().items())


def test_images_per_second_is_batch_over_steps_and_time(monkeypatch, slim):
    fixed = latency.Latency(4.0, 5.0, 6.0, 4.5, 5.5, 9)
    monkeypatch.setattr(
        diffusion, "taking_turns", lambda ways, *_, **__: dict.fromkeys(ways, fixed)
    )
    rate = diffusion.speed({"a": slim.unet}, SETTINGS, batch=4)["a"]["images_per_second"]
    # 4 images need 2 steps of 5 ms
    assert rate.value == pytest.approx(400)
    assert rate.ci95 == pytest.approx((4 / 0.011, 4 / 0.009))


# ---- the table of metrics.json ------------------------------------------------------------------


def test_table_holds_what_the_contract_says(found):
    base = {name: Value(value.value * 2, "dense", value.n) for name, value in found.items()}
    table = diffusion.side_by_side(base, found)
    assert list(table) == list(found)
    for name, entry in table.items():
        assert set(entry) == {"dense", "compressed", "ratio", "better", "unit", "how"}
        assert set(entry["dense"]) == {"value", "ci95", "n"}
        assert entry["how"] == found[name].how
        assert entry["ratio"] is None or entry["ratio"] == pytest.approx(0.5)
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_ratio_needs_a_positive_dense_value():
    found = {"kid_digits": Value(0.2, ""), "mse_to_dense": Value(0.1, "")}
    base = {"kid_digits": Value(-0.001, ""), "mse_to_dense": Value(0.0, "")}
    assert [row["ratio"] for row in diffusion.side_by_side(base, found).values()] == [None, None]


def table(macs, latency_ms, rate, looks=0.95):
    values = {"macs": macs, "latency_ms": latency_ms, "images_per_second": rate}
    compressed = {name: Value(value, "") for name, value in values.items()}
    compressed["looks_like_digits"] = Value(looks, "")
    return diffusion.side_by_side(dict.fromkeys(compressed, Value(1.0, "")), compressed)


def test_warnings_say_when_fewer_macs_are_not_faster():
    assert diffusion.warnings_of(table(0.5, 0.6, 1.7)) == []
    assert diffusion.warnings_of(table(1.0, 1.0, 1.0)) == []
    (slow,) = diffusion.warnings_of(table(0.5, 0.98, 1.7))
    assert "50%" in slow and "98%" in slow
    (same,) = diffusion.warnings_of(table(0.5, 0.6, 1.01))
    assert "101%" in same
    (poor,) = diffusion.warnings_of(table(0.5, 0.6, 1.7, looks=0.4))
    assert "40%" in poor
    assert diffusion.warnings_of({}) == []
