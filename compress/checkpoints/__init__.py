"""Checkpoints: what compress writes and loads back."""
