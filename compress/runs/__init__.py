"""Runs: from a recipe to a checkpoint, metrics and a report."""
