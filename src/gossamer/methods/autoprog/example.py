"""A small case of AutoProg, for the conformance suite."""

from __future__ import annotations

from typing import Any

from gossamer.core.schedule import Phase
from gossamer.kits.example import MethodExample, tiny_vit
from gossamer.methods.autoprog.method import AutoProg

__all__ = ["example"]

SMALL: dict[str, Any] = {
    "stages": 3, "resolution_step": 8, "search_ratio": 0.5, "records": 2, "batches": 2, "cost": "macs",
}  # fmt: skip


def example() -> MethodExample:
    """Return a ViT of four blocks that grows twice, with a search at each stage; costs are counted, not timed."""
    return MethodExample(
        method=lambda: AutoProg(**SMALL),
        model=lambda: tiny_vit(depth=4),
        neutral=lambda: AutoProg(stages=1, search=False),
        plan=(Phase("fit", 8),),
    )
