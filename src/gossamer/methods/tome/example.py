"""A small case of ToMe: two tokens merged in every block of a tiny ViT."""

from gossamer.kits.example import MethodExample
from gossamer.methods.tome.method import ToMe

__all__ = ["example"]


def example() -> MethodExample:
    """Return the example."""
    return MethodExample(method=lambda: ToMe(r=2), neutral=lambda: ToMe(r=0))
