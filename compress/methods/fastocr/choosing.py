"""Summaries that choose: each layer opens the groups of visual tokens that its own query asks for.

Our own choice, not the paper's. The visual tokens of a layer are put into groups, per key head,
once after the prompt is read. In every step the mean keys of the groups are scored with the layer's
query, the best groups are opened until the budget is spent, and the rest is read as its means,
weighted by their numbers (:mod:`compress.kernels.choice`). So no layer attends to all tokens, none
depends on another one or on the step before, and there is nothing to calibrate.

Of the group that does not fit into the budget, the first tokens in reading order are opened; its
mean stays that of the whole group, and stands for the others.

With signs the tokens are chosen one by one, whatever their groups: what a key has beyond the mean
of its group is kept as one bit for each number, and every step scores all tokens by these
(:mod:`compress.kernels.signs`).

Shapes: ``keys`` and ``values`` are ``(batch, kv_heads, visual, dim)``, as in the cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch

from compress.kernels.signs import pack
from compress.methods.fastocr.fixation import budget, filled
from compress.methods.fastocr.periphery import memberships, spread
from compress.methods.fastocr.visual_tokens import VisualTokens

Grouping = Literal["kmeans", "runs"]
ROUNDS = 10  # of Lloyd's algorithm
BYTE = 256  # groups whose numbers are a byte
VALUES = 0.5  # weight of a value's distance against a key's, each in units of its spread


def group_count(groups: Literal["auto"] | int, tokens: int) -> int:
    """Groups of so many visual tokens; "auto" is the square root of their number, rounded.

    >>> group_count("auto", 4096), group_count("auto", 312), group_count(32, 20)
    (64, 18, 20)
    """
    return min(round(math.sqrt(tokens)) if groups == "auto" else groups, tokens)


def sign_cost(tokens: int, dim: int, groups: int) -> int:
    """Tokens whose keys and values in 16 bits take as many bytes as the signs of so many.

    >>> sign_cost(312, 32, 12), sign_cost(4096, 128, 64)
    (13, 136)
    """
    return math.ceil(tokens * (math.ceil(dim / 8) + (1 if groups <= BYTE else 2)) / (4 * dim))


def runs(tokens: VisualTokens, groups: torch.Tensor) -> torch.Tensor:
    """Tokens that follow each other in reading order as groups of equal size, ``(batch, visual)``.

    Parameters
    ----------
    groups : of each sequence, ``(batch, 1)``.
    """
    counts = tokens.valid.sum(1, keepdim=True).clamp(min=1)
    places = torch.arange(tokens.rows.shape[1], device=groups.device)
    return (places * groups // counts).clamp(max=groups - 1).clamp(min=0)


def kmeans(
    keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor, member: torch.Tensor, groups: int
) -> torch.Tensor:
    """Lloyd's algorithm over keys and values, each in units of its spread, head by head.

    Nothing is random, and a sequence's groups do not depend on others in its batch.

    Parameters
    ----------
    keys, values : see the module, in float32.
    valid : which tokens are not padding, ``(batch, visual)``.
    member : the groups it begins with, ``(batch, kv_heads, visual)``.
    groups : per head, at most; one that is empty stays so.
    """
    real = valid[:, None, :, None].float()
    points = torch.cat([spread(keys, real), VALUES * spread(values, real)], -1)
    for _ in range(ROUNDS):
        share = memberships(member, groups, real)
        sizes = share.sum(3)
        centres = share @ points / sizes.clamp(min=1)[..., None]
        # |p - c|² without |p|², which all groups have in common
        far = centres.square().sum(3) / 2
        near = points @ centres.transpose(2, 3) - far.masked_fill(sizes == 0, torch.inf)[:, :, None]
        member = near.argmax(3)
    return member


@dataclass(frozen=True)
class Index:
    """The groups of one layer's visual tokens, and the tokens group by group.

    Parameters
    ----------
    keys, values : means of the groups, ``(batch, kv_heads, groups, dim)``, in the cache's dtype.
    sizes, first : tokens of each group and where they begin in the order, int32, ``(batch,
        kv_heads, groups)``.
    order : rows of the cache, ``(batch, kv_heads, visual)``, int32.
    read : what a step reads, summed over the sequences: tokens that it opens, groups that have
        tokens, of the head with most, and the bits as the tokens that take as many bytes.
    signs : of the tokens in that order; None where groups are opened.
    """

    keys: torch.Tensor
    values: torch.Tensor
    sizes: torch.Tensor
    first: torch.Tensor
    order: torch.Tensor
    read: torch.Tensor
    signs: "Signs | None"

    @classmethod
    def of(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: VisualTokens,
        counts: torch.Tensor,
        most: int,
        grouping: Grouping,
        opened: int,
        by_signs: bool = False,
    ) -> Self:
        """Group the visual tokens of a layer.

        Parameters
        ----------
        keys, values : see the module.
        tokens : where they are in the cache.
        counts, most : groups of each sequence, ``(batch, 1)``, and the largest number.
        grouping : "runs" of neighbouring tokens, or "kmeans", which begins with them.
        opened : tokens that a step opens, of all sequences.
        by_signs : whether it chooses them by their signs.
        """
        member = runs(tokens, counts)[:, None].expand(keys.shape[:3])
        if grouping == "kmeans":
            member = kmeans(keys.float(), values.float(), tokens.valid, member, most)
        share = memberships(member, most, tokens.valid[:, None, :, None].float())
        sizes = share.sum(3)
        of_keys, of_values = (
            (share @ part.float() / sizes.clamp(min=1)[..., None]).to(part.dtype)
            for part in (keys, values)
        )
        behind = member.masked_fill(~tokens.valid[:, None], most)
        places = behind.argsort(dim=2, stable=True)
        order = tokens.listed[:, None].expand_as(member).gather(2, places)
        signs = Signs.of(keys, of_keys, member, tokens.valid, places) if by_signs else None
        if signs:
            opened += sum(sign_cost(count, keys.shape[3], most) for count in tokens.counts)
        return cls(
            of_keys,
            of_values,
            sizes.int(),
            (sizes.cumsum(2) - sizes).int(),
            order,
            (sizes > 0).sum(2).amax(1).sum() + opened,
            signs,
        )


@dataclass(frozen=True)
class Signs:
    """One bit for each number of the keys of a layer's visual tokens, group by group.

    Parameters
    ----------
    member : group of each token, ``(batch, kv_heads, visual)``, a byte where that is enough.
    codes : whether a key is above the mean of its group, ``(batch, kv_heads, visual, dim / 8)``.
    scales : mean distance from it, ``(batch, kv_heads, dim)``, in the cache's dtype.
    """

    member: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(
        cls,
        keys: torch.Tensor,
        means: torch.Tensor,
        member: torch.Tensor,
        valid: torch.Tensor,
        places: torch.Tensor,
    ) -> Self:
        """Of these keys and the means of their groups.

        Parameters
        ----------
        keys, member : ``(batch, kv_heads, visual, dim)``, and their groups.
        valid : which tokens are not padding, ``(batch, visual)``.
        places : the tokens group by group, ``(batch, kv_heads, visual)``.
        """
        wide = member[..., None].expand_as(keys)
        beyond = keys.float() - means.float().gather(2, wide)
        real = valid[:, None, :, None].float()
        scales = (beyond.abs() * real).sum(2) / real.sum(2).clamp(min=1)
        codes = pack(beyond > 0)
        return cls(
            member.gather(2, places).to(torch.uint8 if means.shape[2] <= BYTE else torch.int16),
            codes.gather(2, places[..., None].expand_as(codes)),
            scales.to(keys.dtype),
        )


class SummaryPolicy:
    """Every layer opens groups of visual tokens by its own query, see the module.

    Parameters
    ----------
    tokens : of the batch.
    keep : fraction of a sequence's visual tokens that a layer opens.
    groups : summaries per key head; "auto" is the square root of the number of visual tokens.
    grouping : how the tokens are grouped.
    by_signs : whether tokens are chosen one by one.

    Attributes
    ----------
    budgets, kept : tokens that a layer opens of each sequence, int32, and the same as numbers.
    valid : which places of a list of opened tokens are filled; None is all.
    watch : called with the number of a layer and the rows that it opens, for figures.
    """

    def __init__(
        self,
        tokens: VisualTokens,
        *,
        keep: float,
        groups: Literal["auto"] | int = "auto",
        grouping: Grouping = "kmeans",
        by_signs: bool = False,
    ) -> None:
        device = tokens.rows.device
        counts = [group_count(groups, count) for count in tokens.counts]
        self.tokens = tokens
        self.grouping = grouping
        self.by_signs = by_signs
        self.most = max(counts)
        self.counts = torch.tensor(counts)[:, None].to(device, non_blocking=True)
        self.kept = tokens.budgets(partial(budget, keep))
        self.budgets = torch.tensor(self.kept, dtype=torch.int32).to(device, non_blocking=True)
        self.valid = filled(self.kept, device)
        self.indexes: dict[int, Index] = {}  # by layer, from its first step
        self.watch: Callable[[int, torch.Tensor], None] | None = None

    @property
    def whole(self) -> bool:
        """Whether the budgets are all tokens, so that there is nothing to choose."""
        return self.kept == self.tokens.counts

    @property
    def settled(self) -> bool:
        """Once the groups are made; never while somebody watches."""
        return bool(self.indexes) and self.watch is None

    def start_step(self) -> None:
        """Nothing is carried from step to step."""

    def index(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Index:
        """The groups of a layer, made from its cache once."""
        if layer not in self.indexes:
            keys, values = (self.tokens.gathered(part) for part in (key, value))
            self.indexes[layer] = Index.of(
                keys,
                values,
                self.tokens,
                self.counts,
                self.most,
                self.grouping,
                sum(self.kept),
                self.by_signs,
            )
        return self.indexes[layer]
