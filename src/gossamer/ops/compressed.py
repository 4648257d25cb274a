"""Operators that compute exactly and keep what their backward pass needs in bytes.

Mesa (arXiv 2111.11124) section 3.1: the output is that of the plain operator, bit for bit; the gradient is the
operator's usual formula at x_hat, what ``ActStore`` gives back. Nothing flows to the ranges. First derivatives only.

Every function takes the store of each tensor it may have to keep, and keeps only what the gradients asked for need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gossamer.kernels import cpu
from gossamer.ops.act_store import ActStore
from gossamer.ops.group_pack import Layout, Packed

__all__ = [
    "batch_norm",
    "conv2d",
    "elementwise",
    "gelu",
    "layer_norm",
    "linear",
    "matmul",
    "relu",
    "softmax",
]

_LEVELS = 256
_BITS = 8


def _keep(ctx: Any, tensors: tuple[Tensor | None, ...], *packed: Packed | None) -> None:
    """Save tensors and packed tensors; what is packed is freed with the graph, like anything autograd saves."""
    ctx.layouts = [None if p is None else p.layout for p in packed]
    ctx.save_for_backward(*tensors, *(t for p in packed for t in ((None, None) if p is None else (p.codes, p.grid))))


def _kept(ctx: Any, number: int) -> tuple[tuple[Tensor, ...], list[Packed | None]]:
    """Return what ``_keep`` saved; ``number`` is that of the plain tensors."""
    saved = ctx.saved_tensors
    packed = [
        None if layout is None else Packed(saved[number + 2 * i], saved[number + 2 * i + 1], layout)
        for i, layout in enumerate(ctx.layouts)
    ]
    return saved[:number], packed


def _summed_to(grad: Tensor, shape: torch.Size) -> Tensor:
    """Return a gradient summed over the dimensions that broadcasting added."""
    return grad if grad.shape == shape else grad.sum_to_size(shape)


# -- products --------------------------------------------------------------------------------------
class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, store: ActStore) -> Tensor:
        _keep(ctx, (weight,), store.pack(x) if ctx.needs_input_grad[1] else None)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (packed,) = _kept(ctx, 1)
        flat = grad.reshape(-1, grad.shape[-1])  # one product for all tokens: no gradient per image
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = (flat @ weight.to(grad.dtype)).view(*grad.shape[:-1], weight.shape[1])
        if packed is not None:
            dw = (flat.t() @ packed.values(grad.dtype).reshape(-1, weight.shape[1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = flat.sum(0)
        return dx, dw, db, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, store: ActStore) -> Tensor:
    """Return ``x W^T + b`` for ``x`` [..., C]; keeps ``x`` packed. Gradients of ``x`` and ``b`` are exact."""
    return _Linear.apply(x, weight, bias, store)


class _MatMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, store_a: ActStore, store_b: ActStore) -> Tensor:
        ctx.shapes = a.shape, b.shape
        _keep(
            ctx, (),
            _shared(a, store_a) if ctx.needs_input_grad[1] else None,
            store_b.pack(b) if ctx.needs_input_grad[0] else None,
        )  # fmt: skip
        return a @ b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, (a, b) = _kept(ctx, 0)
        da = db = None
        if b is not None:
            da = _summed_to(grad @ b.values(grad.dtype).transpose(-2, -1), ctx.shapes[0])
        if a is not None:
            db = _summed_to(a.values(grad.dtype).transpose(-2, -1) @ grad, ctx.shapes[1])
        return da, db, None, None


def _shared(x: Tensor, store: ActStore) -> Packed:
    """Return what an earlier operator packed of this very tensor, or pack it."""
    packed, version = getattr(x, "_packed_by_softmax", (None, -1))
    return packed if packed is not None and version == x._version else store.pack(x)


def matmul(a: Tensor, b: Tensor, store_a: ActStore, store_b: ActStore) -> Tensor:
    """Return ``a @ b`` for [B, H, M, K] and [B, H, K, N]; keeps both packed.

    A probability tensor that ``softmax`` put out is kept once for both.
    """
    return _MatMul.apply(a, b, store_a, store_b)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], store: ActStore
    ) -> Tensor:
        ctx.geometry, ctx.shape, ctx.dtype = geometry, x.shape, x.dtype
        _keep(ctx, (weight,), store.pack(x) if ctx.needs_input_grad[1] else None)
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (packed,) = _kept(ctx, 1)
        stride, padding, dilation, groups = ctx.geometry
        x = grad.new_empty(ctx.shape) if packed is None else packed.values(grad.dtype)  # only its shape matters for dx
        needs = list(ctx.needs_input_grad[:3])
        dx, dw, db = torch.ops.aten.convolution_backward(
            grad, x, weight.to(grad.dtype), [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, needs
        )
        return dx, dw if dw is None else dw.to(weight.dtype), db, None, None


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], store: ActStore) -> Tensor:
    """Return the convolution of ``x`` [B, C, H, W]; ``geometry``: stride, padding, dilation (pairs), groups."""
    return _Conv2d.apply(x, weight, bias, geometry, store)


# -- elementwise -----------------------------------------------------------------------------------
class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        function: Callable[[Tensor], Tensor],
        slope: Callable[[Tensor, Tensor], Tensor],
        store: ActStore,
    ) -> Tensor:
        ctx.slope = slope
        _keep(ctx, (), store.pack(x))
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, (packed,) = _kept(ctx, 0)
        if packed is None or packed.grid is None or not cpu.takes(grad):
            return ctx.slope(grad, packed.values(grad.dtype)), None, None, None  # type: ignore[union-attr]
        table = _table(packed.grid)
        table = ctx.slope(torch.ones_like(table), table)  # 256 values a group are all that x_hat can be
        layout = packed.layout
        flat = cpu.times_table(layout.flatten(grad), layout.grouped(packed.codes), table.contiguous())
        return layout.restore(flat), None, None, None


def _table(grid: Tensor) -> Tensor:
    """Return every value that x_hat can take [G, 256]."""
    codes = torch.arange(_LEVELS, device=grid.device, dtype=grid.dtype)
    return codes * grid[0].unsqueeze(1) + grid[1].unsqueeze(1)


def elementwise(
    x: Tensor, function: Callable[[Tensor], Tensor], slope: Callable[[Tensor, Tensor], Tensor], store: ActStore
) -> Tensor:
    """Return ``function(x)``; its backward pass is ``slope(grad, x_hat)``, elementwise too."""
    return _Elementwise.apply(x, function, slope, store)


def gelu(x: Tensor, store: ActStore, approximate: str = "none") -> Tensor:
    """Return GELU of ``x``; the derivative is that of the form used (``"none"``: erf, or ``"tanh"``)."""
    return elementwise(
        x,
        lambda v: F.gelu(v, approximate=approximate),
        lambda grad, v: torch.ops.aten.gelu_backward(grad, v, approximate=approximate),
        store,
    )


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, high: float) -> Tensor:
        y = F.relu(x) if high == float("inf") else F.hardtanh(x, 0.0, high)
        passes = ((y > 0) & (y < high)).view(-1).to(torch.uint8)
        passes = F.pad(passes, (0, -passes.numel() % _BITS)).view(-1, _BITS)
        places = torch.arange(_BITS, device=x.device, dtype=torch.uint8)
        ctx.save_for_backward((passes << places).sum(1, dtype=torch.uint8))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        each = bits.unsqueeze(1) >> torch.arange(_BITS, device=grad.device, dtype=torch.uint8)
        passes = (each & 1).bool().view(-1)[: grad.numel()].view(grad.shape)
        return torch.where(passes, grad, torch.zeros((), dtype=grad.dtype, device=grad.device)), None


def relu(x: Tensor, high: float = float("inf")) -> Tensor:
    """Return ``min(max(x, 0), high)``; keeps one bit per element, which is all the gradient needs."""
    return _ReLU.apply(x, high)


# -- normalisation ---------------------------------------------------------------------------------
class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, store: ActStore, input_store: ActStore | None, box: list[Packed]
    ) -> Tensor:
        y = x.softmax(dim)
        box.append(store.pack(y))
        ctx.dim, ctx.dtype = dim, x.dtype
        _keep(ctx, (), box[0], None if input_store is None else input_store.pack(x))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, (packed, _) = _kept(ctx, 0)
        assert packed is not None  # noqa: S101 - softmax always keeps its output
        if packed.grid is not None and cpu.takes(grad) and _rows_are_last(packed.layout, ctx.dim):
            layout, cols = packed.layout, packed.layout.shape[-1]
            flat = cpu.softmax_backward(layout.flatten(grad), layout.grouped(packed.codes), packed.grid, cols)
            return layout.restore(flat), None, None, None, None
        dx = torch._softmax_backward_data(grad, packed.values(grad.dtype), ctx.dim, grad.dtype)
        return dx, None, None, None, None


def _rows_are_last(layout: Layout, dim: int) -> bool:
    """Return whether the softmax ran over neighbours in memory that all belong to one group."""
    last = len(layout.shape) - 1
    return layout.identity and dim % (last + 1) == last and layout.inner % layout.shape[-1] == 0


def softmax(x: Tensor, dim: int, store: ActStore, input_store: ActStore | None = None) -> Tensor:
    """Return the softmax over ``dim``; keeps only the output, packed: ``y (g - sum(g y))`` needs no more.

    Args:
        x: Scores.
        dim: Dimension of the sum.
        store: Where the output goes.
        input_store: Keep the input too, which nothing reads (the release does).
    """
    box: list[Packed] = []
    y = _Softmax.apply(x, dim, store, input_store, box)
    if input_store is None:  # the product that follows finds it there; it lives as long as ``y`` or the graph
        y._packed_by_softmax = (box[0], y._version)
    return y


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float,
        store: ActStore,
    ) -> Tensor:  # fmt: skip
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            x = x.float()  # what autocast does for the plain operator
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.dtype = shape, x.dtype
        _keep(ctx, (weight, bias, mean, rstd), store.pack(x))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight, bias, mean, rstd), (packed,) = _kept(ctx, 4)
        assert packed is not None  # noqa: S101 - the input is always kept
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
        if packed.grid is not None and _takes_rows(grad, mean, packed.layout, ctx.shape):
            layout = packed.layout
            scale = torch.ones(ctx.shape) if weight is None else weight.float().contiguous()
            flat, dw, db = cpu.layer_norm_backward(
                layout.flatten(grad), layout.grouped(packed.codes), packed.grid, mean.view(-1), rstd.view(-1), scale
            )
            return layout.restore(flat), None, dw if needs[1] else None, db if needs[2] else None, None, None
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            grad.to(ctx.dtype), packed.values(ctx.dtype), ctx.shape, mean, rstd, weight, bias, needs
        )
        return dx, None, dw, db, None, None


def _takes_rows(grad: Tensor, mean: Tensor, layout: Layout, shape: tuple[int, ...]) -> bool:
    """Return whether the native kernel can go through rows that are normalised whole and cut into groups."""
    rows = layout.identity and len(shape) == 1 and layout.groups * layout.inner == shape[0]
    return rows and cpu.takes(grad) and mean.dtype == torch.float32


def layer_norm(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float, store: ActStore
) -> Tensor:
    """Return LayerNorm over the last dimensions; keeps the input packed, mean and deviation of the exact input."""
    return _LayerNorm.apply(x, shape, weight, bias, eps, store)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None], momentum: float, eps: float, store: ActStore,
    ) -> Tensor:  # fmt: skip
        y, mean, inverse, _, _ = torch._batch_norm_impl_index(
            x, weight, bias, *running, True, momentum, eps, torch.backends.cudnn.enabled
        )
        ctx.running, ctx.eps, ctx.dtype = running, eps, x.dtype
        _keep(ctx, (weight, mean, inverse), store.pack(x))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight, mean, inverse), (packed,) = _kept(ctx, 3)
        assert packed is not None  # noqa: S101 - the input is always kept
        dx, dw, db = torch.ops.aten.native_batch_norm_backward(
            grad.to(ctx.dtype), packed.values(ctx.dtype), weight, *ctx.running, mean, inverse, True, ctx.eps,
            list(ctx.needs_input_grad[:3]),
        )  # fmt: skip
        return dx, dw, db, None, None, None, None


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: tuple[Tensor | None, Tensor | None],
    momentum: float, eps: float, store: ActStore,
) -> Tensor:  # fmt: skip
    """Return BatchNorm by the statistics of the batch [B, C, ...], moving the running ones; keeps the input packed."""
    return _BatchNorm.apply(x, weight, bias, running, momentum, eps, store)
