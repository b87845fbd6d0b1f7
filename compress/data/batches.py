"""Batches, noise and timesteps as functions of (seed, step, sample): no data state to resume."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

# what tells apart the draws of one (seed, step, sample)
FLIP = 1


class Examples(NamedTuple):
    """Images ``(batch, channels, height, width)`` and what the data says about each of them."""

    images: torch.Tensor
    conditions: Sequence[Any] | None = None

    def chunk(self, count: int) -> list["Examples"]:
        """Cut into at most ``count`` parts of equal size, but for the last."""
        parts, start = [], 0
        for images in self.images.chunk(count):
            stop = start + len(images)
            of_batch = None if self.conditions is None else self.conditions[start:stop]
            parts.append(Examples(images, of_batch))
            start = stop
        return parts

    def to(self, device: torch.device | str | None) -> "Examples":
        """The same on a device: pinned images are copied while the host goes on."""
        images = self.images.to(device, non_blocking=self.images.is_pinned())
        return self._replace(images=images)


class Batch(NamedTuple):
    """One denoising batch.

    Images (clean samples: pixels or latents) and noise are ``(batch, channels, height, width)``,
    timesteps ``(batch,)``; ``condition`` holds further inputs of the UNet by name.
    """

    images: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    condition: Mapping[str, Any] = MappingProxyType({})


def _generator(*numbers: int) -> torch.Generator:
    """A generator seeded by a mix of the numbers (a 64-bit multiplicative hash)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)


def noise_and_timesteps(
    images: torch.Tensor,
    timesteps: int,
    seed: int,
    step: int,
    first: int = 0,
    total: int | None = None,
) -> Batch:
    """Draw noise and stratified timesteps for a batch, sample by sample.

    Sample ``i`` of the global batch gets noise and a timestep that depend on (seed, step, ``i``)
    and the size of the global batch only, so the number of processes that share the batch does
    not matter. Timesteps are stratified: sample ``i`` of ``n`` is drawn from the ``i``-th of
    ``n`` equal slices of [0, timesteps).

    Parameters
    ----------
    images : ``(batch, channels, height, width)``.
    timesteps : length of the noise schedule.
    seed, step : what the draw is a function of.
    first : the global index of the first image of this shard.
    total : images in the global batch; all are here when not given.
    """
    total = len(images) if total is None else total
    noise, times = [], []
    for i in range(len(images)):
        generator = _generator(seed, step, first + i)
        noise.append(torch.randn(images.shape[1:], generator=generator))
        share = (first + i + torch.rand((), generator=generator).item()) / total
        times.append(min(int(share * timesteps), timesteps - 1))
    return Batch(
        images,
        torch.stack(noise).to(images),
        torch.tensor(times, dtype=torch.long, device=images.device),
    )


def flipped(images: torch.Tensor, seed: int, step: int, first: int = 0) -> torch.Tensor:
    """Mirror half of the images from left to right, each by chance.

    Parameters
    ----------
    images : ``(batch, channels, height, width)``.
    seed, step, first : as in :func:`noise_and_timesteps`; the draw is another one.
    """
    chosen = by_chance(len(images), 0.5, seed, step, first, FLIP)
    mirror = torch.tensor(chosen, device=images.device)[:, None, None, None]
    return torch.where(mirror, images.flip(-1), images)


def by_chance(
    count: int, share: float, seed: int, step: int, first: int, purpose: int
) -> list[bool]:
    """For each of ``count`` samples, whether it is among a random ``share``.

    Parameters
    ----------
    seed, step, first : as in :func:`noise_and_timesteps`.
    purpose : draws for different purposes are different ones.
    """
    return [
        bool(torch.rand((), generator=_generator(seed, step, first + i, purpose)) < share)
        for i in range(count)
    ]


def noise_of(like: torch.Tensor, seed: int, step: int, first: int, purpose: int) -> torch.Tensor:
    """Standard normal values shaped like ``(batch, ...)``, drawn as in :func:`by_chance`."""
    drawn = [
        torch.randn(like.shape[1:], generator=_generator(seed, step, first + i, purpose))
        for i in range(len(like))
    ]
    return torch.stack(drawn).to(like)


class StepSampler(Sampler[list[int]]):
    """Yields, for each optimiser step in [start, stop), the indices of that step's global batch.

    An epoch is a permutation seeded by (seed, epoch); the batch of a step is a function of
    (seed, step) alone, so a resumed run sees exactly the batches that it has not seen yet.

    Parameters
    ----------
    count : images in the data set.
    batch : images per global batch.
    seed : of the permutations.
    start, stop : the range of steps.
    part, parts : this process and how many share each batch; a process gets its contiguous share.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        seed: int,
        start: int,
        stop: int,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        if count < 1 or batch < 1:
            raise ValueError(
                f"a batch needs images: got count={count}, batch={batch}; both must be at least 1"
            )
        if batch % parts:
            raise ValueError(
                f"the batch must divide by the number of processes; got batch={batch} and "
                f"{parts} processes; change one of them"
            )
        self.count, self.batch, self.seed, self.start, self.stop = count, batch, seed, start, stop
        self.first, self.size = part * (batch // parts), batch // parts

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.stop):
            indices = []
            begin = step * self.batch + self.first
            for position in range(begin, begin + self.size):
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = torch.randperm(self.count, generator=_generator(self.seed, epoch))
                indices.append(int(order[position % self.count]))
            yield indices
