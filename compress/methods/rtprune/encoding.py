"""What is known of each page when the vision encoder has encoded it, whatever its batch."""

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from compress.methods.rtprune.encoder_attention import Captured, token_values
from compress.methods.rtprune.pages import EncodedPage
from compress.methods.rtprune.ratio import textual_density
from compress.models.visual import adapter_for, crop_counts

if TYPE_CHECKING:
    from compress.methods.rtprune.method import RTPrune


def encoded_pages(
    method: "RTPrune",
    model: Any,
    features: Sequence[torch.Tensor],
    inputs: Mapping[str, Any],
    captured: Sequence[Captured],
) -> list[EncodedPage]:
    """The pages that one call of ``get_image_features`` encodes.

    Parameters
    ----------
    method : decides what will be needed.
    model : whose encoder it is.
    features : of each page, ``(visual tokens, dim)``.
    inputs : the arguments of the call.
    captured : from the encoder's attention, for VisionZip: of the whole pages, then of the crops if
        there are any.
    """
    crops, grids = crop_counts(inputs), inputs.get("patches_grid")
    runs = [len(page) for page in features]
    cells = adapter_for(model.config).cells(model.config, inputs, runs) or []
    pixels = inputs["pixel_values"]
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
            attention = _attention(captured, number, first, crops[number], grid, columns)
        seed = page_seed(method.seed, pixels[number]) if method.select == "random" else 0
        pages.append(EncodedPage(grid, density[number], seed, attention))
    return pages


def _attention(
    captured: Sequence[Captured],
    number: int,
    first: int,
    crops: int,
    grid: torch.Tensor,
    columns: int | None,
) -> Captured:
    """Attention and keys of the prunable tokens of page ``number``, whose crops begin at first."""
    on_page = grid[grid[:, 2] >= 0]
    attention, keys = (
        token_values(
            captured[0][which][number],
            captured[1][which][first : first + crops] if crops else None,
            on_page,
            columns,
        )
        for which in (0, 1)
    )
    return attention, keys


def page_seed(seed: int, pixel_values: torch.Tensor) -> int:
    """A seed for one page, of pixels ``(3, height, width)``: the same in every batch.

    It has 32 bits, as many as torch's generator uses.
    """
    return zlib.crc32(pixel_values.detach().cpu().float().numpy().tobytes(), seed)
