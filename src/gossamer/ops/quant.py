"""Uniform symmetric quantization in floating point, and the layers that search and simulate it.

The grid is that of arXiv 2106.14156 eq. 8: ``D * clip(round(x / D), -2^(b-1), 2^(b-1) - 1)``, with
one step D per tensor, per group of consecutive rows or per row. An unsigned grid
``0 .. 2^b - 1`` serves tensors without negative values. The layers below keep their float
parameters under the names of the layers they replace and compute the plain function until they
are made ``active``; the forms that hold integers are in ``ops.int8``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ModelError, RecipeError

__all__ = [
    "BITS",
    "ChannelGain",
    "QuantConv2d",
    "QuantLinear",
    "QuantMatMul",
    "code_range",
    "fake_quantize",
    "fake_quantize_ste",
    "max_scale",
    "round_ste",
    "spread_rows",
]

BITS = range(2, 17)
"""Widths that can be simulated."""
_TINY = 1e-12


def code_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """Return the smallest and largest integer code of a grid.

    Raises:
        RecipeError: ``bits`` outside 2..16.
    """
    if bits not in BITS:
        raise RecipeError(f"quantizer: bits={bits}; allowed are {BITS[0]}..{BITS[-1]}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def fake_quantize(x: Tensor, scale: Tensor, bits: int, signed: bool = True) -> Tensor:
    """Return ``x`` on the grid, in floating point (eq. 8); rounds half to even.

    The gradient is zero almost everywhere; train through ``fake_quantize_ste``.

    Args:
        x: Any shape.
        scale: Steps that broadcast with ``x``, positive.
        bits: 2..16.
        signed: Signed grid, or ``0 .. 2^bits - 1``.
    """
    low, high = code_range(bits, signed)
    return torch.clamp(torch.round(x / scale), low, high) * scale


def round_ste(x: Tensor) -> Tensor:
    """Return ``round(x)`` with the gradient of the identity (straight-through)."""
    return x + (torch.round(x) - x).detach()


def fake_quantize_ste(x: Tensor, scale: Tensor, bits: int, signed: bool = True) -> Tensor:
    """Return the values of ``fake_quantize`` with straight-through gradients.

    ``x`` receives the gradient inside the clipping range and none outside; ``scale`` receives
    ``code - x / scale`` inside and the clipped code outside (arXiv 1902.08153 eq. 3).

    Args:
        x: Any shape.
        scale: Steps that broadcast with ``x``, positive.
        bits: 2..16.
        signed: Signed grid, or ``0 .. 2^bits - 1``.
    """
    low, high = code_range(bits, signed)
    return round_ste(torch.clamp(x / scale, low, high)) * scale


def max_scale(top: Tensor, bits: int, signed: bool = True) -> Tensor:
    """Return the step that puts the magnitude ``top`` on the largest code (max-abs initialisation)."""
    return torch.clamp(top / code_range(bits, signed)[1], min=_TINY)


def spread_rows(scale: Tensor, weight: Tensor) -> Tensor:
    """Return steps [1], [groups] or [out] shaped to broadcast over ``weight`` [out, ...]."""
    rows = scale if scale.numel() == 1 else scale.repeat_interleave(weight.shape[0] // scale.numel())
    return rows.reshape(-1, *[1] * (weight.dim() - 1))


class ChannelGain(nn.Module):
    """Multiplication by one constant per channel (last axis).

    Args:
        channels: Number of channels; all gains start at 1.
    """

    gain: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x * gain``, x: [..., channels]."""
        return x * self.gain


