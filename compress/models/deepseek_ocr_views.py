"""What DeepSeek-OCR sees of a page: resolution modes, the whole page, crops, visual tokens.

Definition: ``infer`` and ``dynamic_preprocess`` in ``modeling_deepseekocr.py`` of the checkpoint
`deepseek-ai/DeepSeek-OCR` (Wei et al., "DeepSeek-OCR: Contexts Optical Compression",
arXiv 2510.18234), written anew from what they do; tests/golden/deepseek_ocr_preprocessing.json
holds what they give.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field

from compress.data.pixels import check_image, upright

GREY = (127, 127, 127)  # the padding: int(0.5 * 255), which normalisation takes to -0.004
STRETCHED_UP_TO = 640  # views of modes without crops up to this side do not keep the proportions
LARGEST_VIEW = 4096  # pixels a side, three times that of the largest mode
NEWLINE = SEPARATOR = -1  # column of a newline token; row and column of the separator
# (columns, rows) of 2 to 9 crops, few crops first
GRIDS = tuple(
    sorted(
        ((c, r) for c in range(1, 10) for r in range(1, 10) if 2 <= c * r <= 9),
        key=lambda grid: grid[0] * grid[1],
    )
)


@dataclass(frozen=True)
class Mode:
    """A resolution mode.

    Parameters
    ----------
    side : pixels a side of the view of the whole page; larger costs more tokens.
    crop : pixels a side of a crop; 0 for no crops.
    """

    side: Annotated[int, Field(gt=0, le=LARGEST_VIEW)]
    crop: Annotated[int, Field(ge=0, le=LARGEST_VIEW)] = 0

    @property
    def stretched(self) -> bool:
        """Whether the view of the whole page is stretched to the square, rather than padded."""
        return not self.crop and self.side <= STRETCHED_UP_TO


MODES = {
    "tiny": Mode(512),
    "small": Mode(640),
    "base": Mode(1024),
    "large": Mode(1280),
    "gundam": Mode(1024, 640),
}


@dataclass(frozen=True)
class Views:
    """One page as the model gets it, normalised to [-1, 1].

    Parameters
    ----------
    whole : the page padded to a square, ``(3, side, side)``.
    crops : row by row, ``(columns * rows, 3, crop, crop)``; None when the page is not cropped.
    grid : (columns, rows) of the crops, (1, 1) without.
    """

    whole: torch.Tensor
    crops: torch.Tensor | None
    grid: tuple[int, int]


def crop_grid(width: int, height: int, crop: int) -> tuple[int, int]:
    """(columns, rows) of the crops of a page of that many pixels; (1, 1) when it fits into one.

    The grid whose proportions are closest to the page's; of equally close ones the one with the
    most crops of which the page has more than half the pixels.
    """
    if max(width, height) <= crop:
        return 1, 1
    best, closest = (1, 1), math.inf
    for columns, rows in GRIDS:
        distance = abs(width / height - columns / rows)
        filled = width * height > 0.5 * crop * crop * columns * rows
        if distance < closest or (distance == closest and filled):
            best, closest = (columns, rows), distance
    return best


def page_views(image: Image.Image, mode: Mode) -> Views:
    """The views of one page."""
    check_image(image)
    image = upright(image)
    if mode.stretched:
        return Views(_normalised(image.resize((mode.side, mode.side))), None, (1, 1))
    whole = _normalised(ImageOps.pad(image, (mode.side, mode.side), color=GREY))
    if not mode.crop or (grid := crop_grid(*image.size, mode.crop)) == (1, 1):
        return Views(whole, None, (1, 1))
    columns, rows = grid
    mosaic = _normalised(image.resize((columns * mode.crop, rows * mode.crop)))
    crops = mosaic.unflatten(1, (rows, mode.crop)).unflatten(3, (columns, mode.crop))
    return Views(whole, crops.permute(1, 3, 0, 2, 4).flatten(0, 1).contiguous(), grid)


def padded_box(width: int, height: int) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) of the square to which a page is padded, in the page's own pixels."""
    side = max(width, height)
    left, top = (side - width) / 2, (side - height) / 2
    return -left, -top, side - left, side - top


def _normalised(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32).div(255).sub(0.5).div(0.5)


def view_tokens(view: int, rows: int, columns: int, newline: bool) -> torch.Tensor:
    """(view, row, column) of the tokens of a view, row by row, ``(tokens, 3)``.

    With ``newline``, every row ends in a token of column -1.
    """
    width = columns + newline
    tokens = np.empty((rows, width, 3), np.int64)
    tokens[..., 0] = view
    tokens[..., 1] = np.arange(rows)[:, None]
    tokens[..., 2] = np.arange(width)
    if newline:
        tokens[:, -1, 2] = NEWLINE
    return torch.from_numpy(tokens.reshape(-1, 3))


def page_tokens(side: int, crop: int, grid: tuple[int, int]) -> torch.Tensor:
    """(view, row, column) of all visual tokens of a page in their order, ``(tokens, 3)``.

    First the crops as one mosaic (view 1), then the whole page (view 0), each row followed by a
    newline, then one separator (row and column -1).

    Parameters
    ----------
    side : tokens a side of the whole page.
    crop : tokens a side of a crop.
    grid : (columns, rows) of the crops, (1, 1) without.
    """
    columns, rows = grid
    parts = [view_tokens(0, side, side, True), torch.tensor([[0, SEPARATOR, SEPARATOR]])]
    if grid != (1, 1):
        parts.insert(0, view_tokens(1, rows * crop, columns * crop, True))
    return torch.cat(parts)
