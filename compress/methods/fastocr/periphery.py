"""Summaries of the visual tokens outside the fixation: a few per layer and key head.

Our own choice, not the paper's. A fixation of a few per cent cannot follow attention that is spread
over the whole page, but such attention needs no detail: visual tokens with similar keys and values
are replaced by their mean, weighted by their number. With all tokens in the fixation nothing is
left to summarise, and attention is dense.

Shapes: ``keys`` and ``values`` are ``(batch, kv_heads, visual, dim)``, as in the cache.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch.nn.functional import one_hot

from compress.methods.fastocr.fixation import Fixation

ROUNDS = 5  # of Lloyd's algorithm; more change nothing that can be measured


@dataclass(frozen=True)
class Outside:
    """Summaries of the visual tokens that are not in a fixation.

    Parameters
    ----------
    keys, values : means, ``(batch, kv_heads, summaries, dim)`` in float32.
    log_sizes : logarithm of how many tokens each stands for, ``(batch, kv_heads, summaries)``;
        -inf for none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    log_sizes: torch.Tensor

    def read(self) -> torch.Tensor:
        """How many summaries stand for tokens, over all sequences, in the fullest head."""
        return self.log_sizes.isfinite().sum(2).amax(1).sum()

    def joined(
        self, query: torch.Tensor, output: torch.Tensor, lse: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention to the summaries and to some rows, from attention to these rows alone.

        With ``l = logaddexp(lse, logsumexp_s(scaling q.k_s + log n_s))`` over the summaries s of
        n_s tokens it is ``exp(lse - l) output + sum_s exp(scaling q.k_s + log n_s - l) v_s``.

        Parameters
        ----------
        query : ``(batch, heads, 1, dim)``; ``heads`` is a multiple of the summaries' heads.
        output : attention to the rows, ``(batch, heads, 1, dim)``.
        lse : logsumexp of their logits, ``(batch, heads)``.
        scaling : of the dot products.
        """
        batch, kv_heads, summaries, _ = self.keys.shape
        packed = query.reshape(batch, kv_heads, -1, query.shape[3]).float()
        logits = packed @ self.keys.transpose(2, 3) * scaling + self.log_sizes[:, :, None]
        whole = torch.logaddexp(lse, logits.logsumexp(3).view(lse.shape))[..., None, None]
        weights = (logits.view(*lse.shape, 1, summaries) - whole).exp()
        summed = weights.view(logits.shape) @ self.values
        read = output.float() * (lse[..., None, None] - whole).exp()
        return (read + summed.view(read.shape)).to(output.dtype)


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
        share = one_hot(member, summaries).float() * valid[:, None, :, None]
        share = share.transpose(2, 3)
        return cls(member, share @ keys, share @ values, share.sum(3))

    def outside(self, fixation: Fixation, keys: torch.Tensor, values: torch.Tensor) -> Outside:
        """The summaries without the tokens of a fixation.

        Parameters
        ----------
        fixation : which tokens to take out.
        keys, values : of these tokens, ``(batch, kv_heads, kept, dim)``.
        """
        index = fixation.index[:, None].expand(-1, self.member.shape[1], -1)
        groups = one_hot(self.member.gather(2, index), self.sizes.shape[2]).float()
        if fixation.valid is not None:
            groups = groups * fixation.valid[:, None, :, None]
        share = groups.transpose(2, 3)
        left = (self.sizes - share.sum(3)).round()  # whole numbers but for the sums' rounding
        count = left.clamp(min=1)[..., None]
        return Outside(
            (self.keys - share @ keys.float()) / count,
            (self.values - share @ values.float()) / count,
            left.log(),
        )


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
    points = torch.cat([_spread(keys, real), _spread(values, real)], -1)
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
        share = (one_hot(member, groups).float() * real).transpose(2, 3)
        sizes = share.sum(3, keepdim=True)
        centres = torch.where(sizes > 0, share @ points / sizes.clamp(min=1), centres)
    return torch.cdist(points, centres).argmin(-1)


def _spread(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """``x`` over the root mean square distance of its tokens from their mean, head by head."""
    count = real.sum(2, keepdim=True).clamp(min=1)
    centred = x - (x * real).sum(2, keepdim=True) / count
    mean = (centred.square() * real).mean(3, keepdim=True).sum(2, keepdim=True) / count
    return x / mean.sqrt().clamp(min=torch.finfo(x.dtype).tiny)


def _at(points: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """One point of each head, ``(batch, kv_heads, 1, dim)``."""
    return points.gather(2, index[..., None, None].expand(-1, -1, 1, points.shape[3]))
