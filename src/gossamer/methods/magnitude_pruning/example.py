"""A small case of magnitude pruning: 60% of the MACs of a tiny ViT."""

from gossamer.kits.example import MethodExample
from gossamer.methods.magnitude_pruning.method import MagnitudePruning

__all__ = ["example"]


def example() -> MethodExample:
    """Return the example."""
    groups = {"emb": 8, "head": 1, "qk": 4, "v": 4, "mlp": 16}
    return MethodExample(
        method=lambda: MagnitudePruning(macs="60%", group_sizes=groups),
        neutral=lambda: MagnitudePruning(macs="100%"),
    )
