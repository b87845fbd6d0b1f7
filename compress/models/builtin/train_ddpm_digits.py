"""Train the built-in `ddpm-digits` pipeline: python train_ddpm_digits.py --output DIR.

A UNet2DModel DDPM on half a of scikit-learn's digits at 16x16. Seeded; writes the pipeline folder
and `train.jsonl` (training loss and the validation loss of the averaged weights on half b).
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.nn import functional as F

from compress.common.output_folder import check_replaceable
from compress.data.batches import StepSampler, noise_and_timesteps
from compress.data.digits import digits
from compress.models.objective import validation_loss


def build_unet(dropout: float) -> UNet2DModel:
    """The architecture of ddpm-digits: 4 levels, attention at 8x8, 4x4 and in the middle."""
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(24, 32, 64, 112),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        dropout=dropout,
    )


def main() -> None:
    """Train and save the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4500, help="length of the cosine")
    # the validation loss bottoms out at 3000 and has begun to rise: half a has 901 images
    parser.add_argument("--stop", type=int, default=3500, help="early stop")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="new folder of the pipeline")
    args = parser.parse_args()
    check_replaceable(args.output, "pipeline", overwrite=False)

    torch.manual_seed(args.seed)
    unet = build_unet(dropout=0.1)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    images, unseen = digits("a")[0], digits("b")[0]
    averaged = copy.deepcopy(unet).eval()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: (
            min(1.0, (k + 1) / 200)
            * 0.5
            * (1 + torch.cos(torch.tensor(torch.pi * k / args.steps)).item())
        ),
    )
    args.output.mkdir(parents=True, exist_ok=True)
    log, started, running = [], time.time(), 0.0
    for step, indices in enumerate(StepSampler(len(images), args.batch, args.seed, 0, args.stop)):
        batch = noise_and_timesteps(images[indices], 1000, args.seed, step)
        noisy = scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
        loss = F.mse_loss(unet(noisy, batch.timesteps).sample, batch.noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), unet.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 250 == 0 or step + 1 == args.stop:
            row = {
                "step": step + 1,
                "train_loss": round(running, 5),
                "validation_loss": round(
                    validation_loss(lambda x, t: averaged(x, t).sample, unseen, scheduler), 5
                ),
                "seconds": round(time.time() - started, 1),
            }
            log.append(json.dumps(row))
            print(log[-1], flush=True)
            save(averaged, scheduler, args.output)
            (args.output / "train.jsonl").write_text("\n".join(log) + "\n")


def save(averaged: UNet2DModel, scheduler: DDPMScheduler, folder: Path) -> None:
    """Save the averaged weights; dropout has no weights, and the shipped model runs without it."""
    plain = build_unet(dropout=0.0)
    plain.load_state_dict(averaged.state_dict())
    DDPMPipeline(unet=plain, scheduler=scheduler).save_pretrained(folder)


if __name__ == "__main__":
    main()
