"""Train `ddpm-emoji`: python compress/models/builtin/train_ddpm_emoji.py --run DIR.

A UNet2DModel DDPM on the training part of `builtin:emoji` at 32x32, seeded; in bfloat16 on a GPU.
DIR gets the log and a state from which --resume goes on after a kill or --seconds; DIR/model is
written whenever the validation loss of the averaged weights falls, measured as they are stored,
and with it DIR/samples.png.
"""

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from compress.common.environment import choose_device
from compress.common.files import atomic_folder, image_png, write_bytes, write_text
from compress.common.journal import Journal
from compress.common.output_folder import claim
from compress.data.batches import StepSampler
from compress.data.emoji import GROUPS, emoji
from compress.models.objective import validation_loss

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA, WARMUP = 0.9995, 500


def build_unet(dropout: float = 0.0) -> UNet2DModel:
    """The architecture of ddpm-emoji: 4 levels, attention at 8x8, 4x4 and in the middle."""
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 48, 96, 224),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        dropout=dropout,
    )


class Trainer:
    """Trains ddpm-emoji; all that a resumed run needs lies in the journal."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.journal, self.step, self.best = args, Journal(args.run), 0, math.inf
        self.seconds, self.device = 0.0, torch.device(choose_device(args.device))
        torch.manual_seed(args.seed)
        self.model = build_unet(dropout=0.1).to(self.device, memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.model).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.lr, fused=self.device.type == "cuda"
        )
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
        self.held_out = emoji("held_out")[0]

    def resume(self) -> None:
        """Go back to the stored state, if there is one."""
        saved = self.journal.load()
        if saved is None:
            return
        self.model.load_state_dict(saved.part("model"))
        self.averaged.load_state_dict(saved.part("averaged"))
        self.step, self.best = saved.facts["step"], saved.facts["best"]
        self.seconds = saved.facts["seconds"]
        moments = {key: saved.part(key) for key in MOMENTS}
        state = {
            number: {"step": torch.tensor(float(self.step))}
            | {key: moments[key][name] for key in MOMENTS}
            for number, (name, _) in enumerate(self.model.named_parameters())
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def save(self) -> None:
        """Store weights, averages, moments and where the run is."""
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"averaged/{name}": t for name, t in self.averaged.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key in MOMENTS:
                tensors[f"{key}/{name}"] = self.optimizer.state[parameter][key]
        facts = {"step": self.step, "best": self.best, "seconds": self.seconds}
        self.journal.save(tensors, facts)

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
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / WARMUP)
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
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        average = get_ema_multi_avg_fn(min(EMA, (1 + step) / (10 + step)))
        average(list(self.averaged.parameters()), list(self.model.parameters()), step)
        return loss.detach()

    def _evaluate(self, train_loss: float) -> None:
        """Log, and publish the averaged weights where they are the best so far."""
        stored = build_unet().eval().to(self.device)
        stored.load_state_dict({n: t.half().float() for n, t in self.averaged.state_dict().items()})
        loss = validation_loss(
            lambda x, t: stored(x, t).sample, self.held_out, self.scheduler, 1, device=self.device
        )
        self.journal.log(
            step=self.step,
            images=self.step * self.args.batch,
            seconds=round(self.seconds),
            train_loss=round(train_loss, 5),
            validation_loss=round(loss, 5),
        )
        print(self.journal.rows[-1], flush=True)
        if loss < self.best:
            self.best = loss
            pipeline = DDPMPipeline(stored, self.scheduler)
            write_bytes(self.args.run / "samples.png", image_png(samples(pipeline)))
            with atomic_folder(self.args.run / "model") as folder:
                pipeline.to(torch.float16).save_pretrained(folder)
                rows = "".join(json.dumps(row) + "\n" for row in self.journal.rows)
                write_text(folder / "train.jsonl", rows)


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


def main() -> None:
    """Train and save the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="new folder of log and model")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --run")
    parser.add_argument("--steps", type=int, default=40000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of this call")
    parser.add_argument("--every", type=float, default=60, help="seconds between evaluations")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="CUDA where there is any by default")
    args = parser.parse_args()
    if not args.resume and os.path.lexists(args.run):
        parser.error(f"{args.run} exists; give --resume to go on, or another folder")
    with claim(args.run, "training", resume=args.resume, overwrite=False):
        trainer = Trainer(args)
        if args.resume:
            trainer.resume()
        trainer.run()


if __name__ == "__main__":
    main()
