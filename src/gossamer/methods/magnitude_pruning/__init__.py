"""Magnitude pruning: the baseline of structured pruning."""

from gossamer.methods.magnitude_pruning.method import MagnitudePruning

__all__ = ["MagnitudePruning"]
