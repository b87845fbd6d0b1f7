"""One page from its visual tokens to those that stay: the selection of :class:`RTPrune`, applied.

What stays is decided on the CPU, for all pages at once: a GPU would have to be waited for at every
step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from compress.common.stages import stage
from compress.methods.rtprune.baselines import cdpruner, divprune, random_tokens, visionzip
from compress.methods.rtprune.ratio import distinctness, keep_fraction
from compress.methods.rtprune.selection import by_norm, drop_adjacent_newlines
from compress.methods.rtprune.transport import (
    merge,
    nearest_plan,
    one_by_one,
    similarity,
    transport_plans,
)
from compress.models.prompt_pruning import Choice

if TYPE_CHECKING:
    from compress.methods.rtprune.method import RTPrune


@dataclass(frozen=True)
class EncodedPage:
    """What is known of a page when the vision encoder has encoded it.

    Parameters
    ----------
    grid : (view, row, column) of its visual tokens, ``(tokens, 3)``; see
        :class:`compress.models.visual.VisualLayout`. On the CPU.
    density : of text, where the ratio is dynamic.
    seed : where tokens are random.
    attention : that its prunable tokens got from the encoder, and their keys there, for VisionZip.
    """

    grid: torch.Tensor
    density: torch.Tensor | None = None
    seed: int = 0
    attention: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class Merged:
    """Where the pruned tokens of a page went; on the model's device, which is not waited for.

    Parameters
    ----------
    target : the kept token that takes most of each, counted among the kept prunable ones,
        ``(pruned,)``.
    mass : how much of it that one takes, at most 1, ``(pruned,)``.
    """

    target: torch.Tensor
    mass: torch.Tensor


# of a page's facts, those that are summed over all pages
COUNTS = ("visual_tokens", "visual_kept", "prunable", "kept", "newlines_dropped")


@dataclass(frozen=True)
class PrunedPage:
    """What is left of a page.

    Parameters
    ----------
    grid : (view, row, column) of all its visual tokens, ``(visual tokens, 3)``.
    kept_indices : which of them stay, newlines and separator among them, ascending, ``(kept,)``.
        Both on the CPU.
    keep_fraction : of the prunable tokens, before rounding.
    density, distinctness : where the ratio is dynamic.
    merged : where the others went; None where they are dropped.
    """

    grid: torch.Tensor
    kept_indices: torch.Tensor
    keep_fraction: float
    density: float | None = None
    distinctness: float | None = None
    merged: Merged | None = None

    def moves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens that are merged away, the token that takes most of each, and how much it takes.

        Indices among all visual tokens, ascending; ``(pruned,)`` each, on the CPU.
        """
        if self.merged is None:
            nothing = torch.empty(0, dtype=torch.long)
            return nothing, nothing, torch.empty(0)
        on_page = self.grid[:, 2] >= 0
        kept = self.kept_indices[on_page[self.kept_indices]]
        on_page[kept] = False
        return on_page.nonzero()[:, 0], kept[self.merged.target.cpu()], self.merged.mass.cpu()

    def facts(self) -> dict[str, Any]:
        """Counts and ratios, for JSON."""
        columns, rows = self.grid[:, 2], self.grid[:, 1]
        newlines = (columns < 0) & (rows >= 0)
        return {
            "visual_tokens": len(self.grid),
            "visual_kept": len(self.kept_indices),
            "prunable": int((columns >= 0).sum()),
            "kept": int((columns[self.kept_indices] >= 0).sum()),
            "newlines_dropped": int(newlines.sum() - newlines[self.kept_indices].sum()),
            "keep_fraction": self.keep_fraction,
            "density": self.density,
            "distinctness": self.distinctness,
        }


