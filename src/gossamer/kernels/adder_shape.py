"""Sizes of an adder convolution, and the names of what its gradients sum; shared by all kernels and references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RULES", "AdderShape"]

RULES = ("difference", "clamp", "sign", "power", "clamped_power")
"""What stands for d in a gradient: d, clamp(d, -1, 1), sign(d), p sign(d) |d|^(p-1), and that clamped. In the order
of ``Rule`` in the native code."""


class AdderShape(NamedTuple):
    """Input [batch, channels, height, width], filters [filters, channels, kernel]; dilation and groups are 1."""

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> AdderShape:
        """Read the sizes off the tensors."""
        (n, c, h, w), (o, _, kh, kw) = x.shape, weight.shape
        return cls(n, c, h, w, o, (kh, kw), (stride[0], stride[1]), (padding[0], padding[1]))

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        sizes = zip((self.height, self.width), self.kernel, self.stride, self.padding, strict=True)
        h, w = ((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
        return h, w

    @property
    def pairs(self) -> int:
        """Number of differences |w - x| of one call."""
        height, width = self.out
        return self.batch * self.filters * height * width * self.channels * self.kernel[0] * self.kernel[1]

    def numbers(self) -> list[int]:
        """Return all sizes as the native code takes them."""
        n, c, h, w, o, kernel, stride, padding = self
        return [n, c, h, w, o, *kernel, *stride, *padding]

    def empty_output(self, x: Tensor) -> Tensor:
        """Return memory for the output in float32 (float64 of float64), in the memory format of ``x``."""
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.empty(
            (self.batch, self.filters, *self.out), dtype=dtype, device=x.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )  # fmt: skip
