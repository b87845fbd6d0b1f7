"""What is known of each page when the vision encoder has read it, whatever batch it was read in."""

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from compress.methods.rtprune.encoder_attention import Heard, token_values
from compress.methods.rtprune.pages import Page
from compress.methods.rtprune.ratio import textual_density
from compress.models.visual import visual_layouts

if TYPE_CHECKING:
    from compress.methods.rtprune.method import RTPrune


def read_pages(
    method: "RTPrune",
    model: Any,
    features: Sequence[torch.Tensor],
    given: Mapping[str, Any],
    heard: Sequence[Heard],
) -> list[Page]:
    """The pages that one call of ``get_image_features`` reads.

    Parameters
    ----------
    method : what it will need to know.
    model : whose encoder it is.
    features : what it made of each page, ``(visual tokens, dim)``.
    given : the arguments of the call.
    heard : from its attention, for VisionZip: of the whole pages, then of the crops if there are.
    """
    counts, grids = given.get("num_local_patches"), given.get("patches_grid")
    crops = [0] * len(features) if counts is None else [int(count) for count in counts]
    cells = [
        _cells(model, given, page, crops[number], (1, 1) if grids is None else grids[number])
        for number, page in enumerate(features)
    ]
    pixels = given["pixel_values"]
    density: Sequence[torch.Tensor | None] = [None] * len(features)
    if method.keep_tokens == "dynamic":
        rows, columns = (cells[0][cells[0][:, 0] == 0, 1:].amax(0) + 1).tolist()
        density = list(textual_density(pixels.float(), (rows, columns)))
    pages = []
    for number, grid in enumerate(cells):
        attention = None
        if method.select == "visionzip":
            first = sum(crops[:number])
            columns = None if grids is None else int(grids[number][0])
            attention = _attention(heard, number, first, crops[number], grid, columns)
        seed = page_seed(method.seed, pixels[number]) if method.select == "random" else 0
        pages.append(Page(grid, density[number], seed, attention))
    return pages


def _cells(
    model: Any, given: Mapping[str, Any], features: torch.Tensor, crops: int, grid: Any
) -> torch.Tensor:
    """(view, row, column) of the tokens of one page, as if it were alone."""
    inputs = {
        "input_ids": torch.full((1, len(features)), model.config.image_token_id),
        "pixel_values": given["pixel_values"],
        "pixel_values_local": given.get("pixel_values_local"),
        "num_local_patches": [crops],
        "patches_grid": [grid],
    }
    return visual_layouts(model, inputs)[0].grid


def _attention(
    heard: Sequence[Heard],
    number: int,
    first: int,
    crops: int,
    grid: torch.Tensor,
    columns: int | None,
) -> Heard:
    """Attention and keys of the prunable tokens of page ``number``, whose crops begin at first."""
    on_page = grid[grid[:, 2] >= 0]
    attention, keys = (
        token_values(
            heard[0][which][number],
            heard[1][which][first : first + crops] if crops else None,
            on_page,
            columns,
        )
        for which in (0, 1)
    )
    return attention, keys


def page_seed(seed: int, pixel_values: torch.Tensor) -> int:
    """A seed for each page, of pixels ``(3, height, width)``: its own whatever batch it is in.

    It has 32 bits, as many as torch's generator looks at.
    """
    return zlib.crc32(pixel_values.detach().cpu().float().numpy().tobytes(), seed)
