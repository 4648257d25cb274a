"""A small case of manifold distillation, for the conformance suite."""

from __future__ import annotations

from gossamer.kits.example import MethodExample, tiny_vit
from gossamer.methods.manifold_distillation.method import ManifoldDistillation

__all__ = ["example"]


def example() -> MethodExample:
    """Return a ViT that learns from a wider one with the same patch grid."""
    return MethodExample(
        method=lambda: ManifoldDistillation(tiny_vit(embed_dim=48), alpha=0.5, k=16),
        neutral=lambda: ManifoldDistillation(alpha=0.0, beta=0.0),
    )
