"""A small case of NViT: half the MACs of a tiny ViT in four rounds of two steps."""

from __future__ import annotations

from gossamer.kits.example import MethodExample, tiny_vit
from gossamer.methods.nvit.method import NViT

__all__ = ["example"]


def example() -> MethodExample:
    """Return the example; both teachers, every structure, latency term on MACs."""
    groups = {"emb": 8, "head": 1, "qk": 4, "v": 4, "mlp": 16}
    return MethodExample(
        method=lambda: NViT(
            macs="60%", rounds=4, interval=2, group_sizes=groups, heads_first=False, lr=1e-3, kl_weight=1.0,
            fit_kl_weight=1.0, cnn_teacher=tiny_vit(embed_dim=16),
        ),
        neutral=lambda: NViT(macs="100%"),
    )  # fmt: skip
