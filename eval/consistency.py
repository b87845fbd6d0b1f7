"""How close a compressed model's images are to the dense model's images from the same noise."""

import torch
from torch.nn import functional as F

WINDOW = 11
SIGMA = 1.5
# of the squared data range: they keep the quotients finite where an image is flat
C1, C2 = 0.01**2, 0.03**2


def ssim_to(images: torch.Tensor, others: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Structural similarity of each image with its partner; larger is closer, 1 is equal.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004):
    Gaussian window of 11 pixels with sigma 1.5, data range 1, mean over channels and over all
    positions where the window lies inside the image.

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
    pairs = zip(images.split(batch), others.split(batch), strict=True)
    return torch.cat([_ssim(a.double() / 255, b.double() / 255) for a, b in pairs])


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


def _ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """SSIM of each pair ``(n, channels, height, width)`` with grey levels in [0, 1]."""
    places = torch.arange(WINDOW, dtype=a.dtype, device=a.device) - WINDOW // 2
    weights = torch.exp(-((places / SIGMA) ** 2) / 2)
    weights = weights / weights.sum()

    def local_mean(values: torch.Tensor) -> torch.Tensor:
        flat = values.flatten(0, 1)[:, None]
        flat = F.conv2d(F.conv2d(flat, weights[None, None, :, None]), weights[None, None, None])
        return flat.unflatten(0, values.shape[:2])[:, :, 0]

    mean_a, mean_b = local_mean(a), local_mean(b)
    variances = local_mean(a * a) - mean_a**2 + local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return (luminance * (2 * covariance + C2) / (variances + C2)).mean(dim=(1, 2, 3))


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