def prune_pages(
    method: "RTPrune",
    pages: Sequence[EncodedPage],
    features: Sequence[torch.Tensor],
    instructions: Sequence[torch.Tensor],
    bias: torch.Tensor,
    fetch: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.cpu,
) -> list[tuple[PrunedPage, Choice | None]]:
    """Select what stays of each page, and merge the rest into it.

    Pages of one size are computed together. The device is waited for once: for the order and the
    ratios of all pages, and, where a peer selects, for what it selected.

    Parameters
    ----------
    method : how.
    pages : in any order; none depends on another.
    features : of all visual tokens of each page, ``(visual tokens, dim)``.
    instructions : embeddings of the text that belongs to each page, ``(words, dim)``.
    bias : of the projector that computed the features, ``(dim,)``.
    fetch : a tensor from the device, which is waited for.

    Returns
    -------
    For each page what is left, and the same as a choice for the prompt; None where all stays
    as it is.
    """
    groups = _groups(pages, features)
    plans = _plans(method, pages, groups, fetch)
    if method.select in ("rtprune", "norm"):
        for plan in plans.values():
            if plan.keep < len(plan.on_page):
                plan.kept = np.sort(plan.order[: plan.keep])
    else:
        _select_by_peer(method, pages, groups, plans, instructions, bias)
    if method.select == "rtprune" and method.merge:
        with stage("merge"):
            for group in groups:
                _merge(method, group, plans)
    return [_pruned(page, plans[number]) for number, page in enumerate(pages)]


@dataclass(frozen=True)
class _Group:
    """Pages of one size.

    Parameters
    ----------
    numbers : which pages.
    on_page : their prunable tokens, ``(prunable,)``, on the CPU.
    tokens : features of these, ``(pages, prunable, dim)``.
    """

    numbers: Sequence[int]
    on_page: torch.Tensor
    tokens: torch.Tensor


@dataclass
class _Plan:
    """Of one page: what is known of it, and what becomes of its prunable tokens.

    Parameters
    ----------
    on_page : the prunable tokens, ``(prunable,)``.
    order : which of them, the largest norm first.
    keep, fraction, density, distinctness : how many are to stay, and why.
    kept : those that stay, ascending; None where all do.
    values : what these become, ``(kept, dim)``, where they change.
    merged : where the others went.
    """

    on_page: torch.Tensor
    order: np.ndarray
    keep: int
    fraction: float
    density: float | None = None
    distinctness: float | None = None
    kept: np.ndarray | None = None
    values: torch.Tensor | None = None
    merged: Merged | None = None


def _groups(pages: Sequence[EncodedPage], features: Sequence[torch.Tensor]) -> list[_Group]:
    by_grid: dict[bytes, list[int]] = {}
    for number, page in enumerate(pages):
        by_grid.setdefault(page.grid.numpy().tobytes(), []).append(number)
    groups = []
    for numbers in by_grid.values():
        on_page = (pages[numbers[0]].grid[:, 2] >= 0).nonzero()[:, 0]
        tokens = torch.stack([features[number] for number in numbers])
        there = on_page.to(tokens.device, non_blocking=True)
        groups.append(_Group(numbers, on_page, tokens.index_select(1, there)))
    return groups


def _plans(
    method: "RTPrune",
    pages: Sequence[EncodedPage],
    groups: Sequence[_Group],
    fetch: Callable[[torch.Tensor], torch.Tensor],
) -> dict[int, _Plan]:
    """How many tokens of each page stay; here the device is waited for."""
    measured = [
        _measured(group, [pages[number].density for number in group.numbers]) for group in groups
    ]
    known = fetch(torch.cat([facts.flatten() for facts in measured]))
    plans = {}
    for group, own in zip(groups, known.split([facts.numel() for facts in measured]), strict=True):
        count = len(group.on_page)
        facts = own.view(len(group.numbers), -1)
        ratios = facts[:, count:].view(torch.float32).tolist()
        for number, order, ratio in zip(group.numbers, facts.numpy(), ratios, strict=True):
            fraction, *measures = ratio or [float(method.keep_tokens)]
            keep = min(max(1, int(count * fraction)), count)
            plans[number] = _Plan(group.on_page, order[:count], keep, fraction, *measures)
    return plans


