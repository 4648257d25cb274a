"""Deployed layers of at most 8 bits: weights held as int8, inputs put on a grid, arithmetic in float.

In torch these layers compute on dequantized values, exactly what QuantizeLinear/DequantizeLinear
mean in ONNX; a runtime that meets the exported graph runs integer kernels instead. Any uniform grid
of ``ops.grids`` is exact. Grids whose levels lie between two codes need a correction beside the one
integer product, by linearity of ``P(input, weight)``:

    P(codes + h, W + w) = P(codes, W) + w * P(codes, 1) + h * P(1, W + w)

with h half the distance of two odd input levels (a constant) and w half that of two odd 8-bit weight
levels (the sum of what lies under the kernel, one output channel more).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.ops.grids import (
    InputGrid,
    InputKind,
    LayerGrids,
    dequantize,
    positive,
    weight_codes,
    weight_values,
)

__all__ = ["Int8Conv2d", "Int8Linear", "Int8MatMul", "int8_layer"]

_TINY = 1e-30


def _kind(signed: bool) -> InputKind:
    return "signed" if signed else "unsigned"


class _Int8Weights(nn.Module):
    """What the linear and the convolution share: int8 weights with their scales, a float bias, an input grid."""

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    unit_weight: Tensor
    unit_scale: Tensor
    unit_zero_point: Tensor
    bias: Tensor | None

    def __init__(self, shape: tuple[int, ...], bias: bool, grids: LayerGrids) -> None:
        super().__init__()
        grids.check(type(self).__name__, shape[0])
        self.grids = grids
        self.weight_bits, self.input_bits = grids.weight_bits, grids.input_bits
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(1 if grids.num_scales == 1 else shape[0]))
        zero = torch.zeros(self.weight_scale.numel(), dtype=torch.int8)
        self.register_buffer("weight_zero_point", zero, persistent=False)
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)
        self.input_grid = None if grids.input_grid == "float" else InputGrid(grids.input_bits, grids.input_grid)

    @classmethod
    @abstractmethod
    def like(cls, source: Any, grids: LayerGrids, *, bias: bool | None = None) -> Self:
        """Return an unfilled layer of the geometry of ``source``; ``bias`` overrides whether it has one."""

    @classmethod
    def from_grids(
        cls,
        source: Any,
        grids: LayerGrids,
        weight_step: Tensor | float,
        input_step: Tensor | float | None = None,
        *,
        input_zero: int | None = None,
        weight: Tensor | None = None,
        bias: bool | None = None,
    ) -> Self:
        """Round a layer to the given grids (its bias is kept as it is).

        Args:
            source: Layer with weights [out, ...], a bias or none, and the geometry of ``nn.Linear`` or ``nn.Conv2d``.
            grids: Widths and grids; ``num_scales`` may be any multiple of the number of weight steps.
            weight_step: Value of one unit of the grid, one, one per group of rows, or one per row [out].
            input_step: The same for the input; ``None`` for a float input.
            input_zero: Code of zero of an asymmetric input.
            weight: Float weights in place of those of ``source``, e.g. already rounded or normalised ones.
            bias: Whether to have a bias; as ``source`` by default.

        Raises:
            ModelError: A number of steps, step, width or grid that cannot be held.
        """
        where, values = cls.__name__, source.weight if weight is None else weight
        rows = len(values)
        step = positive(f"{where} weight", weight_step, tuple(n for n in range(1, rows + 1) if rows % n == 0))
        new = cls.like(source, grids, bias=bias)
        if grids.num_scales % step.numel():
            raise ModelError(f"{where} weight: {step.numel()} scales do not go into num_scales={grids.num_scales}")
        step = step.repeat_interleave(new.weight_scale.numel() // step.numel())
        new.weight.copy_(weight_codes(values, step, grids))
        new.weight_scale.copy_(2 * step if grids.halved else step)
        if (new.input_grid is None) != (input_step is None):
            raise ModelError(f"{where} input: step {input_step} for a {grids.input_grid} input")
        if new.input_grid is not None and input_step is not None:
            new.input_grid.fill(f"{where} input", input_step, input_zero)
        if source.bias is not None and new.bias is not None:
            new.bias.copy_(source.bias.detach())
        new._lift(where)
        return new.to(values.device).train(source.training)

    @torch.no_grad()
    def _lift(self, where: str) -> None:
        """Put what half-way levels of the input add into the bias, where it is the same for every output."""
        shift = None if self.input_grid is None else self.input_grid.shift
        if shift is None or self.grids.pads != "level":
            return
        if self.bias is None:
            raise ModelError(f"{where}: pads='level' on an odd input adds to the bias; build the layer with bias=True")
        self.bias.add_(shift * self.dequantized_weight().flatten(1).sum(1))

    @classmethod
    def from_scales(
        cls,
        source: Any,
        weight_scale: Tensor | float,
        input_scale: Tensor | float,
        *,
        signed: bool = True,
        weight_bits: int = 8,
        input_bits: int = 8,
    ) -> Self:
        """Round ``source`` to symmetric weights and a signed or unsigned input, as many steps as are given.

        Args:
            source: As in ``from_grids``.
            weight_scale: One step, one per group of rows, or one per row [out].
            input_scale: One step.
            signed: Whether the input has negative values.
            weight_bits: 2..8.
            input_bits: 2..8, from 1 without sign.

        Raises:
            ModelError: As ``from_grids``.
        """
        rows = len(source.weight)
        allowed = tuple(n for n in range(1, rows + 1) if rows % n == 0)
        steps = positive(f"{cls.__name__} weight", weight_scale, allowed)
        grids = LayerGrids(weight_bits, input_bits, "symmetric", _kind(signed), steps.numel())
        return cls.from_grids(source, grids, steps, input_scale)

    @property
    def weight_bytes(self) -> int:
        """Bytes that weights (packed to their width), scales and bias take in a saved model."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        packed = -(-self.weight.numel() * self.weight_bits // 8)
        return packed + self.weight_scale.numel() * self.weight_scale.element_size() + bias

    def dequantized_weight(self) -> Tensor:
        """Return the float weight that the codes stand for."""
        return weight_values(self.weight, self.weight_scale, self.grids)

    @torch.no_grad()
    def scale_outputs(self, gain: Tensor, shift: Tensor) -> None:
        """Multiply the output channels by ``gain`` [out] and add ``shift`` [out], e.g. those of a BatchNorm.

        Exact up to float rounding. A negative gain flips codes; the lowest code of a symmetric grid has no
        opposite and becomes the highest.

        Raises:
            ModelError: No bias, or fewer steps than rows (build the layer with ``bias=True`` and per-channel steps).
        """
        rows = len(self.weight)
        if self.bias is None or self.weight_scale.numel() != rows:
            raise ModelError(
                f"{type(self).__name__}: bias {self.bias is not None}, {self.weight_scale.numel()} scales for {rows} "
                f"rows; scaling its outputs takes bias=True and num_scales={rows}"
            )
        flip = (gain < 0).reshape(-1, *[1] * (self.weight.dim() - 1)).to(self.weight.device)
        opposite = -1 - self.weight if self.grids.halved else -self.weight.clamp_min(-127)
        if self.grids.weight_grid == "symmetric":
            opposite = opposite.clamp_max(2 ** (self.weight_bits - 1) - 1)
        self.weight.copy_(torch.where(flip, opposite, self.weight))
        self.weight_scale.mul_(gain.abs()).clamp_min_(_TINY)
        self.bias.mul_(gain).add_(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for ``x``: [..., in] -> [..., out] or [B, in, H, W] -> [B, out, H', W']."""
        weight = dequantize(self.weight, self.weight_scale, self.weight_zero_point, 0)
        if self.input_grid is None:
            half = (self.weight_scale / 2).reshape(-1, *[1] * (weight.dim() - 1))
            return self._product(x, weight + half if self.grids.halved else weight, self.bias)
        codes = self.input_grid.codes(x)
        y = self._product(codes, weight, self.bias)
        if self.grids.halved:
            y = y + self._per_channel(self.weight_scale / 2) * self._sums(codes)
        shift = self.input_grid.shift
        if shift is None or self.grids.pads == "level":
            return y
        return y + self._constant(shift * self.dequantized_weight(), x)

    def _add_unit(self, shape: tuple[int, ...]) -> None:
        """Hold the weight of ones that halved weights need."""
        if self.grids.halved:
            self.register_buffer("unit_weight", torch.ones(shape, dtype=torch.int8), persistent=False)
            self.register_buffer("unit_scale", torch.ones(1), persistent=False)
            self.register_buffer("unit_zero_point", torch.zeros(1, dtype=torch.int8), persistent=False)

    def _unit(self) -> Tensor:
        return dequantize(self.unit_weight, self.unit_scale, self.unit_zero_point, 0)

    @abstractmethod
    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product with a float weight."""

    @abstractmethod
    def _sums(self, x: Tensor) -> Tensor:
        """Return the product with a weight of ones, one output channel per channel group."""

    @abstractmethod
    def _constant(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return the product of a ``weight`` with ones of the shape of one ``x``."""

    @abstractmethod
    def _per_channel(self, values: Tensor) -> Tensor:
        """Return ``values`` [1] or [out] shaped to broadcast over the output."""


class Int8Linear(_Int8Weights):
    """``nn.Linear`` with int8 weights and an input on a grid.

    Args:
        in_features: Input channels.
        out_features: Output channels.
        bias: Whether there is a (float) bias.
        grids: Widths and grids; fewer than 8 bits are held in int8 all the same (and packed in files).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, grids: LayerGrids | None = None) -> None:
        super().__init__((out_features, in_features), bias, grids or LayerGrids())
        self.in_features, self.out_features = in_features, out_features
        self._add_unit((1, in_features))

    @classmethod
    def like(cls, source: Any, grids: LayerGrids, *, bias: bool | None = None) -> Self:
        """See ``_Int8Weights.like``."""
        return cls(source.in_features, source.out_features, source.bias is not None if bias is None else bias, grids)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _sums(self, x: Tensor) -> Tensor:
        return F.linear(x, self._unit())

    def _constant(self, weight: Tensor, x: Tensor) -> Tensor:
        return weight.sum(1)

    def _per_channel(self, values: Tensor) -> Tensor:
        return values

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.grids}"


