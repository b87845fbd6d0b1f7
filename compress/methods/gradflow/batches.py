"""The denoising batches of a pruning run, each a function of (seed, step, sample)."""

from collections.abc import Iterator

from accelerate import Accelerator
from torch.utils.data import DataLoader

from compress.data.batches import Batch, Examples, StepSampler, flipped
from compress.data.sources import ImageData, Pairs, stacked
from compress.methods.training import Training
from compress.models.objective import Inputs

# added to the seed where batches are drawn for the criterion
CRITERION_SEED = 7919


class Batches:
    """Draws this process's share of every batch.

    Parameters
    ----------
    data : training and held-out images.
    inputs : makes clean samples and conditions of them.
    training : batch size, micro-batches, seed and loading.
    timesteps : length of the noise schedule.
    accelerator : tells how many processes share a batch, and where this one works.
    """

    def __init__(
        self,
        data: ImageData,
        inputs: Inputs,
        training: Training,
        timesteps: int,
        accelerator: Accelerator,
    ) -> None:
        self.data, self.inputs, self.training, self.timesteps = data, inputs, training, timesteps
        self.device = accelerator.device
        self.process, self.processes = accelerator.process_index, accelerator.num_processes

    def examples(self, start: int, stop: int, seed: int) -> Iterator[Examples]:
        """Training images of each optimiser step in [start, stop), on the CPU."""
        training = self.training
        sampler = StepSampler(
            len(self.data.train), training.batch, seed, start, stop, self.process, self.processes
        )
        return iter(
            DataLoader(
                Pairs(self.data.train, self.data.train_conditions),
                batch_sampler=sampler,
                num_workers=training.workers,
                collate_fn=stacked,
                prefetch_factor=training.prefetch if training.workers else None,
                pin_memory=self.device.type == "cuda",
            )
        )

    def training_parts(self, examples: Examples, step: int) -> Iterator[Batch]:
        """The micro-batches of an optimiser step."""
        images, seed = examples.images.to(self.device), self.training.seed
        if self.training.flip:
            images = flipped(images, seed, step, self.process * len(images))
        return self._parts(examples._replace(images=images), seed, step)

    def criterion_parts(self, number: int, count: int) -> list[Batch]:
        """Micro-batches of the ``count`` minibatches of estimate ``number``.

        They are as large as in training: what fits into memory there fits here.
        """
        seed, first = self.training.seed + CRITERION_SEED, number * count
        parts: list[Batch] = []
        for step, examples in enumerate(self.examples(first, first + count, seed), start=first):
            examples = examples._replace(images=examples.images.to(self.device))
            parts += self._parts(examples, seed, step)
        return parts

    def held_out(self, count: int) -> Examples:
        """The first held-out images, at most ``count``, the same on every process."""
        pairs = Pairs(self.data.held_out, self.data.held_out_conditions)
        examples = stacked(pairs[i] for i in range(min(count, len(pairs))))
        return examples._replace(images=examples.images.to(self.device))

    def held_out_batch(self, count: int) -> Batch:
        """They as a denoising batch."""
        return self.inputs.batch(self.held_out(count), self.timesteps, self.training.seed, 0)

    def _parts(self, examples: Examples, seed: int, step: int) -> Iterator[Batch]:
        first = self.process * len(examples.images)
        for part in examples.chunk(self.training.gradient_accumulation):
            yield self.inputs.batch(
                part,
                self.timesteps,
                seed,
                step,
                first,
                self.training.batch,
                dropout=self.training.condition_dropout,
            )
            first += len(part.images)
