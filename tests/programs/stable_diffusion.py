"""One step of a test at the size of Stable Diffusion 1.5: ``stable_diffusion.py STEP FOLDER``.

Each step runs in a process of its own, whose peak memory is that of the step alone: ``write`` a
dense pipeline, ``cut`` it to half of the MACs, ``draw`` an image with plain diffusers.
"""

import json
import resource
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def write(folder: Path) -> None:
    """The parts around the UNet are tiny but as wide as its inputs."""
    from compress.methods.gradflow.bench import SD15

    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (folder / "words").mkdir()
    vocabulary, merges = folder / "words" / "vocab.json", folder / "words" / "merges.txt"
    vocabulary.write_text(json.dumps(words))
    merges.write_text("#version: 0.2\n")
    text = CLIPTextConfig(
        vocab_size=3,
        hidden_size=768,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77),
        unet=UNet2DConditionModel(**SD15),
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "dense")


def cut(folder: Path) -> None:
    """Prints the peak memory in GiB."""
    from compress.checkpoints.slim import save_slim
    from compress.methods.gradflow import GradFlow, surgery
    from compress.methods.gradflow.allocation import plan
    from compress.methods.gradflow.sinusoid import narrowed
    from compress.methods.gradflow.unets import find_groups
    from compress.models.loading import load_pipeline

    pipeline = load_pipeline(str(folder / "dense"))
    unet = pipeline.unet
    groups = find_groups(unet)
    layout, _ = plan(unet, groups, GradFlow(keep_macs=0.5))
    mask = torch.zeros(layout.units)
    for block, count in enumerate(layout.keep_counts.tolist()):
        mask[(layout.block == block).nonzero().squeeze(1)[:count]] = 1
    first = narrowed(unet, layout.widths[0], pipeline.scheduler.config.num_train_timesteps)
    pipeline.register_modules(unet=surgery.perform(first, layout, mask))
    save_slim(pipeline, folder / "slim", {}, source=folder / "dense")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def draw(folder: Path) -> None:
    """Prints the number of the UNet's parameters."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "slim", local_files_only=True)
    image = pipeline("a", num_inference_steps=1, output_type="pt", guidance_scale=1).images
    assert image.shape == (1, 3, 512, 512) and image.isfinite().all()
    assert not [name for name in sys.modules if name.split(".")[0] == "compress"]
    print(sum(p.numel() for p in pipeline.unet.parameters()))


if __name__ == "__main__":
    {"write": write, "cut": cut, "draw": draw}[sys.argv[1]](Path(sys.argv[2]))
