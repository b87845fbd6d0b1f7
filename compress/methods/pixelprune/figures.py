"""The page of a report with what is dropped of it greyed."""

from typing import TYPE_CHECKING

from compress.common.files import image_png
from compress.methods.base import Figure, Section, Shown
from compress.models.page_pictures import tokens_on_page
from compress.models.reading import read_pages
from compress.models.visual import views_on_page

if TYPE_CHECKING:
    from compress.methods.pixelprune.method import PixelPrune

DROPPED = (90, 90, 90)


def sections(method: "PixelPrune", shown: Shown) -> list[Section]:
    """What stays of the first page, and the range of it over all pages."""
    with method.attach(shown.model) as handle:
        read_pages(shown.model, shown.processor, [shown.image], shown.prompt, max_new_tokens=1)
        [page] = handle.pages  # type: ignore[attr-defined]
    views = views_on_page(shown.model, shown.processor, shown.image, page.grid)
    picture = tokens_on_page(shown.image, views, [(page.dropped, DROPPED)])
    facts = page.facts()
    caption = f"{facts['kept']} of {facts['units']} units stay of the first page, the others grey"
    shares = [page["share"] for batch in shown.facts for page in batch["pages"]]
    notes = []
    if shares:
        notes.append(
            f"Of the {len(shares)} pages {min(shares):.1%} to {max(shares):.1%} of the units stay, "
            f"{sum(shares) / len(shares):.1%} on average."
        )
    figure = Figure("kept", image_png(picture), caption)
    return [Section("What pixelprune did", notes, [figure])]
