"""Adder convolutions in Triton. Formulas and plain-torch references are in ``ops.adder``.

One program sums a tile of pixels times filters (or channels) in registers, one tap of one channel (or one filter, or
one pixel) at a time. Differences have no tensor cores: the bound is two plain operations a pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels.adder_shape import RULES, AdderShape
from gossamer.kernels.gpu import triton

if triton is not None:
    import triton.language as tl

__all__ = ["forward", "input_grad", "takes", "weight_grad"]

_PIXELS, _LANES, _FILTERS = 64, 32, 16
_STRETCH, _PROGRAMS = 512, 2048
"""Fewest pixels that one program of the filters' gradient sums, and about how many programs there are to be."""


def takes(*tensors: Tensor) -> bool:
    """Return whether the Triton kernels can work on these: CUDA memory, float32."""
    return triton is not None and all(x.is_cuda and x.dtype == torch.float32 for x in tensors)


if triton is not None:

    @triton.jit
    def _power(a, q):
        """``a^q`` of a >= 0, 0 at 0."""
        return tl.where(a > 0.0, tl.exp2(q * tl.log2(tl.maximum(a, 1e-30))), 0.0)

    @triton.jit
    def _ruled(d, p, RULE: tl.constexpr):  # noqa: N803 - triton's way
        """What stands for a difference; RULE counts in ``RULES``."""
        if RULE >= 2:
            sign = (d > 0.0).to(tl.float32) - (d < 0.0).to(tl.float32)
            if RULE == 2:
                d = sign
            else:
                d = p * sign * _power(tl.abs(d), p - 1.0)
        if RULE == 1 or RULE == 4:
            d = tl.minimum(tl.maximum(d, -1.0), 1.0)
        return d

    @triton.jit
    def _forward(  # noqa: PLR0913 - a kernel takes addresses and sizes one by one
        x, w, out, total, C, H, W, F, OH, OW, sn, sc, sh, sw, on, oc, oh, ow, p,
        KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
        POWER: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ):  # fmt: skip
        m = tl.program_id(0) * M + tl.arange(0, M)
        o = tl.program_id(1) * N + tl.arange(0, N)
        n, i, j = m // (OH * OW), (m // OW) % OH, m % OW
        acc = tl.zeros((M, N), dtype=tl.float32)
        for u in range(KH):
            for v in range(KW):
                h, c0 = i * SH + u - PH, j * SW + v - PW
                inside = (m < total) & (h >= 0) & (h < H) & (c0 >= 0) & (c0 < W)
                at = x + n.to(tl.int64) * sn + h * sh + c0 * sw
                for c in range(C):
                    a = tl.load(at + c * sc, mask=inside, other=0.0)
                    f = tl.load(w + ((o * C + c) * KH + u) * KW + v, mask=o < F, other=0.0)
                    d = tl.abs(a[:, None] - f[None, :])
                    if POWER:
                        d = _power(d, p)
                    acc += d
        place = out + n.to(tl.int64)[:, None] * on + i[:, None] * oh + j[:, None] * ow + o[None, :] * oc
        tl.store(place, -acc, mask=(m < total)[:, None] & (o < F)[None, :])

    @triton.jit
    def _input_grad(  # noqa: PLR0913
        g, x, w, out, total, C, H, W, F, OH, OW, gn, gc, gh, gw, sn, sc, sh, sw, on, oc, oh, ow, p,
        KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
        RULE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ):  # fmt: skip
        m = tl.program_id(0) * M + tl.arange(0, M)
        c = tl.program_id(1) * N + tl.arange(0, N)
        n, h, k = m // (H * W), (m // W) % H, m % W
        mask = (m < total)[:, None] & (c < C)[None, :]
        place = n.to(tl.int64)[:, None] * sn + h[:, None] * sh + k[:, None] * sw + c[None, :] * sc
        a = tl.load(x + place, mask=mask, other=0.0)
        acc = tl.zeros((M, N), dtype=tl.float32)
        for u in range(KH):
            for v in range(KW):
                up, left = h + PH - u, k + PW - v
                i, j = up // SH, left // SW
                meets = (m < total) & (up >= 0) & (left >= 0) & (up % SH == 0) & (left % SW == 0) & (i < OH) & (j < OW)
                at = g + n.to(tl.int64) * gn + i * gh + j * gw
                for o in range(F):
                    grad = tl.load(at + o * gc, mask=meets, other=0.0)
                    f = tl.load(w + ((o * C + c) * KH + u) * KW + v, mask=c < C, other=0.0)
                    d = f[None, :] - a
                    acc += grad[:, None] * _ruled(d, p, RULE)
        to = n.to(tl.int64)[:, None] * on + h[:, None] * oh + k[:, None] * ow + c[None, :] * oc
        tl.store(out + to, acc, mask=mask)

    @triton.jit
    def _weight_grad(  # noqa: PLR0913
        g, x, w, out, total, stretch, C, H, W, F, OH, OW, gn, gc, gh, gw, sn, sc, sh, sw, p,
        KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
        RULE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ):  # fmt: skip
        """One tap of M filters times N channels, over one stretch of the pixels; out: [stretches, filters]."""
        o = tl.program_id(0) * M + tl.arange(0, M)
        c = tl.program_id(1) * N + tl.arange(0, N)
        part, tap = tl.program_id(2) // (KH * KW), tl.program_id(2) % (KH * KW)
        u, v = tap // KW, tap % KW
        mask = (o < F)[:, None] & (c < C)[None, :]
        place = ((o[:, None] * C + c[None, :]) * KH + u) * KW + v
        f = tl.load(w + place, mask=mask, other=0.0)
        acc = tl.zeros((M, N), dtype=tl.float32)
        for m in range(part * stretch, tl.minimum(total, (part + 1) * stretch)):
            n, i, j = m // (OH * OW), (m // OW) % OH, m % OW
            h, k = i * SH + u - PH, j * SW + v - PW
            inside = (h >= 0) & (h < H) & (k >= 0) & (k < W)
            a = tl.load(x + n.to(tl.int64) * sn + h * sh + k * sw + c * sc, mask=(c < C) & inside, other=0.0)
            grad = tl.load(g + n.to(tl.int64) * gn + i * gh + j * gw + o * gc, mask=o < F, other=0.0)
            d = a[None, :] - f
            acc += grad[:, None] * _ruled(d, p, RULE)
        tl.store(out + part.to(tl.int64) * (F * C * KH * KW) + place, acc, mask=mask)


