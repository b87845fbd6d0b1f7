"""The figures of a pruned page, and the section of a report that they stand in."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from compress.common.files import image_png
from compress.common.plots import COMPRESSED, Plot, canvas, styled
from compress.methods.base import Figure, Section, Shown
from compress.methods.rtprune.pages import PrunedPage
from compress.models.page_pictures import (
    KEPT,
    MERGED,
    NO_PLACES,
    on_one_panel,
    panels_caption,
    tokens_on_page,
)
from compress.models.reading import read_pages
from compress.models.visual import ViewOnPage, views_on_page

if TYPE_CHECKING:
    from compress.methods.rtprune.method import RTPrune

LINES = 40  # moves that are drawn


def sections(method: "RTPrune", shown: Shown) -> list[Section]:
    """What stays of the page, and the ratio of every page where it is dynamic."""
    figures = [kept_tokens(method, shown)]
    pages = [page for batch in shown.facts for page in batch["pages"]]
    if dynamic := [page for page in pages if page["density"] is not None]:
        plot = ratio_plot(dynamic)
        figures.append(Figure("ratio", plot, "Ratio of each page against its textual density"))
    return [Section("What rtprune did", figures=figures)]


def kept_tokens(method: "RTPrune", shown: Shown) -> Figure:
    """The page with the tokens that stay of it."""
    with method.attach(shown.model) as handle:
        read_pages(shown.model, shown.processor, [shown.image], shown.prompt, max_new_tokens=1)
        [kept] = handle.pages  # type: ignore[attr-defined]
    views = views_on_page(shown.model, shown.processor, shown.image, kept.grid)
    return pruned_page(shown.image, views, kept)


def pruned_page(image: Image.Image, views: Mapping[int, ViewOnPage], page: PrunedPage) -> Figure:
    """What a pruned page keeps and merges, drawn over it."""
    kept, facts = page.grid[page.kept_indices], page.facts()
    count = f"{facts['kept']} of {facts['prunable']} visual tokens stay"
    if not views:
        picture = tokens_on_page(image, views, [])
        return Figure("kept", image_png(picture), f"{count}, on the first page; {NO_PLACES}")
    gone, targets, mass = page.moves()
    moves: list[tuple[torch.Tensor, torch.Tensor]] = []
    for place in mass.argsort(descending=True, stable=True):
        ends = page.grid[gone[place]], page.grid[targets[place]]
        if len(moves) < LINES and on_one_panel(image, views, ends):
            moves.append(ends)
    rest = "the others are dropped"
    if len(gone):
        rest = (
            f"the others (orange) are merged into them: a line leads from each of the {len(moves)} "
            "that give most to a single kept token to that token"
        )
    picture = tokens_on_page(image, views, [(kept, KEPT), (page.grid[gone], MERGED)], moves)
    where = panels_caption(views, page.grid)
    return Figure("kept", image_png(picture), f"{count} (green), {rest}; {where}")


@styled
def ratio_plot(pages: Sequence[Mapping[str, Any]]) -> Plot:
    """The share of tokens kept of each page, against its density."""
    figure = canvas(6, 4)
    axes = figure.subplots()
    kept = [page["kept"] / page["prunable"] for page in pages]
    axes.plot([page["density"] for page in pages], kept, "o", color=COMPRESSED)
    axes.set(title="Tokens kept, page by page", xlabel="textual density", ylabel="share kept")
    return figure
