"""Small image classifiers; the penultimate layers of two are the extractors of our distances."""

import json
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from compress.models.locate import BUILTIN

SHAPE = ("width", "channels", "size", "classes")


class ImageClassifier(nn.Module):
    """Three convolutions, each followed by pooling, and two linear layers.

    Parameters
    ----------
    width : channels of the first convolution; the others have twice as many.
    channels, size : of the images; the size is a multiple of 8.
    classes : how many there are.
    """

    def __init__(self, width: int, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.hidden = nn.Linear(2 * width * (size // 8) ** 2, 64)
        self.classes = nn.Linear(64, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate ``(batch, 64)`` of images ``(batch, channels, size, size)`` in [-1, 1]."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits ``(batch, classes)``."""
        return self.classes(self.features(images))


def classifier_config(name: str) -> dict[str, Any]:
    """What is known of a built-in classifier: its shape, how it was trained, and ``kid_gamma``."""
    config: dict[str, Any] = json.loads((BUILTIN / name / "config.json").read_text())
    return config


def load_classifier(name: str) -> ImageClassifier:
    """Load ``digits-features`` or ``emoji-features``, the extractors, or ``digits-judge``.

    The judge has other widths, another seed and the other half of the data; it decides whether
    samples look like digits, and never takes part in a distance.
    """
    config = classifier_config(name)
    model = ImageClassifier(**{key: config[key] for key in SHAPE})
    model.load_state_dict(load_file(BUILTIN / name / "model.safetensors"))
    return model.eval().requires_grad_(False)
