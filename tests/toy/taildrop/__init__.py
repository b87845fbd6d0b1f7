"""Taildrop: the last visual tokens of each image are hidden from the decoder."""

from compress.methods.taildrop.method import TailDrop

__all__ = ["TailDrop"]
