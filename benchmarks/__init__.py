"""Measured claims, each a command; `python -m benchmarks` runs them all."""
