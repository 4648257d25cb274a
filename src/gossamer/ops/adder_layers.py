"""Layers of l1 distances, for training and in 8 bits (arXiv 2105.14202). Formulas are in ``ops.adder``.

Outputs are never above 0 and about K E|x - f| below it: a batch norm must follow each of these layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.ops.adder import adder_conv2d, adder_conv2d_codes, adder_linear, rules_of

__all__ = ["AdderConv2d", "AdderLinear", "Int8AdderConv2d", "SharedGrid", "shared_grid", "unfit_for_adders"]

_LEVELS = 255
_NOTE = (
    "no runtime has an adder kernel: adder layers are written out in standard operators, correct but slow; for speed "
    "run the model in torch"
)
"""What an export says of a model with such layers."""


def unfit_for_adders(conv: nn.Conv2d) -> str | None:
    """Return why a convolution cannot become an adder layer, ``None`` if it can."""
    if conv.groups != 1:
        return f"groups={conv.groups}"
    if conv.dilation != (1, 1):
        return f"dilation={conv.dilation}"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r} of mode {conv.padding_mode!r}"
    return None


class _Adder(nn.Module):
    """What the two layers share: filters drawn from N(0, 1), surrogate gradients, an exponent for training."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    export_note = _NOTE

    def __init__(self, shape: tuple[int, ...], bias: bool, p: float, gradient: str, clip: bool) -> None:
        super().__init__()
        rules_of(gradient, clip)
        self.p, self.gradient, self.clip = p, gradient, clip
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0])) if bias else None)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw filters from N(0, 1) and biases from U(0, 1), as the release does."""
        nn.init.normal_(self.weight, generator=generator)
        if self.bias is not None:
            nn.init.uniform_(self.bias, generator=generator)

    def _how(self) -> dict[str, Any]:
        return {"p": self.p if self.training else 1.0, "gradient": self.gradient, "clip": self.clip}

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, bias={self.bias is not None}, p={self.p}, gradient={self.gradient!r}"


class AdderConv2d(_Adder):
    """``nn.Conv2d`` with ``-sum |x - w|^p`` in place of products.

    Args:
        in_channels: Input channels.
        out_channels: Filters.
        kernel_size: Size, or (height, width).
        stride: Stride, or (vertical, horizontal).
        padding: Zeros on each side, or (vertical, horizontal).
        bias: Whether there is a bias (the batch norm that must follow makes it useless).
        p: Exponent in training, 1..2; in evaluation it is 1.
        gradient: ``"full"``, ``"lp"`` or ``"sign"`` (``ops.adder.GRADIENTS``); ``clip`` is an attribute.
    """

    def __init__(  # noqa: PLR0913 - those of nn.Conv2d, and two of its own
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = False,
        p: float = 1.0,
        gradient: str = "full",
    ) -> None:
        self.in_channels, self.out_channels = in_channels, out_channels
        size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        super().__init__((out_channels, in_channels, *size), bias, p, gradient, True)
        self.kernel_size: tuple[int, int] = (size[0], size[1])
        self.stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
        self.padding = (padding, padding) if isinstance(padding, int) else tuple(padding)

    @classmethod
    def like(cls, conv: nn.Conv2d, gradient: str = "full") -> AdderConv2d:
        """Return an adder layer of the geometry of ``conv`` with filters of its own.

        Raises:
            ModelError: Groups, dilation or another padding than zeros.
        """
        reason = unfit_for_adders(conv)
        if reason is not None:
            raise ModelError(f"adder layer in place of a convolution with {reason}; it has none of these")
        new = cls(
            conv.in_channels, conv.out_channels, (conv.kernel_size[0], conv.kernel_size[1]),
            (conv.stride[0], conv.stride[1]), (int(conv.padding[0]), int(conv.padding[1])), conv.bias is not None,
            gradient=gradient,
        )  # fmt: skip
        return new.to(conv.weight.device).train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, O, H', W'] of ``x`` [N, C, H, W]."""
        out = adder_conv2d(x, self.weight, self.stride, self.padding, **self._how())
        return out if self.bias is None else out + self.bias.view(1, -1, 1, 1)


