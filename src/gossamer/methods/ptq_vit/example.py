"""A small case of searched quantization, for the conformance suite."""

from __future__ import annotations

from gossamer.kits.example import MethodExample
from gossamer.methods.ptq_vit.method import PTQViT

__all__ = ["example"]


def example() -> MethodExample:
    """Return 8 bits from four images and a coarse search; quantization has no neutral setting."""
    return MethodExample(
        method=lambda: PTQViT(images=4, n_candidates=5, max_iter=1, rows=8, rank_pairs=32), tolerance=0.02
    )
