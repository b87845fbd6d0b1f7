"""Gradient-flow iterative soft pruning of diffusion models, and the one-shot baselines."""

from compress.methods.gradflow.method import GradFlow, OneShot

__all__ = ["GradFlow", "OneShot"]
