"""The diffusion suite: every number of one pipeline, each with its n, interval and provenance."""

import copy
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from scipy import stats
from torch.utils._pytree import tree_map

from compress.common.cost import unet_cost, unet_inputs
from compress.common.environment import device_name
from compress.common.files import cache_folder, write_bytes
from compress.data.sources import Images
from compress.eval.consistency import SIGMA, WINDOW, mse_to, ssim_to
from compress.eval.fidelity import DIGITS, INCEPTION, fidelity, metric_names
from compress.eval.latency import peak_memory, taking_turns
from compress.eval.metrics import DIFFUSION
from compress.eval.sampling import sample, to_uint8
from compress.eval.settings import SamplingSettings
from compress.eval.values import Value, share_interval
from compress.models.classifiers import load_classifier
from compress.models.pipelines import denoiser
from compress.parallel import distributed

# not the extractor: trained on the other half of the digits
CLASSIFIER = "digits-judge"
CLASSIFIER_CONFIDENCE = 0.9


def draw_batches(
    pipeline: DiffusionPipeline, settings: SamplingSettings, device: str | torch.device = "cpu"
) -> Iterator[torch.Tensor]:
    """Yield ``settings.batches`` batches of images; `gather` puts them together.

    The caller owns the loop, and so the progress bar. Several processes draw whole batches in
    turns, and each gets all of them: the images are those of one process, bit for bit.
    """
    parts = [
        (seed, first, min(settings.batch, settings.samples - first))
        for seed in settings.seeds
        for first in range(0, settings.samples, settings.batch)
    ]

    names = {"steps", "sampler", "batch", "conditions", "guidance_scale"}
    options = settings.model_dump(include=names)

    def draw_one(part: tuple[int, int, int]) -> torch.Tensor:
        seed, first, count = part
        return sample(pipeline, count=count, seed=seed, first=first, device=device, **options)

    yield from distributed.shared_out(parts, draw_one)


def gather(batches: Iterable[torch.Tensor], settings: SamplingSettings) -> torch.Tensor:
    """Put the batches of `draw_batches` together: ``(seeds, samples, channels, height, width)``."""
    return torch.cat(list(batches)).unflatten(0, (settings.sampling_seeds, settings.samples))


