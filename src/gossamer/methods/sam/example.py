"""A small case of SAM, for the conformance suite."""

from gossamer.kits.example import MethodExample
from gossamer.methods.sam.method import SAM

__all__ = ["example"]


def example() -> MethodExample:
    """Return three adaptive steps; radius 0 is plain training."""
    return MethodExample(method=lambda: SAM(rho=0.5, adaptive=True), neutral=lambda: SAM(rho=0.0))
