"""How close a compressed model's images are to the dense model's images from the same noise."""

import torch
from torchmetrics.functional.image import structural_similarity_index_measure

WINDOW = 11
SIGMA = 1.5


def ssim_to(images: torch.Tensor, others: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Structural similarity of each image with its partner; larger is closer, 1 is equal.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004):
    Gaussian window of 11 pixels with sigma 1.5, data range 1, mean over channels and over all
    positions where the window lies inside the image. The map is computed by torchmetrics.

    Parameters
    ----------
    images, others : uint8 ``(n, channels, height, width)``, paired by index.
    batch : pairs per pass; memory only.

    Returns
    -------
    torch.Tensor : float64 ``(n,)`` in [-1, 1].

    Raises
    ------
    ValueError : for other dtypes, unequal shapes or images smaller than the window.
    """
    _check(images, others)
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, its window; got "
            f"{images.shape[-2]}x{images.shape[-1]}; compare by mse_to"
        )
    border = WINDOW // 2
    values = []
    for a, b in zip(images.split(batch), others.split(batch), strict=True):
        _, everywhere = structural_similarity_index_measure(
            a.double() / 255,
            b.double() / 255,
            gaussian_kernel=True,
            sigma=SIGMA,
            kernel_size=WINDOW,
            reduction="none",
            data_range=1.0,
            return_full_image=True,
        )
        # torchmetrics' own mean counts positions whose window is filled up by reflection; scikit-
        # image's and the paper's do not. At 16x16 the two differ in the second decimal.
        inside = everywhere[..., border:-border, border:-border]
        values.append(inside.mean(dim=(1, 2, 3)))
    return torch.cat(values)


def mse_to(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of each image and its partner, grey levels in [0, 1]; less is closer.

    Parameters
    ----------
    images, others : uint8 ``(n, channels, height, width)``, paired by index.

    Returns
    -------
    torch.Tensor : float64 ``(n,)``.

    Raises
    ------
    ValueError : for other dtypes or unequal shapes.
    """
    _check(images, others)
    return ((images.double() - others.double()) / 255).square().mean(dim=(1, 2, 3))


def _check(images: torch.Tensor, others: torch.Tensor) -> None:
    for tensor in (images, others):
        if tensor.dtype != torch.uint8 or tensor.dim() != 4 or len(tensor) == 0:
            raise ValueError(
                "images must be uint8 (n, channels, height, width) with n >= 1; got "
                f"{tensor.dtype} {tuple(tensor.shape)}; convert them with sampling.to_uint8"
            )
    if images.shape != others.shape:
        raise ValueError(
            f"images are compared in pairs, so shapes must agree; got {tuple(images.shape)} and "
            f"{tuple(others.shape)}; draw both sets with the same settings"
        )
