"""How the kernels see a tensor: rows of groups of neighbouring elements."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Grouped"]


class Grouped(NamedTuple):
    """Memory of ``rows`` rows of ``groups`` groups of ``inner`` neighbours; rows start ``stride`` elements apart.

    Element ``e`` in the order of rows, groups, neighbours is ``data[r * stride + g * inner + i]``, counted from
    the first element of ``data``; packed copies are dense (``stride == groups * inner``).
    """

    data: Tensor
    rows: int
    stride: int
    groups: int
    inner: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.groups * self.inner

    def dense(self, data: Tensor) -> Grouped:
        """Return ``data``, dense and of the same groups, seen alike."""
        return Grouped(data, self.rows, self.groups * self.inner, self.groups, self.inner)
