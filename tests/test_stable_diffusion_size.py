"""The UNet of Stable Diffusion 1.5 at full size, with random weights: planned, cut, loaded, run."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from compress.methods.gradflow.bench import SD15

pytestmark = pytest.mark.slow
MOST_GIB = 16
# each in a process of its own, whose peak memory is that of the work alone; the parts around the
# UNet are tiny but as wide as its inputs
WRITE = """
import sys, json
from pathlib import Path
import torch
from diffusers import (
    AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

folder = Path(sys.argv[1])
words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
(folder / "words").mkdir()
(folder / "words" / "vocab.json").write_text(json.dumps(words))
(folder / "words" / "merges.txt").write_text("#version: 0.2\\n")
tokenizer = CLIPTokenizer(
    str(folder / "words" / "vocab.json"), str(folder / "words" / "merges.txt"),
    model_max_length=77,
)
text = CLIPTextConfig(
    vocab_size=3, hidden_size=768, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)
torch.manual_seed(0)
StableDiffusionPipeline(
    vae=AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ),
    text_encoder=CLIPTextModel(text),
    tokenizer=tokenizer,
    unet=UNet2DConditionModel(**json.loads(sys.argv[2])),
    scheduler=PNDMScheduler(
        beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False,
    ),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
).save_pretrained(folder / "dense")
"""
CUT = """
import resource, sys
from pathlib import Path
from compress.checkpoints.slim import save_slim
from compress.methods.gradflow import GradFlow, surgery
from compress.methods.gradflow.allocation import plan
from compress.methods.gradflow.groups import find_groups
from compress.models.loading import load_pipeline
import torch

folder = Path(sys.argv[1])
pipeline = load_pipeline(str(folder / "dense"))
unet = pipeline.unet
groups = find_groups(unet)
layout, _ = plan(unet, groups, GradFlow(keep_macs=0.5))
mask = torch.zeros(layout.units)
for block, quota in enumerate(layout.quota.tolist()):
    mask[(layout.block == block).nonzero().squeeze(1)[:quota]] = 1
slim = surgery.perform(unet, layout, mask)
pipeline.register_modules(unet=slim)
save_slim(pipeline, folder / "slim", {}, source=folder / "dense")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
STEP = """
import sys
from pathlib import Path
import torch
from diffusers import StableDiffusionPipeline

folder = Path(sys.argv[1])
pipeline = StableDiffusionPipeline.from_pretrained(folder / "slim", local_files_only=True)
image = pipeline("a", num_inference_steps=1, output_type="pt", guidance_scale=1).images
assert image.shape == (1, 3, 512, 512) and image.isfinite().all()
assert not [name for name in sys.modules if name.split(".")[0] == "compress"]
print(sum(p.numel() for p in pipeline.unet.parameters()))
"""


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_stable_diffusion_1_5_is_planned_cut_and_run_by_plain_diffusers(tmp_path):
    run("-c", WRITE, str(tmp_path), json.dumps(SD15))
    recipe = tmp_path / "sd.yaml"
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    captions = []
    for name in ("black.png", "white.png"):
        Image.new("RGB", (512, 512), name.removesuffix(".png")).save(pictures / name)
        captions.append(json.dumps({"file_name": name, "text": "a"}))
    (pictures / "metadata.jsonl").write_text("\n".join(captions))
    recipe.write_text(
        json.dumps(
            {
                "model": str(tmp_path / "dense"),
                "data": f"folder:{pictures}",
                "method": {"name": "gradflow", "keep_macs": 0.5},
                "output": str(tmp_path / "run"),
            }
        )
    )
    predicted = json.loads(run("-m", "compress.cli", "run", str(recipe), "--dry-run", "--json"))
    assert predicted["problems"] == [] and 0.47 <= predicted["keep_macs"] <= 0.5
    dense, slim = (int(n.replace(",", "")) for n in predicted["params"][0].split(" -> "))
    assert dense == 859_520_964  # as published
    assert float(run("-c", CUT, str(tmp_path))) <= MOST_GIB
    assert int(run("-c", STEP, str(tmp_path))) == slim
    files = [p for p in (tmp_path / "slim").rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files if p.name not in ("README.md", "compress.json"))
    assert predicted["bytes"][0].endswith(f" -> {size:,}")
