"""ToMe: token merging without training."""

from gossamer.methods.tome.method import ToMe

__all__ = ["ToMe"]