def _sizes(shape: AdderShape) -> tuple[int, ...]:
    return (shape.channels, shape.height, shape.width, shape.filters, *shape.out)


def _geometry(shape: AdderShape) -> dict[str, int]:
    names = ("KH", "KW", "SH", "SW", "PH", "PW")
    return dict(zip(names, (*shape.kernel, *shape.stride, *shape.padding), strict=True))


def forward(x: Tensor, weight: Tensor, shape: AdderShape, p: float) -> Tensor:
    """Return ``-sum |w - x|^p`` [N, O, H', W'], in the memory format of ``x``."""
    out, total = shape.empty_output(x), shape.batch * shape.out[0] * shape.out[1]
    grid = (triton.cdiv(total, _PIXELS), triton.cdiv(shape.filters, _LANES))
    _forward[grid](
        x, weight.contiguous(), out, total, *_sizes(shape), *x.stride(), *out.stride(), p,
        **_geometry(shape), POWER=p != 1, M=_PIXELS, N=_LANES,
    )  # fmt: skip
    return out


def input_grad(grad: Tensor, x: Tensor, weight: Tensor, shape: AdderShape, rule: str, p: float) -> Tensor:
    """Return ``sum_o,taps g * rule(w - x)`` of the shape of ``x``."""
    out, total = torch.empty_like(x), shape.batch * shape.height * shape.width
    grid = (triton.cdiv(total, _PIXELS), triton.cdiv(shape.channels, _LANES))
    _input_grad[grid](
        grad, x, weight.contiguous(), out, total, *_sizes(shape), *grad.stride(), *x.stride(), *out.stride(), p,
        **_geometry(shape), RULE=RULES.index(rule), M=_PIXELS, N=_LANES,
    )  # fmt: skip
    return out


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, shape: AdderShape, rule: str, p: float) -> Tensor:
    """Return ``sum_pixels g * rule(x - w)`` of the shape of ``weight``; stretches of pixels are summed in order."""
    weight, total = weight.contiguous(), shape.batch * shape.out[0] * shape.out[1]
    tiles = (triton.cdiv(shape.filters, _FILTERS), triton.cdiv(shape.channels, _FILTERS))
    taps = shape.kernel[0] * shape.kernel[1]
    parts = max(1, min(triton.cdiv(total, _STRETCH), _PROGRAMS // (tiles[0] * tiles[1] * taps)))
    out = torch.empty((parts, *weight.shape), device=weight.device)
    _weight_grad[(*tiles, taps * parts)](
        grad, x, weight, out, total, triton.cdiv(total, parts), *_sizes(shape), *grad.stride(), *x.stride(), p,
        **_geometry(shape), RULE=RULES.index(rule), M=_FILTERS, N=_FILTERS,
    )  # fmt: skip
    return out.sum(0)