class AdderLinear(_Adder):
    """``nn.Linear`` with ``-sum |x - w|^p`` in place of products; arguments as there and in ``AdderConv2d``."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, p: float = 1.0, gradient: str = "full"
    ) -> None:
        super().__init__((out_features, in_features), bias, p, gradient, True)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def like(cls, linear: nn.Linear, gradient: str = "full") -> AdderLinear:
        """Return an adder layer of the size of ``linear`` with filters of its own."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, gradient=gradient)
        return new.to(linear.weight.device).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] of ``x`` [..., I]."""
        out = adder_linear(x, self.weight, **self._how())
        return out if self.bias is None else out + self.bias


# -- 8 bits ----------------------------------------------------------------------------------------
class SharedGrid(NamedTuple):
    """The one grid of a layer's input and filters: value = step * (code - zero), codes 0..255.

    Differences need a common step; a common zero cancels in them.
    """

    step: float
    zero: int


def shared_grid(x: Tensor, weight: Tensor, candidates: int = 24) -> SharedGrid:
    """Return the grid with the least error of a difference: mean squared errors of ``x`` and ``weight`` added.

    Every difference has one input and one filter value, so that both rounding errors count alike. Ranges shrunk to
    between 1 and 0.2 of the extremes are tried (filters grow long tails: release, issue 55).

    Args:
        x: Values of the input, any shape; 0 is always on the grid (padding).
        weight: Filters, any shape.
        candidates: Ranges tried.
    """
    values = [v.detach().float().flatten() for v in (x, weight)]
    low = min(0.0, *(float(v.min()) for v in values))
    high = max(0.0, *(float(v.max()) for v in values))
    best, least = SharedGrid(max(high - low, 1e-12) / _LEVELS, 0), float("inf")
    for k in range(candidates):
        ratio = 1 - 0.8 * k / max(1, candidates - 1)
        step = max((high - low) * ratio / _LEVELS, 1e-12)
        grid = SharedGrid(step, min(_LEVELS, max(0, round(-low * ratio / step))))
        error = sum(float((_on(v, grid) - v).square().mean()) for v in values)
        if error < least:
            best, least = grid, error
    return best


def _codes(values: Tensor, grid: SharedGrid) -> Tensor:
    return (torch.round(values / grid.step) + grid.zero).clamp(0, _LEVELS)


def _on(values: Tensor, grid: SharedGrid) -> Tensor:
    return (_codes(values, grid) - grid.zero) * grid.step


class Int8AdderConv2d(nn.Module):
    """An adder convolution on bytes: input and filters on one grid, a gain and a shift for each filter after it.

    Sums are exact in integers. The batch norm behind an adder layer goes into gain and shift; it cannot go into the
    filters, as it goes into those of a convolution.

    Args:
        in_channels: Input channels.
        out_channels: Filters.
        kernel_size: (height, width).
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        grid: The grid.
    """

    weight: Tensor
    gain: Tensor
    shift: Tensor
    weight_bits = input_bits = 8
    export_note = _NOTE

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        grid: SharedGrid,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.grid = stride, padding, grid
        self.register_buffer("weight", torch.zeros((out_channels, in_channels, *kernel_size), dtype=torch.uint8))
        self.register_buffer("gain", torch.full((out_channels,), grid.step))
        self.register_buffer("shift", torch.zeros(out_channels))

    @classmethod
    def of(cls, layer: AdderConv2d, grid: SharedGrid) -> Int8AdderConv2d:
        """Round the filters of ``layer`` to ``grid``."""
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
        new = cls(*sizes, (layer.stride[0], layer.stride[1]), (layer.padding[0], layer.padding[1]), grid)
        new.weight.copy_(_codes(layer.weight.detach(), grid).to(torch.uint8))
        if layer.bias is not None:
            new.shift.copy_(layer.bias.detach())
        return new.to(layer.weight.device).train(layer.training)

    @property
    def weight_bytes(self) -> int:
        """Bytes that codes, gains and shifts take in a saved model."""
        return self.weight.numel() + 4 * (self.gain.numel() + self.shift.numel())

    @torch.no_grad()
    def scale_outputs(self, gain: Tensor, shift: Tensor) -> None:
        """Multiply the output channels by ``gain`` [out] and add ``shift`` [out], e.g. those of a BatchNorm."""
        self.gain.mul_(gain)
        self.shift.mul_(gain).add_(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, O, H', W'] of ``x`` [N, C, H, W]."""
        return adder_conv2d_codes(
            x.float(), self.weight, self.stride, self.padding, step=self.grid.step, zero=self.grid.zero,
            gain=self.gain, shift=self.shift,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, stride={self.stride}, padding={self.padding}, grid={tuple(self.grid)}"
