"""SAM and ASAM: sharpness-aware minimisation of float models."""

from gossamer.methods.sam.method import SAM

__all__ = ["SAM"]
