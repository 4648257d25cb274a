"""Deployed 8-bit layers: weights held as int8, inputs put on an 8-bit grid, arithmetic in float.

In torch these layers compute on dequantized values, exactly what QuantizeLinear/DequantizeLinear
mean in ONNX; a runtime that meets the exported graph runs integer kernels instead. Activations
have one form whatever the sign: a code in 0..255 with a zero point, ``x ~ scale * (code - zero)``.
A signed symmetric grid has zero point 128, an unsigned one 0; an exporter may write the same grid
as int8 (``code - 128``) where a runtime prefers that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ModelError

__all__ = ["SIGNED_ZERO", "Int8Conv2d", "Int8Linear", "Int8MatMul", "dequantize", "quantize"]

SIGNED_ZERO = 128
"""Zero point of a signed symmetric grid."""
_RANGE = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """Return ``values`` [1] or [C] shaped to broadcast along ``axis`` of ``x``."""
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


@torch.library.custom_op("gossamer::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """Return the integer codes ``saturate(round(x / scale) + zero_point)``, as ONNX QuantizeLinear.

    Rounds half to even. Has no gradient: these layers are for inference.

    Args:
        x: Any shape, float.
        scale: Steps [1] or [C], positive.
        zero_point: Codes of zero, shape of ``scale``.
        axis: Axis of ``x`` that has C entries (ignored for one scale).
        dtype: ``torch.uint8`` or ``torch.int8``.
    """
    low, high = _RANGE[dtype]
    codes = torch.round(x.float() / _along(scale, x, axis)) + _along(zero_point, x, axis)
    return codes.clamp(low, high).to(dtype)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("gossamer::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return ``(q - zero_point) * scale`` in the dtype of ``scale``, as ONNX DequantizeLinear.

    Args:
        q: Codes, any shape, uint8 or int8.
        scale: Steps [1] or [C].
        zero_point: Codes of zero, shape of ``scale``.
        axis: Axis of ``q`` that has C entries (ignored for one scale).
    """
    return (q.to(scale.dtype) - _along(zero_point, q, axis).to(scale.dtype)) * _along(scale, q, axis)


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


def _check_bits(where: str, **bits: int) -> None:
    for name, value in bits.items():
        if not 2 <= value <= 8:
            raise ModelError(f"{where}: {name}={value}; 8-bit kernels hold 2..8 bits. Keep this layer in float")


def _scales(where: str, scale: Tensor | float, allowed: tuple[int, ...]) -> Tensor:
    """Return ``scale`` as a float vector after checking its length and sign."""
    vector = torch.as_tensor(scale, dtype=torch.float32).detach().reshape(-1).cpu().clone()
    if vector.numel() not in allowed:
        raise ModelError(f"{where}: {vector.numel()} scales; allowed are {sorted(set(allowed))}")
    if not bool((torch.isfinite(vector) & (vector > 0)).all()):
        raise ModelError(f"{where}: scale {vector.min():g}; every scale must be finite and above 0")
    return vector


