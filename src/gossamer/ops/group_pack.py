"""Group-wise asymmetric quantization of activations to bytes, with running ranges and stochastic rounding.

Mesa (arXiv 2111.11124) section 3: every group g (a head, a slice of channels) has a range alpha and a minimum
beta; ``q = clip(round((x - beta) (2^b - 1) / alpha), 0, 2^b - 1)`` and ``x_hat = q alpha / (2^b - 1) + beta``. The
functions here take native code (CPU) or Triton (CUDA) where it is there and plain torch otherwise; all three give
the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.kernels import cpu, gpu
from gossamer.kernels.grouped import Grouped
from gossamer.ops.philox import rounding_noise

__all__ = [
    "FLAT",
    "Layout",
    "Packed",
    "arrange",
    "move_range",
    "no_bounds",
    "pack",
    "plain_move_range",
    "plain_pack",
    "plain_unpack",
    "unpack",
]

FLAT = 1e-35
"""A group whose range is not above this counts as constant and comes back as beta."""


def no_bounds(groups: int, device: torch.device | str | None = None) -> Tensor:
    """Return the bounds [2, G] of groups that have seen nothing."""
    return torch.tensor([[-1.0], [0.0]], device=device).repeat(1, groups)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory and how it is cut into groups.

    Attributes:
        shape: Its shape.
        order: Its dimensions from the outermost in memory to the innermost.
        rows: Rows of all groups (what lies outside the grouped dimension).
        groups: Groups G.
        inner: Neighbouring elements of a group in a row.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    rows: int
    groups: int
    inner: int

    @property
    def identity(self) -> bool:
        """Whether memory order is dimension order."""
        return self.order == tuple(range(len(self.order)))

    def restore(self, flat: Tensor) -> Tensor:
        """Return dense values in memory order as a tensor of the original shape (a view)."""
        laid = flat.view([self.shape[d] for d in self.order])
        return laid.permute([self.order.index(d) for d in range(len(self.order))])

    def flatten(self, x: Tensor) -> Tensor:
        """Return a tensor of the original shape as dense values in memory order (a copy only if it lies otherwise)."""
        return x.permute(self.order).contiguous().view(-1)

    def grouped(self, flat: Tensor) -> Grouped:
        """Return dense values in memory order as the kernels take them."""
        return Grouped(flat, self.rows, self.groups * self.inner, self.groups, self.inner)


class Packed(NamedTuple):
    """A tensor kept for later.

    Attributes:
        codes: Bytes in memory order, or the tensor itself where nothing is quantized.
        grid: Step and beta of every group [2, G], ``None`` where nothing is quantized.
        layout: How the codes become the tensor again.
    """

    codes: Tensor
    grid: Tensor | None
    layout: Layout

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return x_hat in the original shape."""
        if self.grid is None:
            return self.codes.to(dtype)
        return self.layout.restore(unpack(self.layout.grouped(self.codes), self.grid, dtype))


def _is_dense(sizes: list[int], strides: list[int], last: int) -> bool:
    """Return whether dimensions of these sizes follow each other in memory, the innermost one ``last`` apart."""
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != last:
            return False
        last *= size
    return True


