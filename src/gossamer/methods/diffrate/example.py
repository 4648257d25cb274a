"""A small case of DiffRate: a search of four steps on a tiny ViT, then the recipe's own training."""

from gossamer.kits.example import MethodExample
from gossamer.methods.diffrate.method import DiffRate

__all__ = ["example"]

TOKENS = 17


def example() -> MethodExample:
    """Return the example."""
    return MethodExample(
        method=lambda: DiffRate(macs="70%", search_steps=4, lr=0.1, budget_unit="relative"),
        neutral=lambda: DiffRate(schedule={"merge": [TOKENS] * 3}),
    )