class Int8Conv2d(_Int8Weights):
    """``nn.Conv2d`` with int8 weights and an input on a grid; zeros pad the rounded input unless the grids say other.

    Args:
        shape: Weight shape (out, in / groups, kernel height, kernel width).
        bias: Whether there is a (float) bias.
        grids: Widths and grids; fewer than 8 bits are held in int8 all the same (and packed in files).
        stride: Stride per axis.
        padding: Padding per axis.
        dilation: Dilation per axis.
        groups: Channel groups.
    """

    def __init__(  # noqa: PLR0913 - a convolution has that many numbers
        self,
        shape: tuple[int, int, int, int],
        bias: bool = True,
        grids: LayerGrids | None = None,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__(shape, bias, grids or LayerGrids())
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self._add_unit((groups, *shape[1:]))

    @classmethod
    def like(cls, source: Any, grids: LayerGrids, *, bias: bool | None = None) -> Self:
        """See ``_Int8Weights.like``.

        Raises:
            ModelError: Padding that is not a number of zeros.
        """
        if source.padding_mode != "zeros" or isinstance(source.padding, str):
            raise ModelError(
                f"Int8Conv2d: padding {source.padding!r} in mode {source.padding_mode!r}; "
                f"allowed is a number of zeros. Keep this layer in float"
            )
        sizes = [(int(v[0]), int(v[1])) for v in (source.stride, source.padding, source.dilation)]
        high, wide = source.kernel_size
        return cls(
            (source.out_channels, source.in_channels // source.groups, high, wide),
            source.bias is not None if bias is None else bias, grids,
            stride=sizes[0], padding=sizes[1], dilation=sizes[2], groups=source.groups,
        )  # fmt: skip

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _sums(self, x: Tensor) -> Tensor:
        sums, per_group = self._product(x, self._unit(), None), len(self.weight) // self.groups
        return sums if 1 in (self.groups, per_group) else sums.repeat_interleave(per_group, 1)

    def _constant(self, weight: Tensor, x: Tensor) -> Tensor:
        if not any(self.padding):
            return weight.sum((1, 2, 3)).reshape(-1, 1, 1)
        rows, columns = (self._inside(x.shape[2 + a], a).to(weight) for a in (0, 1))
        return torch.einsum("oij,hi,wj->ohw", weight.sum(1), rows, columns)

    def _inside(self, size: int, axis: int) -> Tensor:
        """Return [outputs, kernel]: whether a tap of the kernel meets the input rather than its padding."""
        pad, stride, kernel = self.padding[axis], self.stride[axis], self.weight.shape[2 + axis]
        dilation = self.dilation[axis]
        count = (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        at = torch.arange(count)[:, None] * stride - pad + torch.arange(kernel) * dilation
        return (at >= 0) & (at < size)

    def _per_channel(self, values: Tensor) -> Tensor:
        return values.reshape(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, stride={self.stride}, {self.grids}"


def int8_layer(
    source: Any,
    grids: LayerGrids,
    weight_step: Tensor | float,
    input_step: Tensor | float | None = None,
    **options: Any,
) -> Int8Linear | Int8Conv2d:
    """Return the deployed form of a linear layer or convolution, whichever ``source`` is by its weights.

    Arguments and errors as in ``Int8Linear.from_grids``.
    """
    form = Int8Conv2d if source.weight.dim() == 4 else Int8Linear
    return form.from_grids(source, grids, weight_step, input_step, **options)


class Int8MatMul(nn.Module):
    """``a @ b`` with both operands on 8-bit grids; drop-in for ``ops.attention.MatMul``.

    Args:
        signed: Whether ``a`` and ``b`` have negative values (softmax output has not).
        bits: Widths of ``a`` and ``b``, 2..8, from 1 without sign.
    """

    weight_bits: int
    input_bits: int
    weight_bytes = 0

    def __init__(self, signed: tuple[bool, bool] = (True, True), bits: tuple[int, int] = (8, 8)) -> None:
        super().__init__()
        self.input_bits, self.weight_bits = bits
        self.a_grid = InputGrid(bits[0], _kind(signed[0]))
        self.b_grid = InputGrid(bits[1], _kind(signed[1]))

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
        new.a_grid.fill("Int8MatMul a", a_scale)
        new.b_grid.fill("Int8MatMul b", b_scale)
        return new

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of ``a`` [..., M, K] and ``b`` [..., K, N]."""
        return self.a_grid(a) @ self.b_grid(b)
