"""scikit-learn's digits as 16x16 images: 1797 real scans (UCI optical digits, CC BY 4.0).

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits" (1998), UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49. The file beside this module holds the scans unchanged.
"""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

SIZE = 16
HALVES = ("a", "b")


@cache
def _all_digits() -> tuple[torch.Tensor, torch.Tensor]:
    scans = load_file(Path(__file__).with_suffix(".safetensors"))
    images = scans["images"].float()[:, None]  # (1797, 1, 8, 8), grey levels 0..16
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return images / 8 - 1, scans["labels"].long()


def digits(half: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One half of the digits, upsampled bilinearly from 8x8 to 16x16.

    Models and the feature extractor are trained on half ``a``; half ``b`` is the reference of the
    metrics and the source of the validation loss. Within every class the images alternate between
    the halves in the data set's own order, so both halves hold every writer and no random number
    generator decides (our own choice).

    Parameters
    ----------
    half : "a" (901 images) or "b" (896 images).

    Returns
    -------
    images, labels : ``(n, 1, 16, 16)`` float32 in [-1, 1] and ``(n,)`` int64.
    """
    if half not in HALVES:
        raise ValueError(f"digits come in two halves, 'a' and 'b'; got {half!r}; name one of them")
    images, labels = _all_digits()
    parity = torch.zeros_like(labels)
    for digit in range(10):
        of_class = (labels == digit).nonzero().squeeze(1)
        parity[of_class] = torch.arange(len(of_class)) % 2
    mine = parity == HALVES.index(half)
    return images[mine].clone(), labels[mine].clone()
