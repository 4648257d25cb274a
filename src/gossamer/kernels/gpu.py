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
    # Sizes of groups are constants of a kernel (a model has a handful) and indices 32 bits wide where that is enough:
    # divisions by numbers known only at run time cost more than everything else here.

    @triton.jit
    def _extremes(  # noqa: PLR0913 - a kernel takes addresses and sizes one by one
        x, lo, hi, per_group, stride, groups,
        INNER: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803 - triton's way
    ):  # fmt: skip
        """Minimum and maximum of one stretch of one group; lo, hi: [groups, stretches]."""
        stretch, group = tl.program_id(0), tl.program_id(1)
        e = (stretch.to(tl.int64) if WIDE else stretch) * BLOCK + tl.arange(0, BLOCK)
        at = (e // INNER) * stride + group * INNER + e % INNER
        v = tl.load(x + at, mask=e < per_group, other=0.0).to(tl.float32)
        place = group * tl.num_programs(0) + stretch
        tl.store(lo + place, tl.min(tl.where(e < per_group, v, float("inf")), 0))
        tl.store(hi + place, tl.max(tl.where(e < per_group, v, float("-inf")), 0))

    @triton.jit
    def _move(lo, hi, bounds, take, stretches, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
        """Reduce the stretches of one group and move its bounds."""
        group, groups = tl.program_id(0), tl.num_programs(0)
        low = tl.full((BLOCK,), float("inf"), tl.float32)
        high = tl.full((BLOCK,), float("-inf"), tl.float32)
        for block in range(BLOCKS):  # a constant: the interpreter cannot count up to an argument
            at = block * BLOCK + tl.arange(0, BLOCK)
            place = group * stretches + at
            low = tl.minimum(low, tl.load(lo + place, mask=at < stretches, other=float("inf")))
            high = tl.maximum(high, tl.load(hi + place, mask=at < stretches, other=float("-inf")))
        beta = tl.min(low, 0)
        alpha = tl.max(high, 0) - beta
        old_alpha, old_beta = tl.load(bounds + group), tl.load(bounds + groups + group)
        first = old_alpha < 0
        tl.store(bounds + group, tl.where(first, alpha, old_alpha - take * (old_alpha - alpha)))
        tl.store(bounds + groups + group, tl.where(first, beta, old_beta - take * (old_beta - beta)))

    @triton.jit
    def _noise(e, key, call, WIDE: tl.constexpr, ROUNDS: tl.constexpr):  # noqa: N803
        """Stochastic rounding of element ``e``, numbered as in ``ops.philox``."""
        counter = (e // 128) * 16 + e % 16
        slot = (e // 16) % 8
        zero = tl.zeros_like(counter).to(tl.uint32)
        low, high = counter.to(tl.uint32), zero
        if WIDE:
            low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(key, low, high, zero + call, zero, ROUNDS)
        which = slot % 4
        word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
        half = tl.where(slot < 4, word & 0xFFFF, word >> 16)
        return (half.to(tl.float32) - 32767.5) * (1.0 / 65536.0)

    @triton.jit
    def _pack(  # noqa: PLR0913
        x, bounds, grid, out, size, stride, levels, flat, key, call, GROUPS: tl.constexpr, SPAN: tl.constexpr,  # noqa: N803
        INNER: tl.constexpr, NOISY: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        """Codes of one stretch; the first program writes the grid as well. SPAN: GROUPS rounded up to a power of 2."""
        block = tl.program_id(0)
        if block == 0:
            g = tl.arange(0, SPAN)
            all_alpha = tl.load(bounds + g, mask=g < GROUPS, other=1.0)
            step = tl.where(all_alpha <= flat, 0.0, tl.div_rn(all_alpha, tl.zeros_like(all_alpha) + levels))
            tl.store(grid + g, step, mask=g < GROUPS)
            beta = tl.load(bounds + GROUPS + g, mask=g < GROUPS, other=0.0)
            tl.store(grid + GROUPS + g, beta, mask=g < GROUPS)
        e = (block.to(tl.int64) if WIDE else block) * BLOCK + tl.arange(0, BLOCK)
        group = (e // INNER) % GROUPS
        at = (e // (INNER * GROUPS)) * stride + e % (INNER * GROUPS)
        v = tl.load(x + at, mask=e < size, other=0.0).to(tl.float32)
        alpha = tl.load(bounds + group)
        scale = tl.where(alpha <= flat, 0.0, tl.div_rn(tl.zeros_like(alpha) + levels, alpha))
        v = (v - tl.load(bounds + GROUPS + group)) * scale
        if NOISY:
            v = v + _noise(e, key, call, WIDE, 7)
        v = tl.minimum(tl.maximum(v, 0.0), levels)
        v = (v + 8388608.0) - 8388608.0  # to the nearest integer, halves to even: a float of this size has no fraction
        tl.store(out + e, v.to(tl.uint8), mask=e < size)

    @triton.jit
    def _unpack(  # noqa: PLR0913
        codes, grid, out, size,
        GROUPS: tl.constexpr, INNER: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        block = tl.program_id(0)
        e = (block.to(tl.int64) if WIDE else block) * BLOCK + tl.arange(0, BLOCK)
        group = (e // INNER) % GROUPS
        q = tl.load(codes + e, mask=e < size, other=0).to(tl.float32)
        v = q * tl.load(grid + group) + tl.load(grid + GROUPS + group)
        tl.store(out + e, v.to(out.dtype.element_ty), mask=e < size)


def _wide(x: Grouped) -> bool:
    """Return whether an index into the memory of ``x`` may need 64 bits."""
    return x.rows * max(x.stride, x.groups * x.inner) + _BLOCK >= 2**31


def move_range(x: Grouped, bounds: Tensor, take: float) -> None:
    """Move ``bounds`` [2, G] (alpha, beta) towards range and minimum of ``x`` by ``take``; alpha < 0: none yet."""
    per_group = x.rows * x.inner
    stretches = triton.cdiv(per_group, _BLOCK)
    lo = torch.empty(x.groups, stretches, device=x.data.device)
    hi = torch.empty_like(lo)
    _extremes[(stretches, x.groups)](
        x.data, lo, hi, per_group, x.stride, x.groups, INNER=x.inner, WIDE=_wide(x), BLOCK=_BLOCK
    )
    blocks = triton.cdiv(stretches, _BLOCK)
    _move[(x.groups,)](lo, hi, bounds, take, stretches, BLOCKS=blocks, BLOCK=_BLOCK, enable_fp_fusion=False)


def pack(x: Grouped, bounds: Tensor, levels: int, noise: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Return codes (uint8) and grid [2, G] (step, beta); ``noise`` is (key, call) or nearest."""
    codes = torch.empty(x.size, dtype=torch.uint8, device=x.data.device)
    grid = torch.empty_like(bounds, memory_format=torch.contiguous_format)
    key, call = noise or (0, 0)
    _pack[(triton.cdiv(x.size, _BLOCK),)](
        x.data, bounds.contiguous(), grid, codes, x.size, x.stride, float(levels), _FLAT, key, call,
        GROUPS=x.groups, SPAN=triton.next_power_of_2(x.groups), INNER=x.inner,
        NOISY=noise is not None, WIDE=_wide(x), BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, grid


def unpack(codes: Grouped, grid: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``codes * step + beta``, flat, in ``dtype``."""
    out = torch.empty(codes.size, dtype=dtype, device=codes.data.device)
    _unpack[(triton.cdiv(codes.size, _BLOCK),)](
        codes.data, grid, out, codes.size,
        GROUPS=codes.groups, INNER=codes.inner, WIDE=_wide(codes), BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return out
