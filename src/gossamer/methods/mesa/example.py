"""A small case of Mesa for the conformance suite: every layer of a tiny ViT packs."""

from __future__ import annotations

from gossamer.kits.example import MethodExample
from gossamer.methods.mesa.method import Mesa

__all__ = ["example"]


def example() -> MethodExample:
    """Return the example; kept exactly, nothing changes."""
    return MethodExample(method=lambda: Mesa(), neutral=lambda: Mesa(bits=32))
