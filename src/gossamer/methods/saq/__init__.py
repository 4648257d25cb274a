"""SAQ: sharpness-aware quantization, with the search of bit widths."""

from gossamer.methods.saq.method import SAQ

__all__ = ["SAQ"]