def samples_key(
    model_hash: str, settings: SamplingSettings, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Everything that decides the pixels of a model's samples; the batch size does not."""
    conditions: dict[str, Any] = {}
    if settings.conditions:
        text = json.dumps(settings.conditions)
        conditions = {
            "conditions": hashlib.sha256(text.encode()).hexdigest(),
            "guidance_scale": settings.guidance_scale,
        }
    return conditions | {
        "model": model_hash,
        "samples": settings.samples,
        "sampler": settings.sampler,
        "steps": settings.steps,
        "seeds": list(settings.seeds),
        "device": torch.device(device).type,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def samples_cache_path(key: Mapping[str, Any]) -> Path:
    """Where samples with a `samples_key` are kept, below the cache's folder."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "samples" / f"{digest[:32]}.safetensors"


def save_samples(path: Path, samples: torch.Tensor) -> None:
    """Write samples atomically; OSError when the folder cannot be made or written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, safetensors.torch.save({"images": samples.contiguous()}))


def load_samples(path: Path) -> torch.Tensor | None:
    """Read samples back; None where there are none or the file is damaged, so draw them again."""
    try:
        images = safetensors.torch.load(path.read_bytes())["images"]
    except (OSError, KeyError, safetensors.SafetensorError):
        return None
    return images if images.dtype == torch.uint8 and images.dim() == 5 else None


def reference_images(images: Images | torch.Tensor, limit: int | None = None) -> torch.Tensor:
    """Stack real images ``(channels, height, width)`` in [-1, 1] to uint8 ``(n, ...)``.

    Parameters
    ----------
    images : a data set with a length, read from its start.
    limit : read at most so many.
    """
    count = len(images)
    chosen = range(count if limit is None else min(limit, count))
    if not chosen:
        raise ValueError(
            f"the reference must hold images; got none of {count} with limit={limit}; check the "
            "data and the limit"
        )
    return torch.stack([to_uint8(images[index]) for index in chosen])


def mean_interval(values: Iterable[float]) -> tuple[float, float] | None:
    """95% t interval of a mean of few independent values; None for a single one."""
    numbers = torch.tensor(list(values), dtype=torch.float64)
    n = len(numbers)
    if n < 2:
        return None
    spread = float(numbers.std()) / math.sqrt(n) * float(stats.t.ppf(0.975, n - 1))
    return float(numbers.mean()) - spread, float(numbers.mean()) + spread


def evaluate(
    pipeline: DiffusionPipeline,
    *,
    reference: torch.Tensor,
    settings: SamplingSettings,
    samples: torch.Tensor | None = None,
    dense: torch.Tensor | None = None,
    extractor: str = DIGITS,
    device: str | torch.device = "cpu",
    extra: Mapping[str, Value] | None = None,
) -> dict[str, Value]:
    """Measure one pipeline: size, distances to real images, likeness to the dense model's images.

    Time and memory are not here, since they are fair only side by side: see `speed`.

    Parameters
    ----------
    pipeline : a diffusers pipeline, compressed or not.
    reference : real images, uint8 ``(n, channels, height, width)``.
    settings : how images are drawn.
    samples : the pipeline's images where they were drawn already with these settings, uint8
        ``(seeds, samples, channels, height, width)``.
    dense : the dense model's images from the same noise; None when this pipeline is the dense one.
    extractor : as in `fidelity.fidelity`.
    device : where sampling and the extractor run.
    extra : further metrics of `DIFFUSION`, for example ``validation_loss``.

    Returns
    -------
    dict : metric name -> `Value`, in the order of `DIFFUSION`.

    Raises
    ------
    ValueError : for what the samplers and the extractors refuse, and for unpaired samples.
    """
    if samples is None:
        samples = gather(draw_batches(pipeline, settings, device), settings)
    for name, images in (("samples", samples), ("dense", dense)):
        expected = (settings.sampling_seeds, settings.samples)
        if images is not None and images.shape[:2] != expected:
            raise ValueError(
                f"{name} must hold {settings}; got {tuple(images.shape[:2])} seeds and images; "
                "draw them with these settings"
            )
    cost = unet_cost(denoiser(pipeline)[1])
    values = {
        "params": Value(cost.params, "counted"),
        "macs": Value(cost.macs, "counted at batch 1, functional attention included"),
    }
    if settings.wants(*metric_names(extractor)):
        values |= distances(samples, reference, settings, extractor, device)
    values |= distributed.from_main(lambda: likeness(samples, dense, settings))
    if extractor == DIGITS:
        values |= distributed.from_main(lambda: digit_checks(samples, settings))
    values |= extra or {}
    return {name: values[name] for name in DIFFUSION if name in values and settings.wants(name)}


def distances(
    samples: torch.Tensor,
    reference: torch.Tensor,
    settings: SamplingSettings,
    extractor: str,
    device: str | torch.device,
) -> dict[str, Value]:
    """FID, KID, IS, precision and recall: mean over sampling seeds, t interval over them."""
    weights = settings.inception_weights
    per_seed = [
        fidelity(images, reference, extractor=extractor, weights=weights, device=device)
        for images in samples
    ]
    layer = "2048-d" if extractor == INCEPTION else "64-d"
    how = (
        f"torch-fidelity {version('torch-fidelity')}, {extractor} ({layer}), {settings}, "
        f"{len(reference)} reference images, {torch.device(device).type}; mean over seeds, "
        "t interval"
    )
    n, result = samples[:, :, 0, 0, 0].numel(), {}
    for name in per_seed[0]:
        values = [metrics[name] for metrics in per_seed]
        result[name] = Value(sum(values) / len(values), how, n, mean_interval(values))
    return result


def likeness(
    samples: torch.Tensor, dense: torch.Tensor | None, settings: SamplingSettings
) -> dict[str, Value]:
    """SSIM and MSE to the dense model's images, mean over all pairs; SSIM only where it fits."""
    images = samples.flatten(0, 1)
    n = len(images)
    if dense is None:
        same = "the dense model's images compared with themselves"
        return {"ssim_to_dense": Value(1.0, same, n), "mse_to_dense": Value(0.0, same, n)}
    originals = dense.flatten(0, 1)
    pairs = f"{settings}, same noise; mean over pairs, normal interval"
    measured = {"mse_to_dense": (mse_to(images, originals), f"grey levels in [0, 1], {pairs}")}
    if min(images.shape[-2:]) >= WINDOW:
        how = f"Gaussian window {WINDOW}, sigma {SIGMA}, {pairs}"
        measured["ssim_to_dense"] = (ssim_to(images, originals), how)
    result = {}
    for name, (values, how) in measured.items():
        mean, interval = float(values.mean()), None
        if n > 1:
            half = float(stats.norm.ppf(0.975)) * float(values.std()) / math.sqrt(n)
            interval = (mean - half, mean + half)
        result[name] = Value(mean, how, n, interval)
    return result


def digit_checks(samples: torch.Tensor, settings: SamplingSettings) -> dict[str, Value]:
    """How many samples a second classifier takes for digits, and whether classes are missing.

    ``looks_like_digits`` is the share of images to which it gives p >= 0.9 for some class;
    ``class_share_min`` and ``class_share_max`` are the shares of the rarest and the most frequent
    class, with the Wilson interval of that one class; ``class_accuracy``, where labels were asked
    for, the share of images that it takes for a digit of their class.
    """
    images = samples.flatten(0, 1).float().mean(dim=1, keepdim=True) / 127.5 - 1
    classifier = load_classifier(CLASSIFIER)
    with torch.no_grad():
        chances = torch.cat([classifier(part) for part in images.split(512)]).softmax(dim=1)
    n, classes = len(images), chances.argmax(dim=1)
    counts = classes.bincount(minlength=10)
    hits = {
        "looks_like_digits": int((chances.amax(dim=1) >= CLASSIFIER_CONFIDENCE).sum()),
        "class_share_min": int(counts.min()),
        "class_share_max": int(counts.max()),
    }
    if all(isinstance(label, int) for label in settings.conditions) and settings.conditions:
        labels = settings.conditions
        wanted = [labels[i % len(labels)] for i in range(samples.shape[1])]
        hits["class_accuracy"] = int((classes == torch.tensor(wanted).repeat(len(samples))).sum())
    rule = f"{CLASSIFIER} (p >= {CLASSIFIER_CONFIDENCE} counts as a digit)"
    how = f"{rule}, {settings}; Wilson interval"
    return {name: Value(k / n, how, n, share_interval(k, n)) for name, k in hits.items()}


def speed(
    unets: Mapping[str, Any],
    settings: SamplingSettings,
    *,
    device: str | torch.device = "cpu",
    batch: int = 64,
    repeats: int = 20,
) -> dict[str, dict[str, Value]]:
    """Latency, sampling throughput and peak memory of several UNets, measured in turns.

    Parameters
    ----------
    unets : by name, for example ``{"dense": ..., "compressed": ...}``; copied, never moved.
    settings : whose ``steps`` turn time per step into images per second.
    device : where to measure.
    batch : images per pass of throughput and memory; latency is measured at batch 1.
    repeats : timed passes per UNet; throughput, being steadier, takes a quarter of them.

    Returns
    -------
    dict : name -> metric -> `Value`.
    """
    device = torch.device(device)
    copies = {name: copy.deepcopy(unet).eval().to(device) for name, unet in unets.items()}
    first = next(iter(copies.values()))

    def placed(value: torch.Tensor) -> torch.Tensor:
        return value.to(device, first.dtype) if value.is_floating_point() else value.to(device)

    one, many = (tree_map(placed, unet_inputs(first, size, "cpu")) for size in (1, batch))
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    where = f"{device_name(device)}{threads}"
    steps = {name: partial(unet, **one) for name, unet in copies.items()}
    blocks = {name: partial(unet, **many) for name, unet in copies.items()}
    single = taking_turns(steps, device, repeats=repeats)
    whole = taking_turns(blocks, device, repeats=max(1, repeats // 4), warmup=1)
    result = {}
    for name, unet in copies.items():
        step, block = single[name], whole[name]
        memory = peak_memory(unet, many, device=device)
        per_second = batch * 1e3 / settings.steps
        result[name] = {
            "latency_ms": Value(
                step.median,
                f"one forward pass at batch 1, {where}; median, p20 {step.p20:.2f}, "
                f"p80 {step.p80:.2f}, models in turns; order-statistic interval",
                step.n,
                None if step.low is None or step.high is None else (step.low, step.high),
            ),
            "images_per_second": Value(
                per_second / block.median,
                f"forward passes of {settings.steps} steps at batch {batch}, {where}; from the "
                "median, models in turns",
                block.n,
                None
                if block.low is None or block.high is None
                else (per_second / block.high, per_second / block.low),
            ),
            "peak_memory_mb": Value(memory.megabytes, f"batch {batch}, {where}; {memory.how}"),
        }
    return result


def side_by_side(
    dense: Mapping[str, Value], compressed: Mapping[str, Value]
) -> dict[str, dict[str, Any]]:
    """Make the ``metrics`` part of metrics.json out of the values of two pipelines.

    ``ratio`` is compressed / dense, null where the dense value is not positive.
    """
    table = {}
    for name, metric in DIFFUSION.items():
        if name not in dense or name not in compressed:
            continue
        before, after = dense[name], compressed[name]
        table[name] = {
            **{
                side: {"value": value.value, "ci95": value.ci95 and [*value.ci95], "n": value.n}
                for side, value in (("dense", before), ("compressed", after))
            },
            "ratio": after.value / before.value if before.value > 0 else None,
            "better": metric.better,
            "unit": metric.unit,
            "how": after.how,
        }
    return table


def warnings_of(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say what a reader of the numbers should not miss; goes to metrics.json as ``warnings``.

    Parameters
    ----------
    metrics : as `side_by_side` makes it.
    """

    def ratio(name: str) -> float | None:
        return metrics.get(name, {}).get("ratio")

    warnings = []
    macs, step, rate = ratio("macs"), ratio("latency_ms"), ratio("images_per_second")
    if macs is not None and macs < 0.95:
        if step is not None and step > 0.95:
            warnings.append(
                f"MACs fell to {macs:.0%} of the dense model's, but the latency of a step at batch "
                f"1 only to {step:.0%}: a step this small is not limited by arithmetic on this "
                "device"
            )
        if rate is not None and rate < 1.05:
            warnings.append(
                f"MACs fell to {macs:.0%} of the dense model's, but images per second only rose to "
                f"{rate:.0%}: these widths do not suit the device"
            )
    looks = metrics.get("looks_like_digits", {}).get("compressed", {}).get("value")
    if looks is not None and looks < 0.9:
        warnings.append(
            f"only {looks:.0%} of the compressed model's samples are digits to a second "
            "classifier; below 90% the distances compare poor images"
        )
    return warnings
