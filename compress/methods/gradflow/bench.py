"""Denoising UNets of published architectures, dense against slim, with random weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.bench.building import built
from compress.bench.cells import profile, times, where, with_note
from compress.bench.rows import SEED, Dtype, Row, against, make_row
from compress.bench.suite import Benchmark
from compress.bench.timing import Bench, Ceilings, costliest, time_ways
from compress.common.cost import cost, unet_inputs
from compress.common.settings import Batch
from compress.eval.latency import peak_memory
from compress.methods.gradflow.groups import UNet
from compress.methods.gradflow.layout import build_layout
from compress.methods.gradflow.surgery import slim_config
from compress.methods.gradflow.unets import find_groups
from compress.methods.gradflow.widths import choose_widths
from compress.models.builtin.train_ddpm_digits import build_unet

AIM = 0.8  # of the MAC ratio
# google/ddpm-cifar10-32, config.json: 35.7 million parameters
CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
}
# stable-diffusion-v1-5, unet/config.json, where it differs from diffusers' defaults: 860 million
SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
# of the slim widths, which are the same from 0.01 to 0.03
EVEN_WITHIN = 0.01
DENSE: dict[str, Callable[[], UNet]] = {
    "ddpm-cifar10": lambda: UNet2DModel(**CIFAR10),
    "ddpm-digits": lambda: build_unet(dropout=0.0),
    "sd15": lambda: UNet2DConditionModel(**SD15),
}


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class UNetShape:
    """One denoising step.

    Parameters
    ----------
    model : architecture; "sd15" is Stable Diffusion 1.5's, with a prompt beside each image.
    keep_macs : of the slim model; the legal widths of "ddpm-cifar10" have few shares.
    batch : images.
    dtype : of weights and images.
    layout : of both in memory; None is torch's own, contiguous.
    compiled : mode of torch.compile, for both models; None runs them eagerly.
    """

    model: Literal["ddpm-cifar10", "ddpm-digits", "sd15"] = "ddpm-cifar10"
    keep_macs: Annotated[float, Field(gt=0, lt=1)] = 0.57
    batch: Batch = 1
    dtype: Dtype = "float32"
    layout: Literal["channels_last"] | None = None
    compiled: Literal["default", "max-autotune-no-cudagraphs"] | None = None


def default_shapes(device: str) -> list[UNetShape]:
    """The shapes that are timed by default."""
    if torch.device(device).type == "cuda":
        sizes: list[Any] = [
            *({"batch": n, "dtype": d} for n in (1, 16, 64) for d in ("float32", "bfloat16")),
            *({"model": "sd15", "batch": n, "dtype": "bfloat16"} for n in (1, 16)),
        ]
        # as those who want speed run them
        fast = {"layout": "channels_last", "compiled": "default"}
        sizes += [size | fast for size in sizes if size["dtype"] == "bfloat16"]
        return [UNetShape(**size) for size in sizes]
    return [
        *(UNetShape(batch=n, layout=layout) for n in (1, 16) for layout in (None, "channels_last")),
        UNetShape(model="sd15"),
    ]


def slim_builder(dense: UNet, keep_macs: float) -> Callable[[], UNet]:
    """A builder of the slim UNet: the configuration that surgery gives it, with new weights."""
    groups = find_groups(dense)
    layout = build_layout(dense, groups, choose_widths(dense, groups, keep_macs, EVEN_WITHIN))
    return lambda: type(dense).from_config(slim_config(dense, layout))


def random_inputs(unet: UNet, batch: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Inputs of a step: noise in place of images and prompts, all at the first time step."""
    generator = torch.Generator(device).manual_seed(SEED)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, device=device, generator=generator).to(dtype)

    zeros = unet_inputs(unet, batch, device)
    return {name: noise(t) if t.is_floating_point() else t for name, t in zeros.items()}


def run(shape: UNetShape, bench: Bench, ceilings: Ceilings) -> Iterator[Row]:
    """Time a step of the dense and of the slim UNet, in turns."""
    dtype, device = getattr(torch, shape.dtype), bench.device
    models = {"dense": built(DENSE[shape.model], dtype, device)}
    models["slim"] = built(slim_builder(models["dense"], shape.keep_macs), dtype, device)
    inputs = random_inputs(models["dense"], shape.batch, dtype, device)
    if shape.layout:
        for model in models.values():
            model.to(memory_format=torch.channels_last)
        inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
    costs = {name: cost(model, inputs) for name, model in models.items()}
    ways = {name: _step(model, inputs, shape.compiled) for name, model in models.items()}
    timing = time_ways(ways, bench)
    macs = costs["dense"].macs / costs["slim"].macs
    speedup = timing.ms["dense"].median / timing.ms["slim"].median
    done = 2 * costs["slim"].macs / timing.ms["slim"].median / 1e9
    memory = {name: peak_memory(m, inputs, device=device) for name, m in models.items()}
    facts: dict[str, Any] = {
        **against(speedup, macs),
        "aim": AIM,
        "warning": warning(speedup, macs),
        "cost": {name: asdict(measured) for name, measured in costs.items()},
        "memory_mb": {name: measured.megabytes for name, measured in memory.items()},
        "memory_how": memory["dense"].how,
        "tflop_per_s": done,
        "share_of_rate": done / ceilings.rate[shape.dtype],
        "graphs": timing.graphs,
        "profile": {name: costliest(way, device) for name, way in ways.items()},
    }
    yield make_row("gradflow", "unet", asdict(shape), timing.ms, bench, facts)


def _step(unet: UNet, inputs: dict[str, Any], compiled: str | None) -> Callable[[], Any]:
    call = torch.compile(unet, mode=compiled) if compiled else unet
    return lambda: call(**inputs)


def warning(speedup: float, macs: float) -> str | None:
    """A warning where time does not fall with the MACs, otherwise None."""
    if speedup / macs >= AIM:
        return None
    verb = "did not fall" if speedup < 1.05 else "fell less"
    return (
        f"MACs fell to {1 / macs:.0%} and time {verb}: {1 / speedup:.0%}; these widths do not suit "
        "the device at this batch"
    )


# ---- the benchmark and its table ---------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, with what was timed beneath."""

    def unet(row: Row) -> str:
        shape = row["shape"]
        compiled = "compiled" if shape.get("compiled") else None
        parts = shape["model"], shape["dtype"], shape.get("layout"), compiled
        return ", ".join(part for part in parts if part)

    return with_note(
        rows,
        {
            "device": where,
            "UNet": unet,
            "batch": lambda row: str(row["shape"]["batch"]),
            "dense": times("dense"),
            "slim": times("slim"),
            "speed-up": lambda row: f"{row['ratio']:.2f}x",
            "of the MACs' ratio": lambda row: f"{row['share_of_bound']:.0%} of {row['bound']:.2f}x",
            "TFLOP/s, of the matrix rate": lambda row: (
                f"{row['tflop_per_s']:.3g}, {row['share_of_rate']:.0%}"
            ),
            "costliest operators": profile,
        },
        "One denoising step at full size with random weights, `keep_macs` 0.57; the aim is 80% of "
        "the MACs' ratio.",
    )


BENCHMARK = Benchmark("gradflow", UNetShape, "model=ddpm-digits", default_shapes, run, table)
