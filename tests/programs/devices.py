"""Compress on an emulated accelerator: ``devices.py WHAT ...`` prints, as JSON, what went wrong.

All that lies on the CPU where the model is elsewhere is an error, as it is on a GPU. What is
computed is compared with the CPU's where nothing is rounded otherwise.
"""

import gc
import json
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import torch

from builders import accelerator, fastocr, models, pipelines, pruning, vlm
from builders.quick import quick_runs
from compress.checkpoints.applied import Applied
from compress.common.events import drain
from compress.common.journal import Journal
from compress.data.sources import ImageData
from compress.eval.sampling import sample
from compress.methods.base import PruneJob
from compress.methods.fastocr import FastOCR
from compress.methods.gradflow import GradFlow, OneShot, criterion
from compress.methods.gradflow import train as trainer
from compress.methods.gradflow.masks import SoftUNet
from compress.methods.pixelprune import PixelPrune
from compress.methods.rtprune import RTPrune
from compress.methods.training import Training
from compress.models.reading import page_prompts, try_pages
from compress.runs import diffusion as runs
from compress.runs.recipe import load_recipe
from compress.runs.run import run_events

WHERE = accelerator.NAME
ONE_LEVEL = {
    "block_out_channels": (8,),
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("AttnUpBlock2D",),
    "mid_block_type": None,
    "sample_size": 8,
}


def train(pipeline, method, data, folder=None, stop=None, resume=False, device=WHERE, **training):
    accelerator.forget()
    options = {"steps": 1, "batch": 4, "save_every": 1} | training
    job = PruneJob(pipeline, data, Training(**options), device, Journal(folder), resume)
    events = trainer.prune(method, job)
    if stop is None:
        return drain(events)
    for event in events:
        if (event.stage, event.step) == stop:
            events.close()
    return None


def labelled(given: ImageData) -> ImageData:
    labels = [[k % 3 for k in range(len(part))] for part in (given.train, given.held_out)]
    return ImageData(given.name, given.train, given.held_out, *labels)


def soft_pruning_and_resuming() -> None:
    """Coarse masks, micro-batches, flips, labels, both distillations, checkpointing, states."""
    data, folder = labelled(pruning.noise(held_out=2)), Path("resumed")
    folder.mkdir()
    method = GradFlow(keep_macs=0.5, steps=2, criterion_batches=1, granularity="coarse")
    options = {
        "gradient_accumulation": 2,
        "flip": True,
        "distill_features": 0.5,
        "gradient_checkpointing": True,
    }

    def pipeline():
        torch.manual_seed(1)
        return pipelines.pixels(num_class_embeds=3, **ONE_LEVEL)

    train(pipeline(), method, data, folder, ("flow", 1), **options)
    resumed = train(pipeline(), method, data, folder, resume=True, **options)
    expected = train(pipeline(), method, data, device="cpu", **options)
    torch.testing.assert_close(resumed.model.state_dict(), expected.model.state_dict())


def half_precision() -> None:
    """Autocast, and float16's scaled gradients."""
    method = OneShot(keep_macs=0.5, steps=0, criterion="random", criterion_batches=1)
    for precision in ("fp16", "bf16"):
        pipeline = pipelines.pixels(**ONE_LEVEL)
        train(pipeline, method, pruning.noise(held_out=2), mixed_precision=precision)


def criteria() -> None:
    """Scores of channels, and exact products with the Hessian."""
    unet = models.build("one_level")
    soft = SoftUNet(unet, models.layout("one_level", (4,)))
    batches = models.batches(unet, 1, 2)
    noise = models.scheduler()
    moved = [
        batch._replace(**{k: getattr(batch, k).to(WHERE) for k in batch._fields[:3]})
        for batch in batches
    ]

    def scores(where: str, given) -> dict[str, torch.Tensor]:
        soft.to(where)
        found = {
            name: criterion.raw_scores(soft, noise, given, criterion=name)
            for name in ("gradient_flow", "taylor", "magnitude", "random")
        }
        found["exact"] = criterion.raw_scores(
            soft, noise, given, criterion="gradient_flow", hvp="exact"
        )
        found["fisher"] = criterion.fisher_scores(soft, noise, given)
        found["diff_pruning"] = criterion.diff_pruning_scores(
            soft, noise, given, threshold=0.05, timesteps=2
        )
        return {name: score.cpu() for name, score in found.items()}

    expected = scores("cpu", batches)
    for name, score in scores(WHERE, moved).items():
        # finite differences divide what attention rounds otherwise
        rtol = 0.1 if name == "gradient_flow" else 1e-3
        torch.testing.assert_close(score, expected[name], rtol=rtol, atol=1e-3)


def a_transformer() -> None:
    """Whole blocks, and labels that are dropped."""
    data = labelled(pruning.noise(pipelines.SIZE, held_out=2))
    method = OneShot(
        keep_macs=0.6,
        steps=0,
        criterion="block_influence",
        criterion_batches=1,
        granularity="block",
    )
    train(pipelines.class_transformer(), method, data, condition_dropout=0.5)


