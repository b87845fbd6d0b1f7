"""A small classifier of digits; its penultimate layer is the extractor of `fid_digits`."""

import json

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from compress.models.locate import BUILTIN


class DigitsFeatures(nn.Module):
    """Convolutional digit classifier.

    Parameters
    ----------
    width : channels of the first convolution; the second has twice as many.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.hidden = nn.Linear(2 * width * 4, 64)
        self.classes = nn.Linear(64, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate activations ``(batch, 64)`` of images ``(batch, 1, 16, 16)`` in [-1, 1]."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits ``(batch, 10)``."""
        return self.classes(self.features(images))


def load_digits_features(name: str = "digits-features") -> DigitsFeatures:
    """Load a built-in classifier: ``digits-features`` (the extractor) or ``digits-judge``.

    The judge has other widths, another seed and the other half of the data; it decides whether
    samples look like digits, and never takes part in a distance.
    """
    folder = BUILTIN / name
    width = json.loads((folder / "config.json").read_text())["width"]
    model = DigitsFeatures(width)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().requires_grad_(False)
