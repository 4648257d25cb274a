"""Where an operator's saved activation goes: a running range per group, and what is packed with it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import RecipeError
from gossamer.ops.group_pack import Packed, arrange, move_range, no_bounds, pack

__all__ = ["EXACT_BITS", "ActStore", "NoiseSource", "in_recomputation"]

EXACT_BITS = 32
"""Asks for the tensor itself: nothing is quantized."""
_MAX_BITS = 8


class NoiseSource:
    """Numbers the calls that round stochastically, so that each draws numbers of its own.

    Attributes:
        key: 64-bit key of the present step.
        calls: Calls since the key was set.
    """

    def __init__(self) -> None:
        self.key, self.calls = 0, 0

    def begin(self, key: int) -> None:
        """Start a step."""
        self.key, self.calls = key, 0

    def next(self) -> tuple[int, int]:
        """Return key and call for ``ops.group_pack.pack``."""
        self.calls += 1
        return self.key, self.calls


def in_recomputation() -> bool:
    """Return whether a backward pass is running: a forward inside one repeats what was computed before."""
    return torch._C._current_graph_task_id() != -1


class ActStore(nn.Module):
    """Keeps activations as bytes, by a running range per group (Mesa, arXiv 2111.11124 section 3.2).

    The first call sets alpha = max - min and beta = min of every group; later ones move them by
    ``alpha <- ema alpha + (1 - ema) (max - min)``, beta likewise, before they are used. Each packed tensor
    carries the grid it was packed with. Recomputation under activation checkpointing moves nothing.

    Args:
        groups: Number of groups the dimension is cut into; where it does not divide, their greatest common divisor.
        dim: The dimension.
        bits: Width of a code, 2..8 (a byte each, whatever the width), or 32 for the tensor itself.
        ema: Share of the earlier range, lambda.
        noise: Source of stochastic rounding, or ``None`` to round to nearest.

    Attributes:
        bounds: Alpha and beta of every group [2, G], alpha -1 before the first call; not part of a state dict.
        seen: Calls that moved the range.
    """

    bounds: Tensor

    def __init__(
        self, groups: int, dim: int, bits: int = 8, ema: float = 0.9, noise: NoiseSource | None = None
    ) -> None:
        super().__init__()
        if bits != EXACT_BITS and not 2 <= bits <= _MAX_BITS:
            raise RecipeError(
                f"saved activations: bits={bits}; allowed are 2..{_MAX_BITS}, or {EXACT_BITS} to keep them exact"
            )
        if not 0 <= ema < 1:
            raise RecipeError(f"saved activations: ema={ema}; allowed is [0, 1)")
        self.asked, self.dim, self.bits, self.ema, self.noise = groups, dim, bits, ema, noise
        self.seen = 0
        self.register_buffer("bounds", no_bounds(groups), persistent=False)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the range towards that of ``x`` without keeping it (a training pass that will not be differentiated)."""
        if self.bits != EXACT_BITS and not in_recomputation():
            self._move(arrange(x, self.dim, self._groups(x))[1])

    @torch.no_grad()
    def pack(self, x: Tensor) -> Packed:
        """Move the range and return ``x`` packed."""
        layout, grouped = arrange(x, self.dim, self._groups(x))
        if self.bits == EXACT_BITS:
            return Packed(x.detach(), None, layout)
        if self.seen == 0 or not in_recomputation():
            self._move(grouped)
        noise = self.noise.next() if self.noise is not None else None
        return Packed(*pack(grouped, self.bounds, 2**self.bits - 1, noise), layout)

    def _groups(self, x: Tensor) -> int:
        groups = math.gcd(self.asked, x.shape[self.dim])
        if groups != self.bounds.shape[1]:
            self.bounds = no_bounds(groups, self.bounds.device)
            self.seen = 0
        return groups

    def _move(self, grouped: Any) -> None:
        move_range(grouped, self.bounds, 1 - self.ema)
        self.seen += 1

    def saved_state(self) -> dict[str, Any]:
        """Return range and count, for a checkpoint."""
        return {"bounds": self.bounds.clone(), "seen": self.seen, "asked": self.asked}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Take over range and count; what was kept for another number of groups is left aside."""
        if state["asked"] == self.asked:
            self.bounds = state["bounds"].to(self.bounds.device, copy=True)
            self.seen = int(state["seen"])

    def extra_repr(self) -> str:
        return f"groups={self.asked}, dim={self.dim}, bits={self.bits}"
