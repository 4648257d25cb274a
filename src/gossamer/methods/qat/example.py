"""A small case of quantization-aware training, for the conformance suite."""

from gossamer.kits.example import MethodExample
from gossamer.methods.qat.method import QAT

__all__ = ["example"]


def example() -> MethodExample:
    """Return three steps at 4 bits; 32 bits everywhere is the plain model."""
    return MethodExample(
        method=lambda: QAT(bits=4, clip_start="mse"), neutral=lambda: QAT(bits=32, first_last_bits=32), tolerance=0.02
    )
