"""NViT: global structural pruning of vision transformers by Hessian-aware saliency."""

from gossamer.methods.nvit.method import NViT

__all__ = ["NViT"]