def _codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return int8 codes of ``weight`` [out, ...] for ``scale`` [1], [groups] or [out]."""
    rows = scale.repeat_interleave(weight.shape[0] // scale.numel()).reshape(-1, *[1] * (weight.dim() - 1))
    top = 2 ** (bits - 1)
    codes = torch.round(weight.detach().float().cpu() / rows)
    return codes.clamp(-top, top - 1).to(torch.int8)


class _Grid(nn.Module):
    """The 8-bit grid of one activation: ``forward`` rounds a tensor to it.

    Args:
        bits: 2..8; below 8 the tensor is clipped to the narrower grid first.
        signed: Zero point 128 and codes for negative values, else 0.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int = 8, signed: bool = True) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.tensor([SIGNED_ZERO if signed else 0], dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the grid, in the dtype of ``x``."""
        if self.bits < 8:
            span = 2 ** (self.bits - 1)
            below = self.scale * torch.where(self.zero_point > 0, -span, 0)
            above = self.scale * torch.where(self.zero_point > 0, span - 1, 2 * span - 1)
            x = torch.minimum(torch.maximum(x, below), above)
        codes = quantize(x, self.scale, self.zero_point, 0, torch.uint8)
        return dequantize(codes, self.scale, self.zero_point, 0).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class _Int8Weights(nn.Module):
    """What the linear and the convolution share: int8 weights with their scales, a float bias, a grid."""

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None

    def __init__(
        self, shape: tuple[int, ...], num_scales: int, bias: bool, bits: tuple[int, int], signed: bool
    ) -> None:
        super().__init__()
        where = type(self).__name__
        _check_bits(where, weight_bits=bits[0], input_bits=bits[1])
        if num_scales < 1 or shape[0] % num_scales:
            raise ModelError(f"{where}: {num_scales} weight scales for {shape[0]} rows; allowed are 1 and its divisors")
        self.weight_bits, self.input_bits = bits
        self.num_scales = num_scales
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(1 if num_scales == 1 else shape[0]))
        zero = torch.zeros(self.weight_scale.numel(), dtype=torch.int8)
        self.register_buffer("weight_zero_point", zero, persistent=False)
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)
        self.input_grid = _Grid(bits[1], signed)

    @property
    def weight_bytes(self) -> int:
        """Bytes that the stored weights, scales and bias take."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.weight.numel() + self.weight_scale.numel() * self.weight_scale.element_size() + bias

    def dequantized_weight(self) -> Tensor:
        """Return the float weight that the codes stand for."""
        return dequantize(self.weight, self.weight_scale, self.weight_zero_point, 0)

    def _fill(self, source: nn.Linear | nn.Conv2d, weight_scale: Tensor, input_scale: Tensor | float) -> None:
        where = type(self).__name__
        rows = self.weight.shape[0]
        self.weight.copy_(_codes(source.weight, weight_scale, self.weight_bits))
        if self.weight_scale.numel() > 1:
            self.weight_scale.copy_(weight_scale.repeat_interleave(rows // weight_scale.numel()))
        else:
            self.weight_scale.copy_(weight_scale)
        self.input_grid.scale.copy_(_scales(f"{where} input", input_scale, (1,)))
        if source.bias is not None and self.bias is not None:
            self.bias.copy_(source.bias.detach())
        self.to(source.weight.device).train(source.training)


class Int8Linear(_Int8Weights):
    """``nn.Linear`` with int8 weights and an 8-bit input.

    Args:
        in_features: Input channels.
        out_features: Output channels.
        bias: Whether there is a (float) bias.
        num_scales: Weight scales: 1 (per tensor), a divisor of ``out_features`` (equal groups of
            consecutive rows, e.g. 3 for a fused q/k/v) or ``out_features`` (per channel).
        weight_bits: 2..8; fewer than 8 are stored in int8 all the same.
        input_bits: 2..8.
        signed: Whether the input has negative values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_scales: int = 1,
        weight_bits: int = 8,
        input_bits: int = 8,
        signed: bool = True,
    ) -> None:
        super().__init__((out_features, in_features), num_scales, bias, (weight_bits, input_bits), signed)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_scales(
        cls,
        source: nn.Linear,
        weight_scale: Tensor | float,
        input_scale: Tensor | float,
        *,
        signed: bool = True,
        weight_bits: int = 8,
        input_bits: int = 8,
    ) -> Int8Linear:
        """Round ``source`` to the given grids (its bias is kept as it is).

        Args:
            source: Layer with float weights [out, in].
            weight_scale: One scale, one per group of rows, or one per row [out].
            input_scale: One scale.
            signed: Whether the input has negative values (code of zero 128) or not (0).
            weight_bits: 2..8.
            input_bits: 2..8.

        Raises:
            ModelError: A scale count, scale or width that cannot be held.
        """
        out = source.out_features
        scale = _scales("Int8Linear weight", weight_scale, tuple(n for n in range(1, out + 1) if out % n == 0))
        new = cls(
            source.in_features, out, source.bias is not None, num_scales=scale.numel(),
            weight_bits=weight_bits, input_bits=input_bits, signed=signed,
        )  # fmt: skip
        new._fill(source, scale, input_scale)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of ``x`` [..., in]."""
        return F.linear(self.input_grid(x), self.dequantized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, num_scales={self.num_scales}, weight_bits={self.weight_bits}"


class Int8Conv2d(_Int8Weights):
    """``nn.Conv2d`` (zero padding) with int8 weights and an 8-bit input.

    Args:
        shape: Weight shape (out, in / groups, kernel height, kernel width).
        bias: Whether there is a (float) bias.
        stride: Stride per axis.
        padding: Padding per axis.
        dilation: Dilation per axis.
        groups: Channel groups.
        num_scales: Weight scales, as in ``Int8Linear``.
        weight_bits: 2..8.
        input_bits: 2..8.
        signed: Whether the input has negative values.
    """

    def __init__(  # noqa: PLR0913 - a convolution has that many numbers
        self,
        shape: tuple[int, int, int, int],
        bias: bool = True,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        num_scales: int = 1,
        weight_bits: int = 8,
        input_bits: int = 8,
        signed: bool = True,
    ) -> None:
        super().__init__(shape, num_scales, bias, (weight_bits, input_bits), signed)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    @classmethod
    def like(
        cls, source: nn.Conv2d, *, num_scales: int = 1, weight_bits: int = 8, input_bits: int = 8, signed: bool = True
    ) -> Int8Conv2d:
        """Return an unfilled layer of the geometry of ``source``.

        Raises:
            ModelError: Padding that is not a number of zeros.
        """
        if source.padding_mode != "zeros" or isinstance(source.padding, str):
            raise ModelError(
                f"Int8Conv2d: padding {source.padding!r} in mode {source.padding_mode!r}; "
                f"allowed is a number of zeros. Keep this layer in float"
            )
        sizes = [(int(v[0]), int(v[1])) for v in (source.stride, source.padding, source.dilation)]
        kernel = source.kernel_size
        return cls(
            (source.out_channels, source.in_channels // source.groups, kernel[0], kernel[1]), source.bias is not None,
            stride=sizes[0], padding=sizes[1], dilation=sizes[2], groups=source.groups,
            num_scales=num_scales, weight_bits=weight_bits, input_bits=input_bits, signed=signed,
        )  # fmt: skip

    @classmethod
    def from_scales(
        cls,
        source: nn.Conv2d,
        weight_scale: Tensor | float,
        input_scale: Tensor | float,
        *,
        signed: bool = True,
        weight_bits: int = 8,
        input_bits: int = 8,
    ) -> Int8Conv2d:
        """Round ``source`` to the given grids; arguments and errors as in ``Int8Linear.from_scales``."""
        out = source.out_channels
        scale = _scales("Int8Conv2d weight", weight_scale, tuple(n for n in range(1, out + 1) if out % n == 0))
        new = cls.like(source, num_scales=scale.numel(), weight_bits=weight_bits, input_bits=input_bits, signed=signed)
        new._fill(source, scale, input_scale)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution [B, out, H', W'] of ``x`` [B, in, H, W]."""
        x, weight = self.input_grid(x), self.dequantized_weight()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, stride={self.stride}, num_scales={self.num_scales}"


class Int8MatMul(nn.Module):
    """``a @ b`` with both operands on 8-bit grids; drop-in for ``ops.attention.MatMul``.

    Args:
        signed: Whether ``a`` and ``b`` have negative values (softmax output has not).
        bits: Widths of ``a`` and ``b``, 2..8.
    """

    weight_bits: int
    input_bits: int
    weight_bytes = 0

    def __init__(self, signed: tuple[bool, bool] = (True, True), bits: tuple[int, int] = (8, 8)) -> None:
        super().__init__()
        _check_bits("Int8MatMul", a_bits=bits[0], b_bits=bits[1])
        self.input_bits, self.weight_bits = bits
        self.a_grid = _Grid(bits[0], signed[0])
        self.b_grid = _Grid(bits[1], signed[1])

    @classmethod
    def from_scales(
        cls,
        a_scale: Tensor | float,
        b_scale: Tensor | float,
        *,
        signed: tuple[bool, bool] = (True, True),
        bits: tuple[int, int] = (8, 8),
    ) -> Int8MatMul:
        """Return the product whose operands have the given steps.

        Args:
            a_scale: One scale for the left operand.
            b_scale: One scale for the right operand.
            signed: Whether each operand has negative values.
            bits: Width of each operand.

        Raises:
            ModelError: A scale or width that cannot be held.
        """
        new = cls(signed, bits)
        new.a_grid.scale.copy_(_scales("Int8MatMul a", a_scale, (1,)))
        new.b_grid.scale.copy_(_scales("Int8MatMul b", b_scale, (1,)))
        return new

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of ``a`` [..., M, K] and ``b`` [..., K, N]."""
        return self.a_grid(a) @ self.b_grid(b)
