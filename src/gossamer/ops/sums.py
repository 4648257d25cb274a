"""The sum of two tensors as a module, in float and of operands on one grid."""

from __future__ import annotations

from torch import Tensor, nn

from gossamer.ops.grids import InputGrid, InputKind

__all__ = ["Add", "RoundedAdd"]


class Add(nn.Module):
    """Adds two tensors; written as a module, a skip connection can be found, measured and replaced."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``x + y``."""
        return x + y


class RoundedAdd(nn.Module):
    """Adds two tensors after rounding both to the same grid: integers on a common scale need no rescaling.

    Args:
        bits: Width of the operands.
        kind: Their grid (``ops.grids.INPUT_GRIDS``).
    """

    def __init__(self, bits: int, kind: InputKind) -> None:
        super().__init__()
        self.grid = InputGrid(bits, kind)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of the rounded operands."""
        return self.grid(x) + self.grid(y)
