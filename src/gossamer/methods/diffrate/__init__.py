"""DiffRate: differentiable compression rates for vision transformers."""

from gossamer.methods.diffrate.method import DiffRate

__all__ = ["DiffRate"]
