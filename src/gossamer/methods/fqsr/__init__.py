"""FQSR: fully quantized image super-resolution networks."""

from gossamer.methods.fqsr.method import FQSR

__all__ = ["FQSR"]
