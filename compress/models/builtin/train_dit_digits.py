"""Train the built-in `dit-digits`: python compress/models/builtin/train_dit_digits.py --run DIR.

A class-conditional DiTPipeline on half a of the digits at 16x16. Seeded; DIR gets the log and a
state from which --resume goes on after a kill; DIR/model is written whenever the validation loss of
the averaged weights on half b falls, measured on the weights as stored.
"""

import argparse
import math

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn
from torch.nn import functional as F

from compress.data.batches import StepSampler, by_chance, noise_and_timesteps
from compress.data.digits import digits
from compress.models.builtin.training import DenoiserTrainer, run_arguments, train
from compress.models.classifiers import load_classifier

BLOCKS, HEADS, HEAD, PATCH = 12, 4, 16, 4
# DiTPipeline guides away from label 1000, whatever the number of classes
NO_LABEL = 1000
UNLABELLED = 0.1
DROP_PURPOSE = 2


def build_transformer(dropout: float = 0.0) -> DiTTransformer2DModel:
    """The architecture of dit-digits, whose blocks start as identities (adaLN-Zero)."""
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        in_channels=1,
        out_channels=1,
        num_layers=BLOCKS,
        dropout=dropout,
        sample_size=16,
        patch_size=PATCH,
        num_embeds_ada_norm=NO_LABEL,
    )
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        labels = block.norm1.emb.class_embedder
        # rows of labels that there are not stay zero
        nn.init.zeros_(labels.embedding_table.weight)
        # every block would drop its own; here a sample has its label in all blocks, or in none
        labels.dropout_prob = 0.0
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)
    return model


@torch.no_grad()
def identity_autoencoder() -> AutoencoderKL:
    """An AutoencoderKL whose latents are the pixels, up to 1e-5: a DiTPipeline must have one.

    Each half carries ``x, -x, K, -K``. The constants outweigh the image in the norm's variance, so
    that it divides by ``K / sqrt(2)`` alone, and ``silu(x) - silu(-x) = x``.
    """
    constant, scale = 577.0, 408.0  # their ratio is the root of 2 up to 1e-6
    model = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=16,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    for half in (model.encoder, model.decoder):
        for name, parameter in half.named_parameters():
            if "conv2" in name:  # what a resnet adds to its input
                nn.init.zeros_(parameter)
        for conv in (half.conv_in, half.conv_out):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)
        signs = torch.tensor([1.0, -1.0, 0.0, 0.0])
        half.conv_in.weight[:, 0, 1, 1] = signs
        half.conv_in.bias.copy_(constant * signs.roll(2))
        half.conv_norm_out.weight.fill_(scale)
        half.conv_out.weight[0, :, 1, 1] = signs
    model.encoder.conv_out.bias[1] = -30.0  # the logarithm of the latents' variance
    return model


def validation_loss(model: nn.Module, scheduler: DDIMScheduler, draws: int = 2) -> float:
    """Denoising loss on half b with fixed noise and stratified timesteps."""
    images, labels = digits("b")
    total = 0.0
    with torch.no_grad():
        for draw in range(draws):
            batch = noise_and_timesteps(images, 1000, seed=99, step=draw)
            noisy = scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
            predicted = model(noisy, timestep=batch.timesteps, class_labels=labels).sample
            total += F.mse_loss(predicted, batch.noise).item()
    return total / draws


def accuracy(pipeline: DiTPipeline, count: int = 200) -> float:
    """Share of digits drawn without guidance in 20 steps that the judge takes for their class."""
    labels = [i % 10 for i in range(count)]
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        labels,
        guidance_scale=1.0,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    judged = load_classifier("digits-judge")(drawn * 2 - 1).argmax(1)
    return (judged == torch.tensor(labels)).float().mean().item()


class Trainer(DenoiserTrainer):
    """Trains dit-digits."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        super().__init__(args, build_transformer(dropout=0.05))
        self.scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")

    def run(self) -> None:
        """Train to the end."""
        self.journal.begin()
        images, labels = digits("a")
        args, running = self.args, math.nan
        for indices in StepSampler(len(images), args.batch, args.seed, self.step, args.stop):
            loss = self._optimise(images[indices], labels[indices])
            self.step += 1
            running = loss if math.isnan(running) else 0.98 * running + 0.02 * loss
            if self.step % 250 == 0 or self.step == args.stop:
                self._evaluate(running)
                self.save()

    def _optimise(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        args, step = self.args, self.step
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout
        batch = noise_and_timesteps(images, 1000, args.seed, step)
        noisy = self.scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
        gone = torch.tensor(by_chance(len(images), UNLABELLED, args.seed, step, 0, DROP_PURPOSE))
        known = labels.masked_fill(gone, NO_LABEL)
        predicted = self.model(noisy, timestep=batch.timesteps, class_labels=known).sample
        loss = F.mse_loss(predicted, batch.noise)
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        self.learn(loss, args.lr * min(1.0, (step + 1) / 200) * cosine, 0.999)
        return loss.item()

    def _evaluate(self, running: float) -> None:
        """Log, and publish the averaged weights where they are the best so far."""
        stored = self.as_stored(build_transformer())
        loss = validation_loss(stored, self.scheduler)
        pipeline = DiTPipeline(stored, identity_autoencoder(), self.scheduler)
        self.log(
            {
                "train_loss": round(running, 5),
                "validation_loss": round(loss, 5),
                "class_accuracy": round(accuracy(pipeline), 4),
            }
        )
        if loss < self.best:
            self.best = loss
            self.publish(pipeline)


if __name__ == "__main__":
    parser = run_arguments(__doc__)
    parser.add_argument("--steps", type=int, default=8000, help="length of the cosine")
    parser.add_argument("--stop", type=int, default=7500, help="early stop")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    train(parser, Trainer)
