"""Summaries of the visual tokens outside the fixation: a few per layer and key head.

Our own choice, not the paper's. A fixation of a few per cent cannot follow attention that is spread
over the whole page, but such attention needs no detail: visual tokens with similar keys and values
are replaced by their mean, weighted by their number. With all tokens in the fixation nothing is
left to summarise, and attention is dense. In a step the tokens of the fixation are taken out of
their groups (:mod:`compress.kernels.summaries`).

Shapes: ``keys`` and ``values`` are ``(batch, kv_heads, visual, dim)``, as in the cache.
"""

from dataclasses import dataclass
from typing import Self

import torch

ROUNDS = 5  # of Lloyd's algorithm; more change nothing that can be measured


@dataclass(frozen=True)
class Periphery:
    """The visual tokens of one layer in groups of similar ones.

    Parameters
    ----------
    member : group of each token, ``(batch, kv_heads, visual)``.
    keys, values : sums over the groups, ``(batch, kv_heads, summaries, dim)`` in float32.
    sizes : tokens of each group, ``(batch, kv_heads, summaries)``.
    """

    member: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    sizes: torch.Tensor

    @classmethod
    def of(
        cls, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor, summaries: int
    ) -> Self:
        """Group the visual tokens of a layer.

        Parameters
        ----------
        keys, values : see the module.
        valid : which tokens are not padding, ``(batch, visual)``.
        summaries : groups of each key head.
        """
        keys, values = keys.float(), values.float()
        member = cluster(keys, values, valid, summaries)
        share = memberships(member, summaries, valid[:, None, :, None])
        return cls(member, share @ keys, share @ values, share.sum(3))


def cluster(
    keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor, groups: int
) -> torch.Tensor:
    """K-means over keys and values, each in units of its spread, head by head.

    It begins with the token nearest to the mean, then adds the one farthest from those that are
    chosen: nothing is random, and a sequence's groups do not depend on others in its batch.

    Parameters
    ----------
    keys, values : see the module, in float32.
    valid : which tokens are not padding, ``(batch, visual)``.
    groups : per head; some are empty where tokens are fewer, or copies of each other.

    Returns
    -------
    Group of each token, ``(batch, kv_heads, visual)``; of padding any.
    """
    real = valid[:, None, :, None].float()
    points = torch.cat([spread(keys, real), spread(values, real)], -1)
    centre = (points * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
    padding = ~valid[:, None].expand(points.shape[:3])
    far = (points - centre).square().sum(-1).masked_fill(padding, torch.inf)
    chosen = [_at(points, far.argmin(-1))]
    nearest = torch.full_like(far, torch.inf)
    for _ in range(groups - 1):
        far = (points - chosen[-1]).square().sum(-1)
        nearest = torch.minimum(nearest, far).masked_fill(padding, -torch.inf)
        chosen.append(_at(points, nearest.argmax(-1)))
    centres = torch.cat(chosen, 2)
    for _ in range(ROUNDS):
        member = torch.cdist(points, centres).argmin(-1)
        share = memberships(member, groups, real)
        sizes = share.sum(3, keepdim=True)
        centres = torch.where(sizes > 0, share @ points / sizes.clamp(min=1), centres)
    return torch.cdist(points, centres).argmin(-1)


def memberships(member: torch.Tensor, groups: int, real: torch.Tensor) -> torch.Tensor:
    """1 where a token is in a group, ``(batch, kv_heads, groups, visual)``; 0 for padding.

    torch's ``one_hot`` waits for the device to look whether there are more groups.
    """
    inside = member[:, :, None] == torch.arange(groups, device=member.device)[:, None]
    return inside * real.transpose(2, 3).float()


def spread(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """``x`` less its tokens' mean, over their root mean square distance from it, head by head."""
    count = real.sum(2, keepdim=True).clamp(min=1)
    centred = x - (x * real).sum(2, keepdim=True) / count
    mean = (centred.square() * real).mean(3, keepdim=True).sum(2, keepdim=True) / count
    return centred / mean.sqrt().clamp(min=torch.finfo(x.dtype).tiny)


def _at(points: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """One point of each head, ``(batch, kv_heads, 1, dim)``."""
    return points.gather(2, index[..., None, None].expand(-1, -1, 1, points.shape[3]))