def _measured(group: _Group, densities: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """What the host has to know, ``(pages, facts)`` int32.

    The tokens' order, and, as the bits of float32, where the ratio is dynamic: the fraction to
    keep, density and distinctness.
    """
    facts = [by_norm(group.tokens).int()]
    known = [density for density in densities if density is not None]
    if known:
        density, differ = torch.stack(known).float(), distinctness(group.tokens.float())
        ratios = torch.stack([keep_fraction(density, differ), density, differ], 1)
        facts.append(ratios.view(torch.int32))
    return torch.cat(facts, 1)


def _select_by_peer(
    method: "RTPrune",
    pages: Sequence[EncodedPage],
    groups: Sequence[_Group],
    plans: Mapping[int, _Plan],
    instructions: Sequence[torch.Tensor],
    bias: torch.Tensor,
) -> None:
    """Page by page, as peers are published."""
    selected: dict[int, torch.Tensor] = {}
    for group in groups:
        for number, tokens in zip(group.numbers, group.tokens, strict=True):
            page, plan = pages[number], plans[number]
            if plan.keep == len(plan.on_page):
                continue
            if method.select == "visionzip":
                attention, keys = cast(tuple[torch.Tensor, torch.Tensor], page.attention)
                selected[number], plan.values = visionzip(tokens, plan.keep, attention, keys, bias)
            elif method.select == "divprune":
                selected[number] = divprune(tokens, plan.keep)
            elif method.select == "cdpruner":
                selected[number] = cdpruner(tokens, plan.keep, instructions[number])
            else:
                selected[number] = random_tokens(tokens, plan.keep, page.seed)
    if not selected:
        return
    indices = torch.cat(list(selected.values())).cpu().split([*map(len, selected.values())])
    for number, kept in zip(selected, indices, strict=True):
        plans[number].kept = kept.numpy()


def _merge(method: "RTPrune", group: _Group, plans: Mapping[int, _Plan]) -> None:
    """Give the kept tokens of a group's pages what the others are, and note where these went.

    Pages that keep different numbers are padded with any tokens, which nothing is moved to or from.
    """
    count = len(group.on_page)
    parts = [
        (place, kept, np.delete(np.arange(count), kept))
        for place, number in enumerate(group.numbers)
        if (kept := plans[number].kept) is not None
    ]
    if not parts:
        return
    rows, columns = [len(kept) for _, kept, _ in parts], [len(pruned) for *_, pruned in parts]
    index = np.zeros((len(parts), max(rows) + max(columns)), np.int64)
    for at, (place, kept, pruned) in zip(index, parts, strict=True):
        at[: len(kept)] = kept
        at[max(rows) : max(rows) + len(pruned)] = pruned
        at += place * count
    there = torch.from_numpy(index.ravel()).to(group.tokens.device, non_blocking=True)
    picked = group.tokens.flatten(0, 1).index_select(0, there).unflatten(0, index.shape)
    stay, leave = picked.split([max(rows), max(columns)], 1)
    scores = similarity(stay, leave)
    if method.transport == "optimal":
        moves = transport_plans(scores, rows, columns)
    else:
        moves = one_by_one(nearest_plan, scores, rows, columns)
    values = merge(stay, leave, moves, method.merge)
    masses, targets = moves.max(dim=1)
    for row, (place, kept, pruned) in enumerate(parts):
        plan = plans[group.numbers[place]]
        plan.values = values[row, : len(kept)]
        plan.merged = Merged(targets[row, : len(pruned)], masses[row, : len(pruned)])


def _pruned(page: EncodedPage, plan: _Plan) -> tuple[PrunedPage, Choice | None]:
    everything = torch.arange(len(page.grid))
    measured = plan.fraction, plan.density, plan.distinctness
    if plan.kept is None:
        return PrunedPage(page.grid, everything, *measured), None
    kept = plan.on_page[torch.from_numpy(plan.kept)]
    stays = page.grid[:, 2] < 0
    stays[kept] = True
    newlines = ((page.grid[:, 2] < 0) & (page.grid[:, 1] >= 0)).nonzero()[:, 0]
    indices = drop_adjacent_newlines(everything[stays], newlines)
    pruned = PrunedPage(page.grid, indices, *measured, plan.merged)
    return pruned, Choice(indices, None if plan.values is None else (kept, plan.values))