class _QuantWeights(nn.Module):
    """What the linear layer and the convolution share.

    Args:
        source: The float layer; its parameters are adopted.
        num_scales: 1, a divisor of the output rows (groups of consecutive rows), or one per row.
        bits: Width of weights and of inputs, 2..16.
        signed: Whether the input grid is signed.
        new_bias: Create a zero bias where ``source`` has none (bias correction needs one).
    """

    weight_scale: Tensor
    input_scale: Tensor
    float_bias: Tensor | None

    def __init__(
        self,
        source: nn.Linear | nn.Conv2d,
        *,
        num_scales: int = 1,
        bits: tuple[int, int] = (8, 8),
        signed: bool = True,
        new_bias: bool = False,
    ) -> None:
        super().__init__()
        self.weight = source.weight
        rows = source.weight.shape[0]
        if num_scales < 1 or rows % num_scales:
            raise ModelError(f"{type(self).__name__}: {num_scales} weight scales for {rows} rows; use 1 or a divisor")
        for width in bits:
            code_range(width)
        self.bits, self.signed, self.active = bits, signed, False
        bias = source.bias
        if bias is None and new_bias:
            bias = nn.Parameter(source.weight.new_zeros(rows), requires_grad=source.weight.requires_grad)
        self.bias = bias
        device = source.weight.device
        self.register_buffer("weight_scale", torch.ones(num_scales, device=device))
        self.register_buffer("input_scale", torch.ones(1, device=device))
        self.register_buffer("float_bias", None if bias is None else bias.detach().clone())

    @property
    def weight_bits(self) -> int:
        """Width of the weights as computed with; 32 while inactive."""
        return self.bits[0] if self.active else 32

    @property
    def input_bits(self) -> int:
        """Width of the input as computed with; 32 while inactive."""
        return self.bits[1] if self.active else 32

    def quantized_weight(self) -> Tensor:
        """Return the weights on their grid."""
        return fake_quantize(self.weight, spread_rows(self.weight_scale, self.weight), self.bits[0])

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return input, weight and bias to compute with: quantized where active, else the plain ones."""
        if not self.active:
            return x, self.weight, self.float_bias
        return fake_quantize(x, self.input_scale, self.bits[1], self.signed), self.quantized_weight(), self.bias

    def extra_repr(self) -> str:
        shape, steps = tuple(self.weight.shape), len(self.weight_scale)
        return f"{shape}, bits={self.bits}, num_scales={steps}, active={self.active}"


class QuantLinear(_QuantWeights):
    """``nn.Linear`` whose weights and input can be put on a grid.

    A fused query/key/value layer takes ``num_scales=3``.
    """

    def __init__(self, source: nn.Linear, **options: object) -> None:
        super().__init__(source, **options)  # type: ignore[arg-type]
        self.in_features, self.out_features = source.in_features, source.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of ``x`` [..., in]."""
        return F.linear(*self.parts(x))


class QuantConv2d(_QuantWeights):
    """``nn.Conv2d`` with zero padding whose weights and input can be put on a grid.

    Raises:
        ModelError: Padding that is not a number of zeros.
    """

    def __init__(self, source: nn.Conv2d, **options: object) -> None:
        if source.padding_mode != "zeros" or isinstance(source.padding, str):
            raise ModelError(
                f"QuantConv2d: padding {source.padding!r} in mode {source.padding_mode!r}; allowed is a number "
                f"of zeros. Keep this layer in float"
            )
        super().__init__(source, **options)  # type: ignore[arg-type]
        self.in_channels, self.out_channels = source.in_channels, source.out_channels
        self.kernel_size, self.stride, self.padding = source.kernel_size, source.stride, source.padding
        self.dilation, self.groups, self.padding_mode = source.dilation, source.groups, source.padding_mode

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution [B, out, H', W'] of ``x`` [B, in, H, W]."""
        x, weight, bias = self.parts(x)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class QuantMatMul(nn.Module):
    """``a @ b`` whose operands can be put on grids; takes the place of ``ops.attention.MatMul``.

    Args:
        bits: Width of ``a`` and of ``b``, 2..16.
        signed: Whether each operand's grid is signed.
    """

    a_scale: Tensor
    b_scale: Tensor

    def __init__(self, bits: tuple[int, int] = (8, 8), signed: tuple[bool, bool] = (True, True)) -> None:
        super().__init__()
        for width in bits:
            code_range(width)
        self.bits, self.signed, self.active = bits, signed, False
        self.register_buffer("a_scale", torch.ones(1))
        self.register_buffer("b_scale", torch.ones(1))

    @property
    def weight_bits(self) -> int:
        """Width of ``b`` as computed with; 32 while inactive."""
        return self.bits[1] if self.active else 32

    @property
    def input_bits(self) -> int:
        """Width of ``a`` as computed with; 32 while inactive."""
        return self.bits[0] if self.active else 32

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of ``a`` [..., M, K] and ``b`` [..., K, N]."""
        if not self.active:
            return a @ b
        a = fake_quantize(a, self.a_scale, self.bits[0], self.signed[0])
        return a @ fake_quantize(b, self.b_scale, self.bits[1], self.signed[1])

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}, active={self.active}"
