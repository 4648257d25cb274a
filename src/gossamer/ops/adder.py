"""Adder convolutions: ``-sum |x - w|^p`` in place of products (arXiv 1912.13200 eq. 2, 2105.14202).

Native code (``kernels.adder_cpu``) on the CPU and Triton (``kernels.adder_gpu``) on GPUs where they are there, plain
torch otherwise. Written from the papers' formulas; huawei-noah/AdderNet served as an oracle only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.nn.modules.utils import _pair

from gossamer.core.errors import ModelError
from gossamer.kernels import adder_cpu, adder_gpu
from gossamer.kernels.adder_shape import RULES, AdderShape
from gossamer.ops.grids import dequantize, quantize
from gossamer.ops.steps import StepKind, register_steps

__all__ = [
    "GRADIENTS",
    "adder_conv2d",
    "adder_conv2d_codes",
    "adder_linear",
    "plain_codes",
    "plain_forward",
    "plain_input_grad",
    "plain_weight_grad",
    "rules_of",
]

GRADIENTS = ("full", "lp", "sign")
"""``full``: x - w for filters, clamp(w - x, -1, 1) for the input (eq. 5, 6); ``lp``: the derivatives of |x - w|^p, the
input's clamped; ``sign``: those of |x - w|."""
_DIFFERENCE = RULES[0]


def rules_of(gradient: str, clip: bool = True) -> tuple[str, str]:
    """Return what stands for the difference in the gradients of input and filters, names of ``RULES``.

    Args:
        gradient: One of ``GRADIENTS``.
        clip: Clamp the gradient of the input to [-1, 1] (HardTanh); signs are within anyway.

    Raises:
        ModelError: Another name.
    """
    if gradient == "full":
        return "clamp" if clip else "difference", "difference"
    if gradient == "lp":
        return "clamped_power" if clip else "power", "power"
    if gradient == "sign":
        return "sign", "sign"
    raise ModelError(f"adder layer: gradient={gradient!r}; allowed are {', '.join(GRADIENTS)}")


# -- plain torch, the reference --------------------------------------------------------------------
def _columns(x: Tensor, shape: AdderShape) -> Tensor:
    """Return what lies under the filters, [N, C * kh * kw, H' * W']."""
    return F.unfold(x, shape.kernel, padding=shape.padding, stride=shape.stride)


def _ruled(d: Tensor, rule: str, p: float) -> Tensor:
    if rule == "difference":
        return d
    if rule == "clamp":
        return d.clamp(-1, 1)
    if rule == "sign":
        return d.sign()
    derived = p * d.sign() * d.abs().pow(p - 1)
    return derived.clamp(-1, 1) if rule == "clamped_power" else derived


def plain_forward(x: Tensor, weight: Tensor, shape: AdderShape, p: float) -> Tensor:
    """Return the output of ``adder_conv2d``, from torch's pairwise distances."""
    distance = torch.cdist(_columns(x, shape).transpose(1, 2).contiguous(), weight.flatten(1), p=p)
    power = distance if p == 1 else distance.pow(p)
    return shape.empty_output(x).copy_(power.transpose(1, 2).reshape(shape.batch, shape.filters, *shape.out)).neg_()


def plain_input_grad(grad: Tensor, x: Tensor, weight: Tensor, shape: AdderShape, rule: str, p: float) -> Tensor:
    """Return the gradient of the input, filter by filter: memory of one unfolded input."""
    columns, flat = _columns(x, shape), grad.flatten(2)
    total = torch.zeros_like(columns)
    for o, filter in enumerate(weight.flatten(1)):
        total += flat[:, o : o + 1] * _ruled(filter[:, None] - columns, rule, p)
    return F.fold(total, x.shape[2:], shape.kernel, padding=shape.padding, stride=shape.stride)


def plain_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, shape: AdderShape, rule: str, p: float) -> Tensor:
    """Return the gradient of the filters, one by one."""
    columns, flat = _columns(x, shape), grad.flatten(2)
    rows = [
        (flat[:, o : o + 1] * _ruled(columns - filter[:, None], rule, p)).sum((0, 2))
        for o, filter in enumerate(weight.flatten(1))
    ]
    return torch.stack(rows).view_as(weight)


