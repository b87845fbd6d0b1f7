"""Measuring compressed models: fidelity, consistency, cost, latency and the tables."""
