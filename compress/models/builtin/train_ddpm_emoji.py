"""Train `ddpm-emoji`: python compress/models/builtin/train_ddpm_emoji.py --run DIR.

A UNet2DModel DDPM on the training part of `builtin:emoji` at 32x32, seeded; in bfloat16 on a GPU.
DIR gets the log and a state from which --resume goes on after a kill or --seconds; DIR/model is
written whenever the validation loss of the averaged weights falls, measured as they are stored,
and with it DIR/samples.png.
"""

import argparse
import math
import time

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch.nn import functional as F

from compress.common.environment import choose_device
from compress.common.files import image_png, write_bytes
from compress.data.batches import StepSampler
from compress.data.emoji import GROUPS, emoji
from compress.models.builtin.training import DenoiserTrainer, run_arguments, train
from compress.models.objective import validation_loss

EMA, WARMUP = 0.9995, 500
COOLDOWN = 0.3  # the last share of the steps, in which the learning rate falls to 0


def build_unet(dropout: float = 0.0) -> UNet2DModel:
    """The architecture of ddpm-emoji: 4 levels, attention at 8x8, 4x4 and in the middle."""
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(24, 48, 64, 256),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        dropout=dropout,
    )


class Trainer(DenoiserTrainer):
    """Trains ddpm-emoji."""

    FACTS = (*DenoiserTrainer.FACTS, "seconds")

    def __init__(self, args: argparse.Namespace) -> None:
        self.seconds, self.device = 0.0, torch.device(choose_device(args.device))
        torch.manual_seed(args.seed)
        unet = build_unet(args.dropout).to(self.device, memory_format=torch.channels_last)
        super().__init__(args, unet)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
        self.held_out = emoji("held_out")[0]

    def run(self) -> None:
        """Train until the steps or the seconds are over."""
        self.journal.begin()
        args, began, before = self.args, time.monotonic(), self.seconds
        images, groups = (part.to(self.device) for part in emoji("train"))
        # signs and letters have a direction
        mirrored = groups != GROUPS.index("Symbols")
        losses: list[torch.Tensor] = []
        evaluated = began
        for indices in StepSampler(len(images), args.batch, args.seed, self.step, args.steps):
            losses.append(self._optimise(images[indices], mirrored[indices]))
            self.step += 1
            now = time.monotonic()
            over = now - began >= args.seconds
            if over or now - evaluated >= args.every or self.step == args.steps:
                self.seconds = before + now - began
                self._evaluate(torch.stack(losses).mean().item())
                self.save()
                losses, evaluated = [], time.monotonic()
            if over:
                break

    def _optimise(self, images: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        args, step, count = self.args, self.step, len(images)
        torch.manual_seed(args.seed * 1_000_003 + step)  # all draws are functions of the step
        chance = torch.rand(2, count, device=self.device)
        flips = (chance[0] < 0.5) & mirrored
        images = torch.where(flips[:, None, None, None], images.flip(-1), images)
        strata = torch.arange(count, device=self.device) + chance[1]
        timesteps = (strata * (1000 / count)).long().clamp(max=999)
        noise = torch.randn_like(images)
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu):
            predicted = self.model(noisy, timesteps).sample
        loss = F.mse_loss(predicted.float(), noise)
        left = (args.steps - step) / (COOLDOWN * args.steps)
        self.learn(loss, args.lr * min(1.0, (step + 1) / WARMUP, left), EMA)
        return loss.detach()

    def _evaluate(self, train_loss: float) -> None:
        """Log, and publish the averaged weights where they are the best so far."""
        stored = self.as_stored(build_unet().to(self.device))
        loss = validation_loss(
            lambda x, t: stored(x, t).sample, self.held_out, self.scheduler, 1, device=self.device
        )
        self.log(
            {
                "images": self.step * self.args.batch,
                "seconds": round(self.seconds),
                "train_loss": round(train_loss, 5),
                "validation_loss": round(loss, 5),
            }
        )
        if loss < self.best:
            self.best = loss
            pipeline = DDPMPipeline(stored, self.scheduler)
            write_bytes(self.args.run / "samples.png", image_png(samples(pipeline)))
            self.publish(pipeline)


def samples(pipeline: DDPMPipeline, count: int = 32, steps: int = 25) -> Image.Image:
    """Rows of eight emoji drawn with DDIM, at twice their size."""
    drawn = DDPMPipeline(pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config))
    drawn.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = drawn(count, generator, num_inference_steps=steps).images
    sheet = Image.new("RGB", (8 * 64, -(-count // 8) * 64), "white")
    for number, image in enumerate(images):
        sheet.paste(image.resize((64, 64)), (number % 8 * 64, number // 8 * 64))
    return sheet


if __name__ == "__main__":
    parser = run_arguments(__doc__)
    parser.add_argument("--steps", type=int, default=40000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of this call")
    parser.add_argument("--every", type=float, default=60, help="seconds between evaluations")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--device", help="CUDA where there is any by default")
    train(parser, Trainer)
