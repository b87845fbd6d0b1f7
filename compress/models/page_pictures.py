"""Visual tokens drawn on the page that they look at."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw

from compress.models.visual import ViewOnPage

Colour = tuple[int, int, int]
# Okabe and Ito's green, orange and vermilion
KEPT, MERGED, MOVE = (0, 158, 115), (230, 159, 0), (213, 94, 0)
SHORTEST_PICTURE, LONGEST_PICTURE, GAP = 480, 960, 8  # pixels
NO_PLACES = "visual tokens are queries, which have no place on the page, so none is drawn"


def tokens_on_page(
    image: Image.Image,
    views: Mapping[int, ViewOnPage],
    shades: Sequence[tuple[torch.Tensor, Colour]],
    moves: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
) -> Image.Image:
    """Shade what some visual tokens see of a page, once for each view, side by side.

    Parameters
    ----------
    image : the page.
    views : where they lie on it; the page alone where there are none.
    shades : (view, row, column) of tokens, ``(tokens, 3)``, and their colour; others are passed
        over: newlines, separators, tokens of views without a place.
    moves : from one token to another, ``(3,)`` each: lines with a dot at the end, where one view
        has both.
    """
    page = image.convert("RGB")
    scale = max(1, SHORTEST_PICTURE // max(page.size)) * min(1, LONGEST_PICTURE / max(page.size))
    size = max(1, round(page.width * scale)), max(1, round(page.height * scale))
    page = page.resize(size, Image.Resampling.LANCZOS)
    panels = [
        _shaded(page, number, view, scale, shades, moves) for number, view in sorted(views.items())
    ]
    return beside(panels or [page])


def _shaded(
    page: Image.Image,
    number: int,
    view: ViewOnPage,
    scale: float,
    shades: Sequence[tuple[torch.Tensor, Colour]],
    moves: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> Image.Image:
    """One panel: a page, ``scale`` times as large, with the tokens of one view."""
    layer = Image.new("RGBA", page.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for tokens, colour in shades:
        for of, row, column in tokens.tolist():
            if of == number and column >= 0:
                x0, y0, x1, y1 = (round(edge * scale) for edge in view.cell(row, column))
                if x1 > x0 and y1 > y0:
                    draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=(*colour, 110))
    for ends in moves:
        if all(int(end[0]) == number for end in ends):
            middles = [tuple(c * scale for c in _middle(view, end)) for end in ends]
            draw.line(middles, fill=(*MOVE, 230))
            draw.circle(middles[1], 3, fill=(*MOVE, 230))
    return Image.alpha_composite(page.convert("RGBA"), layer).convert("RGB")


def _middle(view: ViewOnPage, token: torch.Tensor) -> tuple[float, float]:
    """(x, y) of the middle of what a token ``(3,)`` sees, in the page's pixels."""
    x0, y0, x1, y1 = view.cell(int(token[1]), int(token[2]))
    return (x0 + x1) / 2, (y0 + y1) / 2


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Put pictures of one height together, from left to right."""
    width = sum(picture.width + GAP for picture in pictures) - GAP
    strip = Image.new("RGB", (width, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + GAP
    return strip


def on_one_panel(
    image: Image.Image, views: Mapping[int, ViewOnPage], ends: Sequence[torch.Tensor]
) -> bool:
    """Whether one view has both tokens, ``(3,)`` each, neither of them in its padding."""
    view = views.get(int(ends[0][0]))
    if view is None or ends[0][0] != ends[1][0]:
        return False
    middles = [_middle(view, end) for end in ends]
    return all(0 <= x < image.width and 0 <= y < image.height for x, y in middles)


def panels_caption(views: Mapping[int, ViewOnPage], grid: torch.Tensor) -> str:
    """Say which tokens of a page, ``(tokens, 3)``, its picture shows."""
    if len(views) > 1:
        return "left the tokens of the whole page, right those of its crops"
    if set(grid[:, 0].tolist()) - set(views):
        return "tokens of the whole page only: those of its crops are not drawn"
    return "on the first page"