# -- differences alone are linear: two ordinary convolutions, on any device ------------------------
def _difference_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, shape: AdderShape) -> Tensor:
    """``sum g (x - w) = g * x - w sum g``."""
    products = conv2d_weight(x, list(weight.shape), grad, stride=shape.stride, padding=shape.padding)
    return products - weight * grad.sum((0, 2, 3)).view(-1, 1, 1, 1)


def _difference_input_grad(grad: Tensor, x: Tensor, weight: Tensor, shape: AdderShape) -> Tensor:
    """``sum g (w - x) = g * w - x sum g``, the sum over the filters that meet a pixel."""
    geometry: Any = {"stride": shape.stride, "padding": shape.padding}
    products = conv2d_input(list(x.shape), weight, grad, **geometry)
    ones = torch.ones_like(weight[:1, :1])
    met = conv2d_input([shape.batch, 1, *x.shape[2:]], ones, grad.sum(1, keepdim=True), **geometry)
    return products - x * met


# -- operators -------------------------------------------------------------------------------------
def _check(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> AdderShape:
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ModelError(
            f"adder convolution: input {list(x.shape)} and filters {list(weight.shape)}; expected [N, C, H, W] and "
            f"[O, C, kh, kw] (no groups)"
        )
    shape = AdderShape.of(x, weight, stride, padding)
    if min(shape.out) < 1:
        raise ModelError(
            f"adder convolution: input of {shape.height} x {shape.width} with padding {list(padding)} is smaller than "
            f"the filters of {shape.kernel[0]} x {shape.kernel[1]}; pad it"
        )
    return shape


def _kernels(*tensors: Tensor) -> Any:
    """Return the module of kernels that works on these tensors, or ``None``."""
    if adder_cpu.takes(*tensors):
        return adder_cpu
    return adder_gpu if adder_gpu.takes(*tensors) else None


@torch.library.custom_op("gossamer::adder_conv2d", mutates_args=())
def _adder_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    p: float,
    input_rule: str,
    weight_rule: str,
) -> Tensor:
    shape, kernels = _check(x, weight, stride, padding), _kernels(x, weight)
    if kernels is not None:
        return kernels.forward(x, weight, shape, p)
    return plain_forward(x, weight, shape, p)


@_adder_conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    p: float,
    input_rule: str,
    weight_rule: str,
) -> Tensor:
    return _check(x, weight, stride, padding).empty_output(x)


@torch.library.custom_op("gossamer::adder_conv2d_input_grad", mutates_args=())
def _input_grad(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], rule: str, p: float
) -> Tensor:
    shape = AdderShape.of(x, weight, stride, padding)
    out = torch.empty_like(x)
    if rule == _DIFFERENCE:
        return out.copy_(_difference_input_grad(grad, x, weight, shape))
    kernels = _kernels(grad, x, weight)
    if kernels is not None:
        return kernels.input_grad(grad, x, weight, shape, rule, p)
    return out.copy_(plain_input_grad(grad, x, weight, shape, rule, p))


@_input_grad.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], rule: str, p: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("gossamer::adder_conv2d_weight_grad", mutates_args=())
def _weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], rule: str, p: float
) -> Tensor:
    shape = AdderShape.of(x, weight, stride, padding)
    if rule == _DIFFERENCE:
        return _difference_weight_grad(grad, x, weight, shape).contiguous()
    kernels = _kernels(grad, x, weight)
    if kernels is not None:
        return kernels.weight_grad(grad, x, weight, shape, rule, p)
    return plain_weight_grad(grad, x, weight, shape, rule, p)


@_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], rule: str, p: float) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *rest = inputs
    ctx.save_for_backward(x, weight)
    ctx.rest = rest


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    stride, padding, p, input_rule, weight_rule = ctx.rest
    to_input = _input_grad(grad, x, weight, stride, padding, input_rule, p) if ctx.needs_input_grad[0] else None
    to_weight = _weight_grad(grad, x, weight, stride, padding, weight_rule, p) if ctx.needs_input_grad[1] else None
    return to_input, to_weight, None, None, None, None, None


