"""Triton kernels for GPUs. Importable anywhere; active with triton and a CUDA device.

The same formulas and the same random numbers as the native CPU kernels and the plain-torch references of
``ops.group_pack``; multiplications and additions are kept apart, so that codes agree bit by bit.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from gossamer.kernels.grouped import Grouped

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:
    triton = None

__all__ = ["available", "describe", "move_range", "pack", "takes", "unpack"]

_FLAT = 1e-35
_BLOCK = 1024


def available() -> bool:
    """Return whether triton is installed and a GPU is there."""
    return triton is not None and torch.cuda.is_available()


def describe() -> str:
    """Return whether the kernels are active, or what is missing."""
    if not torch.cuda.is_available():
        return "not active: no CUDA device"
    return "active" if available() else "not active: pip install triton"


def takes(x: Tensor) -> bool:
    """Return whether the Triton kernels can work on ``x``: CUDA memory."""
    return triton is not None and x.is_cuda


if triton is not None:

    @triton.jit
    def _extremes(x, lo, hi, per_group, stride, groups, inner, BLOCK: tl.constexpr):  # noqa: N803 - triton's way
        """Minimum and maximum of one stretch of one group; lo, hi: [stretches, groups]."""
        stretch, group = tl.program_id(0), tl.program_id(1)
        e = stretch.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        at = (e // inner) * stride + group * inner + e % inner
        v = tl.load(x + at, mask=e < per_group, other=0.0).to(tl.float32)
        tl.store(lo + stretch * groups + group, tl.min(tl.where(e < per_group, v, float("inf")), 0))
        tl.store(hi + stretch * groups + group, tl.max(tl.where(e < per_group, v, float("-inf")), 0))

    @triton.jit
    def _noise(e, key, call, ROUNDS: tl.constexpr):  # noqa: N803
        """Stochastic rounding of element ``e``, numbered as in ``ops.philox``."""
        counter = (e // 128) * 16 + e % 16
        slot = (e // 16) % 8
        zero = tl.zeros_like(counter).to(tl.uint32)
        low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(key, low, high, zero + call, zero, ROUNDS)
        which = slot % 4
        word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
        half = tl.where(slot < 4, word & 0xFFFF, word >> 16)
        return (half.to(tl.float32) - 32767.5) * (1.0 / 65536.0)

    @triton.jit
    def _pack(  # noqa: PLR0913 - a kernel takes addresses and sizes one by one
        x, scale, beta, out, size, stride, groups, inner, levels, key, call,
        NOISY: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        group = (e // inner) % groups
        at = (e // (inner * groups)) * stride + e % (inner * groups)
        v = tl.load(x + at, mask=e < size, other=0.0).to(tl.float32)
        v = (v - tl.load(beta + group)) * tl.load(scale + group)
        if NOISY:
            v = v + _noise(e, key, call, 7)
        v = tl.minimum(tl.maximum(v, 0.0), levels)
        v = (v + 8388608.0) - 8388608.0  # to the nearest integer, halves to even: a float of this size has no fraction
        tl.store(out + e, v.to(tl.uint8), mask=e < size)

    @triton.jit
    def _unpack(codes, step, beta, out, size, groups, inner, BLOCK: tl.constexpr):  # noqa: N803
        e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        group = (e // inner) % groups
        q = tl.load(codes + e, mask=e < size, other=0).to(tl.float32)
        v = q * tl.load(step + group) + tl.load(beta + group)
        tl.store(out + e, v.to(out.dtype.element_ty), mask=e < size)


def move_range(x: Grouped, bounds: Tensor, take: float) -> None:
    """Move ``bounds`` [2, G] (alpha, beta) towards range and minimum of ``x`` by ``take``; alpha < 0: none yet."""
    per_group = x.rows * x.inner
    stretches = triton.cdiv(per_group, _BLOCK)
    lo = torch.empty(stretches, x.groups, device=x.data.device)
    hi = torch.empty_like(lo)
    _extremes[(stretches, x.groups)](x.data, lo, hi, per_group, x.stride, x.groups, x.inner, BLOCK=_BLOCK)
    low, high = lo.amin(0), hi.amax(0)
    new = torch.stack([high - low, low])
    bounds.copy_(torch.where(bounds[0] < 0, new, bounds - take * (bounds - new)))


def pack(x: Grouped, bounds: Tensor, levels: int, noise: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Return codes (uint8) and grid [2, G] (step, beta); ``noise`` is (key, call) or nearest."""
    alpha, beta = bounds
    flat = alpha <= _FLAT
    scale = torch.where(flat, 0.0, torch.full_like(alpha, levels) / torch.where(flat, 1.0, alpha))
    codes = torch.empty(x.size, dtype=torch.uint8, device=x.data.device)
    key, call = noise or (0, 0)
    _pack[(triton.cdiv(x.size, _BLOCK),)](
        x.data, scale, beta, codes, x.size, x.stride, x.groups, x.inner, float(levels), key, call,
        NOISY=noise is not None, BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, torch.stack([torch.where(flat, 0.0, alpha / levels), beta])


def unpack(codes: Grouped, grid: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``codes * step + beta``, flat, in ``dtype``."""
    out = torch.empty(codes.size, dtype=dtype, device=codes.data.device)
    _unpack[(triton.cdiv(codes.size, _BLOCK),)](
        codes.data, grid[0], grid[1], out, codes.size, codes.groups, codes.inner, BLOCK=_BLOCK, enable_fp_fusion=False
    )
    return out
