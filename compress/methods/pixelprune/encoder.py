"""Vision encoders that are given a part of the patches of an image.

The encoders of transformers compute from the size of an image where its patches are and which of
them see each other, unless they are given it. They are given it for the units that stay.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

# of an encoder, the (frames, rows, columns) of patches of images, ``(images, 3)``, and the units
# that stay, ``(units,)`` bool, on the CPU
Arguments = Callable[[Any, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


def unit_pixels(
    pixel_values: torch.Tensor, config: Any, std: Sequence[float] | None
) -> torch.Tensor:
    """The pixels of each unit, of which the two equal frames of a still image count once.

    Parameters
    ----------
    pixel_values : of the patches, those of a unit behind each other, ``(patches, values)``.
    config : of the vision encoder.
    std : of the processor's normalisation, by channel, which is undone but for the mean: it takes
        no part in differences. None leaves it, where units are compared for equality.

    Returns
    -------
    ``(units, values)``.
    """
    channels, frames, patch = config.in_channels, config.temporal_patch_size, config.patch_size
    patches = pixel_values.reshape(-1, config.spatial_merge_size**2, channels, frames, patch**2)
    pixels = patches[:, :, :, 0]
    if std is not None:
        pixels = pixels.float() * torch.tensor(std, device=pixels.device)[:, None]
    return pixels.flatten(1)


def encoder_arguments(
    family: str, encoder: Any, grid_thw: torch.Tensor, kept: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What ``get_image_features`` is called with besides the patches that stay.

    Parameters
    ----------
    family : one of :data:`FAMILIES`.
    encoder : of the model.
    grid_thw : (frames, rows, columns) of patches of each image, ``(images, 3)``.
    kept : which units stay, ``(units,)`` bool.
    """
    device, grid, kept = grid_thw.device, grid_thw.cpu(), kept.cpu()
    merge = encoder.spatial_merge_size
    patches = kept.repeat_interleave(merge**2)
    images = [int(image.sum()) for image in kept.split((grid.prod(1) // merge**2).tolist())]
    arguments = {
        "position_ids": get_vision_position_ids(grid, merge)[patches],
        "cu_seqlens": _borders(torch.tensor(images) * merge**2),
        **FAMILIES[family](encoder, grid, kept),
    }
    return {f"image_{name}": value.to(device) for name, value in arguments.items()}


def _borders(lengths: torch.Tensor) -> torch.Tensor:
    """Where sequences of these lengths begin and end, one behind the other; empty ones are none."""
    return pad(lengths[lengths > 0].cumsum(0, dtype=torch.int32), (1, 0))


def _windows(encoder: Any, grid: torch.Tensor, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """Qwen2.5-VL: units window by window."""
    order, borders = get_vision_window_index(
        grid, encoder.spatial_merge_size, encoder.window_size, encoder.patch_size
    )
    unit = encoder.spatial_merge_unit
    lengths = [int(window.sum()) for window in kept[order].split((borders.diff() // unit).tolist())]
    place = kept.cumsum(0) - 1  # among those that stay
    return {
        "window_index": place[order[kept[order]]],
        "cu_window_seqlens": _borders(torch.tensor(lengths) * unit),
    }


def _learned_positions(
    encoder: Any, grid: torch.Tensor, kept: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Qwen3-VL: learned positions, interpolated to the size of the image."""
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=encoder.num_grid_per_side,
        mode=encoder.interpolation_mode,
        align_corners=encoder.interpolation_align_corners,
        spatial_merge_size=encoder.spatial_merge_size,
    )
    patches = kept.repeat_interleave(encoder.spatial_merge_unit)
    return {"interp_indices": indices[patches], "interp_weights": weights[patches]}


FAMILIES: Mapping[str, Arguments] = {
    "qwen2_5_vl": _windows,
    "qwen3_vl": _learned_positions,
    "glm_ocr": lambda encoder, grid, kept: {},
}
