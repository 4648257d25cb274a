"""Native CPU kernels: checked calls of the extension module, AVX-512, AVX2 or plain code chosen at run time.

Shapes, formulas and the plain-torch references are in ``ops.group_pack`` and ``ops.saved``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gossamer.kernels.grouped import Grouped

try:
    from gossamer.kernels import _native  # type: ignore[attr-defined]  # built where there is a compiler
except ImportError:  # installed where there was no compiler: ops takes the plain torch path
    _native: Any = None  # type: ignore[no-redef]

__all__ = [
    "available",
    "clock_hz",
    "describe",
    "layer_norm_backward",
    "move_range",
    "pack",
    "softmax_backward",
    "takes",
    "times_table",
    "unpack",
]

_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def available() -> bool:
    """Return whether the native kernels were built."""
    return _native is not None


def describe() -> str:
    """Return the instruction set in use, or why there is none and how to get it."""
    if _native is None:
        return "not built: plain torch is used. Install a C++ compiler (GCC or Clang) and run pip install again"
    return f"active, {_native.isa()}"


def clock_hz() -> float:
    """Return the cycles a second of the core in use, measured in a fraction of a second; needs the native kernels."""
    return float(_native.clock_hz())


def takes(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether the native kernels can work on ``x`` (as ``dtype``): real CPU memory, float32 or bfloat16."""
    if _native is None or x.device.type != "cpu" or isinstance(x, FakeTensor):
        return False
    return (x.dtype if dtype is None else dtype) in _TYPES


def _address(x: Tensor, dtype: torch.dtype, size: int) -> int:
    assert x.dtype == dtype and x.numel() == size and x.is_contiguous()  # noqa: S101 - callers are ops, not users
    return x.data_ptr()


def move_range(x: Grouped, bounds: Tensor, take: float) -> None:
    """Move ``bounds`` [2, G] (alpha, beta) towards range and minimum of ``x`` by ``take``; alpha < 0: none yet."""
    _native.move_range(
        _TYPES[x.data.dtype], x.data.data_ptr(), x.rows, x.stride, x.groups, x.inner,
        _address(bounds, torch.float32, 2 * x.groups), take, torch.get_num_threads(),
    )  # fmt: skip


def pack(x: Grouped, bounds: Tensor, levels: int, noise: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Return codes [rows * G * inner] (uint8) and grid [2, G] (step, beta); ``noise`` is (key, call) or nearest."""
    codes = torch.empty(x.size, dtype=torch.uint8)
    grid = torch.empty(2, x.groups)
    key, call = noise or (0, 0)
    _native.pack(
        _TYPES[x.data.dtype], x.data.data_ptr(), x.rows, x.stride, x.groups, x.inner,
        _address(bounds, torch.float32, 2 * x.groups), float(levels), key, call, noise is not None,
        codes.data_ptr(), grid.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return codes, grid


def unpack(codes: Grouped, grid: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``codes * step + beta``, flat, in ``dtype``."""
    out = torch.empty(codes.size, dtype=dtype)
    _native.unpack(
        _TYPES[dtype], _address(codes.data, torch.uint8, codes.size), codes.rows, codes.groups, codes.inner,
        _address(grid, torch.float32, 2 * codes.groups), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def times_table(grad: Tensor, codes: Grouped, table: Tensor) -> Tensor:
    """Return ``grad * table[group, code]``; grad: dense, in the order of the codes; table: [G, 256]."""
    out = torch.empty_like(grad)
    _native.times_table(
        _TYPES[grad.dtype], _address(grad, grad.dtype, codes.size), _address(codes.data, torch.uint8, codes.size),
        codes.rows, codes.groups, codes.inner, _address(table, torch.float32, 256 * codes.groups), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def softmax_backward(grad: Tensor, codes: Grouped, grid: Tensor, cols: int) -> Tensor:
    """Return ``y * (grad - sum(grad * y))`` over rows of ``cols`` with y unpacked on the fly; grad: dense."""
    out = torch.empty_like(grad)
    _native.softmax_backward(
        _TYPES[grad.dtype], _address(grad, grad.dtype, codes.size), _address(codes.data, torch.uint8, codes.size),
        codes.size // cols, cols, codes.inner // cols, codes.groups, _address(grid, torch.float32, 2 * codes.groups),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def layer_norm_backward(
    grad: Tensor, codes: Grouped, grid: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias; grad: dense [rows * C]; mean, rstd: [rows]; weight: [C]."""
    width = codes.groups * codes.inner
    out, sums = torch.empty_like(grad), torch.zeros(2, width)
    _native.layer_norm_backward(
        _TYPES[grad.dtype], _address(grad, grad.dtype, codes.size), _address(codes.data, torch.uint8, codes.size),
        codes.rows, codes.groups, codes.inner, _address(grid, torch.float32, 2 * codes.groups),
        _address(mean, torch.float32, codes.rows), _address(rstd, torch.float32, codes.rows),
        _address(weight, torch.float32, width), out.data_ptr(), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, sums[0], sums[1]