def arrange(x: Tensor, dim: int, groups: int) -> tuple[Layout, Grouped]:
    """Cut dimension ``dim`` of ``x`` into groups, in whatever order ``x`` lies in memory.

    Equals the release's ``pack_group`` up to the order of a group's elements: [B, N, C] and [B, C] with
    ``dim=-1`` are cut into slices of C / groups channels, [B, H, N, D] with ``dim=1`` into heads (neighbouring
    ones together if there are fewer groups). Views are read where they are; only a tensor whose rows are not
    equally spaced is copied.

    Args:
        x: Any tensor with at least one element.
        dim: The dimension to cut; groups divide it.
        groups: Number of groups.
    """
    dim %= x.dim()
    strides = x.stride()
    order = tuple(sorted(range(x.dim()), key=lambda d: (-strides[d], d)))
    at = order.index(dim)
    sizes, laid = [x.shape[d] for d in order], x.permute(order)
    row = math.prod(sizes[at:])
    rows = math.prod(sizes[:at])
    steps = list(laid.stride())
    outer = next((s for n, s in zip(reversed(sizes[:at]), reversed(steps[:at]), strict=True) if n != 1), row)
    if not (_is_dense(sizes[at:], steps[at:], 1) and _is_dense(sizes[:at], steps[:at], outer)):
        laid, outer = laid.contiguous(), row
    layout = Layout(tuple(x.shape), order, rows, groups, row // groups)
    return layout, Grouped(laid, rows, outer, groups, row // groups)


# -- plain torch, the reference --------------------------------------------------------------------
def _cut(x: Grouped) -> Tensor:
    """Return the elements as float32 [rows, groups, inner]."""
    flat = x.data.as_strided((x.rows, x.groups * x.inner), (x.stride, 1))
    return flat.reshape(x.rows, x.groups, x.inner).float()


def plain_move_range(x: Grouped, bounds: Tensor, take: float) -> None:
    """See ``move_range``."""
    low, high = _cut(x).amin((0, 2)), _cut(x).amax((0, 2))
    new = torch.stack([high - low, low])
    bounds.copy_(torch.where(bounds[0] < 0, new, bounds - take * (bounds - new)))


def plain_pack(x: Grouped, bounds: Tensor, levels: int, noise: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """See ``pack``."""
    alpha, beta = bounds
    flat = alpha <= FLAT
    scale = torch.where(flat, 0.0, torch.full_like(alpha, levels) / torch.where(flat, 1.0, alpha))
    step = torch.where(flat, 0.0, alpha / levels)
    v = (_cut(x) - beta.view(-1, 1)) * scale.view(-1, 1)
    if noise is not None:
        v = v + rounding_noise(x.size, *noise, x.data.device).view(v.shape)
    codes = v.round().clamp(0, levels).to(torch.uint8).view(-1)
    return codes, torch.stack([step, beta])


def plain_unpack(codes: Grouped, grid: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``unpack``."""
    step, beta = grid
    return (_cut(codes) * step.view(-1, 1) + beta.view(-1, 1)).to(dtype).view(-1)


# -- native or plain -------------------------------------------------------------------------------
def move_range(x: Grouped, bounds: Tensor, take: float) -> None:
    """Move running ranges towards those of ``x``: ``alpha <- alpha - take (alpha - (max - min))``, beta likewise.

    Args:
        x: Values.
        bounds: Alpha and beta of every group [2, G] float32, changed in place; an alpha below 0 says
            that there is no earlier value.
        take: Share of the new values, 1 - lambda.
    """
    run = cpu.move_range if cpu.takes(x.data) else gpu.move_range if gpu.takes(x.data) else plain_move_range
    run(x, bounds, take)


def pack(x: Grouped, bounds: Tensor, levels: int, noise: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Quantize; returns the codes (uint8, flat, in memory order) and the grid [2, G] (step, beta) to read them by.

    Values outside the range are clipped on both sides; the grid is a copy that later moves of the range leave alone.

    Args:
        x: Values.
        bounds: Alpha and beta of every group [2, G].
        levels: Highest code, 2^b - 1, at most 255.
        noise: Key and call of the stochastic rounding (``ops.philox``), or ``None`` to round to nearest.
    """
    run = cpu.pack if cpu.takes(x.data) else gpu.pack if gpu.takes(x.data) else plain_pack
    return run(x, bounds, levels, noise)


def unpack(codes: Grouped, grid: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``q * step + beta``, flat, in memory order, in ``dtype``."""
    run = cpu.unpack if cpu.takes(codes.data, dtype) else gpu.unpack if gpu.takes(codes.data) else plain_unpack
    return run(codes, grid, dtype)
