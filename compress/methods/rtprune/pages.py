"""One page from its visual tokens to those that stay: the selection of :class:`RTPrune`, applied.

The indices are computed on the CPU: a GPU would have to be waited for at every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from compress.common.stages import stage
from compress.methods.rtprune.baselines import cdpruner, divprune, random_tokens, visionzip
from compress.methods.rtprune.ratio import distinctness, keep_fraction
from compress.methods.rtprune.selection import drop_adjacent_newlines, left_over, select
from compress.methods.rtprune.transport import merge, nearest_plan, similarity, transport_plans

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


class Handle:
    """What was pruned since the start or the last :meth:`reset`.

    Attributes
    ----------
    pages : one for each page of each prompt, in their order.
    """

    def __init__(self) -> None:
        self.pages: list[PrunedPage] = []

    def facts(self) -> dict[str, Any]:
        """Counts and ratios of each page, and the counts of all together, for JSON."""
        pages = [page.facts() for page in self.pages]
        counts = ("visual_tokens", "visual_kept", "prunable", "kept", "newlines_dropped")
        total = {name: sum(page[name] for page in pages) for name in counts}
        return {"pages": pages, "total": total}

    def reset(self) -> None:
        """Forget the pages."""
        self.pages.clear()


def prune_pages(
    method: "RTPrune",
    pages: Sequence[EncodedPage],
    features: Sequence[torch.Tensor],
    instructions: Sequence[torch.Tensor],
    bias: torch.Tensor,
) -> list[tuple[PrunedPage, torch.Tensor | None]]:
    """Select what stays of each page, and merge the rest into it.

    Parameters
    ----------
    method : how.
    pages : in any order; none depends on another.
    features : of all visual tokens of each page, ``(visual tokens, dim)``.
    instructions : embeddings of the text that belongs to each page, ``(words, dim)``.
    bias : of the projector that computed the features, ``(dim,)``.

    Returns
    -------
    For each page what is left and the features of that, ``(kept, dim)``; None where all stays as it
    is.
    """
    plans = [_plan(method, page, f) for page, f in zip(pages, features, strict=True)]
    choices = [
        None if plan.keep == plan.count else _choose(method, plan, page, f, words, bias)
        for plan, page, f, words in zip(plans, pages, features, instructions, strict=True)
    ]
    merged: list[Merged | None] = [None] * len(plans)
    if method.select == "rtprune" and method.merge:
        with stage("merge"):
            choices, merged = _merged(method, plans, features, choices)
    return [
        _pruned(plan, page, f, choice, into)
        for plan, page, f, choice, into in zip(plans, pages, features, choices, merged, strict=True)
    ]


@dataclass(frozen=True)
class _Plan:
    """Of one page: its prunable tokens ``(prunable,)``, and how many to keep of them."""

    on_page: torch.Tensor
    keep: int
    fraction: float
    density: float | None
    distinctness: float | None

    @property
    def count(self) -> int:
        return len(self.on_page)


Choice = tuple[torch.Tensor, torch.Tensor]  # indices among the prunable tokens, features there


def _plan(method: "RTPrune", page: EncodedPage, features: torch.Tensor) -> _Plan:
    on_page = (page.grid[:, 2] >= 0).nonzero()[:, 0]
    measured: list[float | None] = [None, None]
    if page.density is None:
        fraction = float(method.keep_tokens)
    else:
        s = distinctness(features[on_page].float())
        ratio = torch.stack([keep_fraction(page.density, s), page.density, s]).tolist()
        fraction, *measured = ratio
    keep = min(max(1, int(len(on_page) * fraction)), len(on_page))
    return _Plan(on_page, keep, fraction, *measured)


def _choose(
    method: "RTPrune",
    plan: _Plan,
    page: EncodedPage,
    features: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor,
) -> Choice:
    prunable = features[plan.on_page]
    if method.select == "visionzip":
        attention, keys = cast(tuple[torch.Tensor, torch.Tensor], page.attention)
        indices, values = visionzip(prunable, plan.keep, attention, keys, bias)
        return indices.cpu(), values
    if method.select == "divprune":
        indices = divprune(prunable, plan.keep)
    elif method.select == "cdpruner":
        indices = cdpruner(prunable, plan.keep, words)
    elif method.select == "random":
        indices = random_tokens(prunable, plan.keep, page.seed)
    else:
        indices = select(prunable, plan.keep)
    return indices.cpu(), prunable[indices]


def _merged(
    method: "RTPrune",
    plans: Sequence[_Plan],
    features: Sequence[torch.Tensor],
    choices: Sequence[Choice | None],
) -> tuple[list[Choice | None], list[Merged | None]]:
    """The choices with features that the other tokens are merged into, and where these went."""
    results = list(choices)
    merged: list[Merged | None] = [None] * len(results)
    pruned_pages = {number: choice for number, choice in enumerate(choices) if choice is not None}
    if not pruned_pages:
        return results, merged
    left = [
        features[n][plans[n].on_page[left_over(indices, plans[n].count)]]
        for n, (indices, _) in pruned_pages.items()
    ]
    scores = [
        similarity(kept, pruned)
        for (_, kept), pruned in zip(pruned_pages.values(), left, strict=True)
    ]
    if method.transport == "optimal":
        moves = transport_plans(scores)
    else:
        moves = [nearest_plan(page) for page in scores]
    for (number, (indices, kept)), pruned, move in zip(
        pruned_pages.items(), left, moves, strict=True
    ):
        results[number] = indices, merge(kept, pruned, move, method.merge)
        mass, target = move.max(dim=0)
        merged[number] = Merged(target, mass)
    return results, merged


def _pruned(
    plan: _Plan,
    page: EncodedPage,
    features: torch.Tensor,
    choice: Choice | None,
    merged: Merged | None,
) -> tuple[PrunedPage, torch.Tensor | None]:
    everything = torch.arange(len(page.grid))
    measured = plan.fraction, plan.density, plan.distinctness
    if choice is None:
        return PrunedPage(page.grid, everything, *measured), None
    kept, values = choice
    stays = torch.ones(len(page.grid), dtype=torch.bool)
    stays[plan.on_page] = False
    stays[plan.on_page[kept]] = True
    newlines = ((page.grid[:, 2] < 0) & (page.grid[:, 1] >= 0)).nonzero()[:, 0]
    indices = drop_adjacent_newlines(everything[stays], newlines)
    features = features.clone()
    features[plan.on_page[kept]] = values
    return PrunedPage(page.grid, indices, *measured, merged), features[indices]