def latents_and_captions() -> None:
    """Autoencoders and text encoders, in training and drawing."""
    images = torch.rand(6, 3, pipelines.SIZE, pipelines.SIZE) * 2 - 1
    words = [f"blue {k}" for k in range(6)]
    data = ImageData("noise", images[:4], images[4:], words[:4], words[4:])
    pipeline = pipelines.build("sdxl", Path("sdxl"))
    method = OneShot(
        keep_macs=pipelines.KEEP["sdxl"], steps=0, criterion="random", criterion_batches=1
    )
    train(pipeline, method, data, condition_dropout=0.5)
    for name in ("sd1", "ldm"):
        pipeline = pipelines.build(name, Path(f"drawing {name}"))
        given = words[:2] if name != "ldm" else ()
        options = {"steps": 1, "sampler": "ddim", "seed": 0, "conditions": given}
        drawn = [sample(pipeline, count=2, device=where, **options) for where in ("cpu", WHERE)]
        torch.testing.assert_close(*drawn, atol=1, rtol=0)


def a_run() -> None:
    """A recipe's whole run but its report: free widths, lookahead, and every metric."""
    torch.manual_seed(1)
    pipelines.pixels(**ONE_LEVEL | {"sample_size": 16}).save_pretrained("model")
    recipe = {
        "model": "model",
        "data": "builtin:digits",
        "method": {
            "name": "gradflow",
            "keep_macs": 0.7,
            "steps": 1,
            "criterion": "lookahead",
            "criterion_batches": 1,
            "allocation": "global",
        },
        "recover": {"steps": 1, "batch": 2},
        "evaluate": {"samples": 4, "steps": 1, "sampling_seeds": 2, "batch": 4},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    accelerator.forget()
    few = patch.object(trainer, "COMPARED", 4), patch.object(runs, "REFERENCE_LIMIT", 16)
    with quick_runs(), few[0], few[1], patch.object(runs, "write_report"):
        drain(run_events(load_recipe("recipe.yaml"), output=Path("run"), device=WHERE))


FEW = {"keep_visual": 0.3, "min_visual": 0}
FOCAL = FEW | {"min_fixation": 2, "warmup": 2}
READERS = (
    ("qwen2_5_vl", FastOCR(**FOCAL, periphery=3, min_mass=0.9, dilate=1)),
    ("qwen2_5_vl", FastOCR(**FEW, choose="summaries")),
    ("qwen2_5_vl", PixelPrune(threshold=0.5, image_std=(0.3, 0.3, 0.3))),
    ("unlimited_ocr", RTPrune(), FastOCR(**FOCAL)),
    ("deepseek_ocr2", RTPrune(keep_tokens=0.4, select="visionzip")),
)


class Page:
    def __init__(self, name: str, image) -> None:
        self.name, self.image = name, image

    def open(self):
        return self.image


def readers() -> None:
    """Reading with each method, and calibration: the same texts as on the CPU."""
    pages = [Page(str(k), image) for k, image in enumerate(vlm.PAGES)]
    known = {family: fastocr.model(family) for family, *_ in READERS}
    texts = {}
    for where in ("cpu", WHERE):
        for number, (family, *methods) in enumerate(READERS):
            model, processor = known[family]
            with Applied(model.to(where), methods):
                read = try_pages(model, processor, pages, max_new_tokens=4, loop_tokens=4)
            texts.setdefault(number, []).append([reading.text for reading in read])
    for ours, theirs in texts.values():
        assert ours == theirs, (ours, theirs)
    model, processor = known["qwen2_5_vl"]
    prompts = page_prompts(model, processor, vlm.PAGES)
    FastOCR(**FOCAL).calibrate(model, [prompts], 4)


def refusals() -> None:
    """What CUDA refuses is refused, and in its words."""
    here, there = torch.ones(2, 2), torch.ones(2, 2, device=WHERE)
    for refused in (
        lambda: there + here,
        lambda: here @ there,
        lambda: torch.cat([there, torch.ones(())[None, None].expand(2, 2)]),
        lambda: torch.nn.functional.embedding(torch.zeros(1, dtype=torch.long), there),
        lambda: here[there.long()],
        lambda: there.numpy(),
        lambda: there.normal_(generator=torch.Generator()),
        lambda: there.long() @ there.long(),
        lambda: there.to("cpu", non_blocking=True),
    ):
        try:
            refused()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError("something was not refused")
    assert (there + torch.tensor(1.0))[torch.tensor([1])].cpu().tolist() == [[2.0, 2.0]]


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    gc.freeze()
    kept = accelerator.install()
    outcomes = {}
    for name in names:
        outcomes[name] = ""
        try:
            globals()[name]()
        except Exception:
            outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))
    del kept


if __name__ == "__main__":
    main(sys.argv[1:])
