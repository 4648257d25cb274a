"""What NViT knows while the model is open: masks and scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gossamer.kits.structure.budget import Bounds
from gossamer.kits.structure.regions import Keep, Structure
from gossamer.kits.structure.scoring import Scores

__all__ = ["Opened"]


@dataclass
class Opened:
    """A model that is being pruned.

    Attributes:
        structures: Its structures.
        sizes: Units a group, by structure.
        odd_first: Whether the lowest group takes the remainder.
        bounds: The budget.
        keep: Masks.
        round: Rounds done.
        batches: Batches in ``sums``.
        sums: Scores summed over the batches of this round.
        average: Scores averaged over rounds.
    """

    structures: list[Structure]
    sizes: dict[str, int]
    odd_first: bool
    bounds: Bounds
    keep: Keep
    round: int = 0
    batches: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)

    def add(self, scores: Scores) -> None:
        """Add the scores of a batch."""
        self.sums = {k: self.sums[k] + v if k in self.sums else v for k, v in scores.items()}
        self.batches += 1

    def state(self) -> dict[str, Any]:
        """Return what changes while pruning."""
        return {
            "round": self.round, "batches": self.batches, "keep": dict(self.keep),
            "sums": dict(self.sums), "average": dict(self.average),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Undo ``state``."""
        self.round, self.batches = int(state["round"]), int(state["batches"])
        self.keep, self.sums, self.average = (
            {k: v.cpu() for k, v in state[name].items()} for name in ("keep", "sums", "average")
        )
