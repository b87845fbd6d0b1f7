"""PixelPrune: patches that a neighbour predicts are dropped before the vision encoder."""

from compress.methods.pixelprune.method import PixelPrune

__all__ = ["PixelPrune"]
