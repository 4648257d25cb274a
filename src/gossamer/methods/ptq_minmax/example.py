"""A small case of min-max quantization, for the conformance suite."""

from __future__ import annotations

from gossamer.kits.example import MethodExample
from gossamer.methods.ptq_minmax.method import PTQMinMax

__all__ = ["example"]


def example() -> MethodExample:
    """Return 8 bits from four images; quantization has no neutral setting."""
    return MethodExample(method=lambda: PTQMinMax(images=4), tolerance=0.02)
