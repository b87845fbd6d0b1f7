"""Gradient-flow iterative soft pruning of diffusion UNets, and the one-shot baselines."""

from compress.methods.gradflow.method import GradFlow, OneShot, Training

__all__ = ["GradFlow", "OneShot", "Training"]
