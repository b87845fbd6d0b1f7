"""How many tokens of a page to keep, from its density of text and the distinctness of its tokens.

Wan et al., "RTPrune: Reading-Twice Inspired Token Pruning for Efficient DeepSeek-OCR Inference"
(ICML 2026, arXiv 2605.00392), the dynamic ratio.
"""

import torch
import torch.nn.functional as F

from compress.methods.rtprune.selection import check_features

LUMA = (0.299, 0.587, 0.114)
SOBEL = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
EDGE = 0.2  # least gradient magnitude of an edge, in units of normalised pixels


def textual_density(pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Share of a page's pixels that lie on an edge, mean over its patches.

    Every patch is filtered separately with zeros around it, so that the border pixels of a white
    patch count as edges: this is part of the definition.

    Parameters
    ----------
    pixel_values : pages normalised to [-1, 1], ``(batch, 3, height, width)``.
    grid : (rows, columns) of patches; pixels that are left over at the right and at the bottom
        belong to none.

    Returns
    -------
    Densities in [0, 1], ``(batch,)``; larger for more text. Their dtype is that of the pixels.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(
            f"pages of shape (batch, 3, height, width) are expected; got "
            f"{tuple(pixel_values.shape)}; add the missing dimension"
        )
    # Plain torch is enough: for a page of 1280x1280 pixels and 20x20 tokens this takes 0.23 s on
    # one thread of a 2-core CPU, where the two matrix products in the MLP of one of SAM's 12 blocks
    # take 0.72 s: 2.7% of these alone, without SAM's attention, CLIP and the prefill.
    rows, columns = grid
    if min(grid) < 1:
        raise ValueError(
            f"a grid of at least one row and one column is expected; got {rows}x{columns}; give "
            "the grid of the tokens"
        )
    height, width = pixel_values.shape[2] // rows, pixel_values.shape[3] // columns
    if not height or not width:
        raise ValueError(
            f"every patch needs a pixel; got a grid of {rows}x{columns} patches for pages of "
            f"{pixel_values.shape[2]}x{pixel_values.shape[3]} pixels; give the grid of the tokens"
        )
    pixels = pixel_values.float()
    luma = torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor(LUMA))
    luma = luma[:, : rows * height, : columns * width]
    patches = luma.unflatten(2, (columns, width)).unflatten(1, (rows, height)).transpose(2, 3)
    across = pixels.new_tensor(SOBEL)
    filters = torch.stack([across, across.t()])[:, None]
    gradient = F.conv2d(patches.reshape(-1, 1, height, width), filters, padding=1)
    edges = (gradient.norm(dim=1) > EDGE).float()
    return edges.reshape(len(pixels), -1).mean(1).to(pixel_values.dtype)


def distinctness(features: torch.Tensor) -> torch.Tensor:
    """How different a page's tokens are: 1 - mean over pairs of cos^2.

    ``1 - mean_i [sum_{j != i} cos(x_i, x_j)^2 / (N - 1)]``

    Parameters
    ----------
    features : of the prunable tokens, ``(..., tokens, dim)``.

    Returns
    -------
    In [0, 1], ``(...)``: 0 when all are parallel, 1 when all are orthogonal or there is only one.
    The dtype is that of the features.
    """
    check_features(features)
    count = features.shape[-2]
    if count < 2:
        return features.new_ones(features.shape[:-2])
    directions = F.normalize(features.float(), dim=-1)
    squares = (directions @ directions.transpose(-1, -2)).square()
    others = squares.sum((-1, -2)) - squares.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (1 - others / (count * (count - 1))).to(features.dtype)


def keep_fraction(density: torch.Tensor, distinctness: torch.Tensor) -> torch.Tensor:
    """Fraction of the tokens to keep, ``d + s - d s``, of density ``d`` and distinctness ``s``.

    Parameters
    ----------
    density, distinctness : of each page, in [0, 1], ``(batch,)``; more of either keeps more.
    """
    d, s = density.float(), distinctness.float()
    return (d + s - d * s).to(density.dtype)