_adder_conv2d.register_autograd(_backward, setup_context=_keep)


def plain_codes(
    x: Tensor, codes: Tensor, shape: AdderShape, step: float, zero: int, affine: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the output of ``adder_conv2d_codes``; sums of codes stay below 2^24, where float32 is exact."""
    ours = (torch.round(x / step) + zero).clamp(0, 255)
    height, width = shape.padding
    ours = F.pad(ours, (width, width, height, height), value=float(zero))
    sums = -plain_forward(ours, codes.to(x.dtype), shape._replace(
        height=shape.height + 2 * height, width=shape.width + 2 * width, padding=(0, 0)
    ), 1.0)  # fmt: skip
    gain, shift = (t.view(1, -1, 1, 1) for t in affine)
    return shape.empty_output(x).copy_(shift - gain * sums)


# defined without ``custom_op``, whose layers for autograd cost more than a small product
_LIBRARY = torch.library.Library("gossamer", "FRAGMENT")
_LIBRARY.define(
    "adder_conv2d_codes(Tensor x, Tensor codes, int[] stride, int[] padding, float step, int zero, Tensor gain, "
    "Tensor shift) -> Tensor"
)


def _adder_conv2d_codes(  # noqa: PLR0913 - the operator's own arguments
    x: Tensor,
    codes: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    step: float,
    zero: int,
    gain: Tensor,
    shift: Tensor,
) -> Tensor:
    shape = _check(x, codes, stride, padding)
    run = adder_cpu.forward_codes if adder_cpu.takes(x, gain, shift) else plain_codes
    return run(x, codes, shape, step, zero, (gain, shift))


def _no_codes(x: Tensor, codes: Tensor, stride: Sequence[int], padding: Sequence[int], *_: Any) -> Tensor:
    return _check(x, codes, stride, padding).empty_output(x)


_LIBRARY.impl("adder_conv2d_codes", _adder_conv2d_codes, "CompositeExplicitAutograd")
torch.library.register_fake("gossamer::adder_conv2d_codes", _no_codes, lib=_LIBRARY)


def _pairs(x: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], *_: Any) -> int:
    sizes = AdderShape(x[0], x[1], x[2], x[3], weight[0], (weight[2], weight[3]), _two(stride), _two(padding))
    return sizes.pairs


def _two(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


for _op in (torch.ops.gossamer.adder_conv2d, torch.ops.gossamer.adder_conv2d_codes):
    register_steps(_op, _pairs, StepKind(multiplications=0, additions=2))  # a difference, and its magnitude summed


# -- for users -------------------------------------------------------------------------------------
_WRITTEN_OUT = 2**28
"""Most bytes of one intermediate result of a layer written out in standard operators."""


def _standard_operators(x: Tensor, weight: Tensor, shape: AdderShape) -> Tensor:
    """Return the output for p = 1 tap by tap, in operators that every runtime has; slow, and large in memory."""
    need = 4 * shape._replace(batch=1).pairs // (shape.kernel[0] * shape.kernel[1])
    if need > _WRITTEN_OUT:
        raise ModelError(
            f"no runtime has an adder kernel; in standard operators filters {list(weight.shape)} on {shape.height} x "
            f"{shape.width} need {need / 2**20:.0f} MiB an image, at most {_WRITTEN_OUT / 2**20:.0f}. Run the model in "
            f"torch, where gossamer's kernels are used"
        )
    (height, width), (rows, cols) = shape.stride, shape.out
    x = F.pad(x, (shape.padding[1], shape.padding[1], shape.padding[0], shape.padding[0]))
    total: Tensor | None = None
    for u in range(shape.kernel[0]):
        for v in range(shape.kernel[1]):
            seen = x[:, None, :, u : u + height * (rows - 1) + 1 : height, v : v + width * (cols - 1) + 1 : width]
            part = (seen - weight[None, :, :, u, v, None, None]).abs().sum(2)
            total = part if total is None else total + part
    assert total is not None  # noqa: S101 - a filter has a tap
    return -total


def adder_conv2d(  # noqa: PLR0913 - the geometry, then what is summed and how it learns
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    *,
    p: float = 1.0,
    gradient: str = "full",
    clip: bool = True,
) -> Tensor:
    """Return ``Y[n,o,i,j] = -sum_{c,u,v} |X[n,c,i s + u,j s + v] - F[o,c,u,v]|^p``.

    arXiv 2105.14202; p = 1: 1912.13200 eq. 2.
    Zero padding is part of X: a padded pixel contributes |F|^p. Half precision is summed, and returned, in float32:
    sums reach thousands. While a model is exported, the layer is written out in standard operators (p = 1).

    Args:
        x: Input [N, C, H, W].
        weight: Filters [O, C, kh, kw].
        stride: Stride, or (vertical, horizontal).
        padding: Zeros on each side, or (vertical, horizontal).
        p: Exponent, 1..2.
        gradient: Surrogate gradients, see ``GRADIENTS`` and ``rules_of``.
        clip: Clamp the derivative with respect to the input to [-1, 1].

    Raises:
        ModelError: Shapes, exponent or gradient not as above.
    """
    if not 1.0 <= p <= 2.0:
        raise ModelError(f"adder convolution: p={p}; allowed are 1..2")
    if torch.float64 not in (x.dtype, weight.dtype):
        x, weight = x.float(), weight.float()
    strides, paddings = list(_pair(stride)), list(_pair(padding))
    if torch.compiler.is_exporting():
        return _standard_operators(x, weight, _check(x, weight, strides, paddings))
    return _adder_conv2d(x, weight, strides, paddings, float(p), *rules_of(gradient, clip))


def adder_linear(x: Tensor, weight: Tensor, *, p: float = 1.0, gradient: str = "full", clip: bool = True) -> Tensor:
    """Return ``-sum_i |x_i - w_oi|^p`` [..., O] of x [..., I] and weight [O, I]; see ``adder_conv2d``."""
    if x.shape[-1] != weight.shape[-1] or weight.dim() != 2:
        raise ModelError(
            f"adder layer: input {list(x.shape)} and weight {list(weight.shape)}; expected [..., I] and [O, I]"
        )
    pixels = x.reshape(-1, x.shape[-1], 1, 1)
    out = adder_conv2d(pixels, weight[:, :, None, None], p=p, gradient=gradient, clip=clip)
    return out.reshape(*x.shape[:-1], len(weight))


def adder_conv2d_codes(  # noqa: PLR0913 - as the convolution, and the grid
    x: Tensor,
    codes: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    step: float,
    zero: int,
    gain: Tensor,
    shift: Tensor,
) -> Tensor:
    """Return ``shift - gain * sum |q(x) - codes|`` with ``q(x) = clamp(round(x / step) + zero, 0, 255)``.

    One grid serves input and filters: the common zero cancels in every difference, so that bytes are subtracted.
    Exact in integers; without gradient.

    Args:
        x: Input [N, C, H, W] float.
        codes: Filters [O, C, kh, kw] uint8 on the same grid.
        stride: Vertical and horizontal.
        padding: Vertical and horizontal.
        step: Value of one code.
        zero: Code of 0, 0..255.
        gain: Float [O], the step included.
        shift: Float [O].
    """
    if torch.compiler.is_exporting():
        scale, point = x.new_tensor([step]), torch.tensor([zero], dtype=torch.uint8, device=x.device)
        x = dequantize(quantize(x, scale, point, 0, torch.uint8), scale, point, 0)
        sums = _standard_operators(x, (codes.to(x.dtype) - zero) * step, _check(x, codes, stride, padding))
        return shift.view(1, -1, 1, 1) + (gain / step).view(1, -1, 1, 1) * sums
    return torch.ops.gossamer.adder_conv2d_codes(x, codes, stride, padding, step, zero, gain, shift)
