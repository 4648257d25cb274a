"""Fine-grained manifold distillation of vision transformers (arXiv 2107.01378)."""

from gossamer.methods.manifold_distillation.method import ManifoldDistillation

__all__ = ["ManifoldDistillation"]
