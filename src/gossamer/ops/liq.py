"""Uniform quantizers whose clips are learned (LIQ), and the trainable layers built on them.

Weights lie on a symmetric grid *without zero*: ``c (2 q / n - 1)``, ``q`` in ``0 .. n``, ``n = 2^bits - 1``: 2^bits
levels that are odd multiples of ``c / n`` (arXiv 2111.12273 section 3.1, release at 594e9c7). Inputs lie on
``c q / n`` where they have no negative values, else on the two's-complement grid of ``ops.quant``.
Rounding has the gradient of the identity; values beyond the clip give theirs to the clip alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ModelError, RecipeError
from gossamer.ops.quant import BITS

__all__ = [
    "FLOAT_BITS",
    "INPUT_GRIDS",
    "LIQConv2d",
    "LIQLinear",
    "check_width",
    "clip_signed",
    "clip_unsigned",
    "normalise_weight",
    "odd_levels",
]

FLOAT_BITS = 32
"""Width that stands for no quantization."""
INPUT_GRIDS = ("unsigned", "signed", "float")
"""Grids of an input: ``0 .. c``, ``-c .. c``, or left as it is (its declared width still counts in BOPs)."""
Widths = tuple[int, int]
"""Width of the weights and of the input."""


def check_width(bits: int, where: str = "quantizer") -> int:
    """Return ``bits`` if it can be used: 2..16, or 32 for float.

    Raises:
        RecipeError: Another width.
    """
    if bits not in BITS and bits != FLOAT_BITS:
        raise RecipeError(f"{where}: bits={bits}; allowed are {BITS[0]}..{BITS[-1]}, or {FLOAT_BITS} for float")
    return bits


class _Clip(torch.autograd.Function):
    """``c * level(clamp(x / c, low, 1))`` with straight-through rounding, in as few buffers as there can be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, steps: int, low: float, odd: bool) -> Tensor:
        z = torch.div(x, clip).clamp_(low, 1.0)
        if odd:
            z.add_(1).div_(2).mul_(steps).round_().div_(steps).mul_(2).sub_(1)
        else:
            z.mul_(steps).round_().div_(steps)
        out = z.mul_(clip)
        ctx.save_for_backward(x, clip, out)
        ctx.low = low
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, clip, out = ctx.saved_tensors
        z = x / clip
        inside = (z >= ctx.low).logical_and_(z <= 1.0)
        to_clip = torch.where(inside, torch.sub(out, x, out=z), out).mul_(grads[0]).sum() / clip
        return grads[0] * inside, to_clip.reshape(clip.shape), None, None, None


def odd_levels(x: Tensor, clip: Tensor, bits: int) -> Tensor:
    """Return ``x`` on the symmetric grid without zero, ``c (2 round(n (clamp(x / c, -1, 1) + 1) / 2) / n - 1)``.

    Args:
        x: Any shape.
        clip: Clip c, one positive number; receives ``level - x / c`` inside and +-1 outside.
        bits: Width; n = 2^bits - 1.
    """
    return _Clip.apply(x, clip, 2**bits - 1, -1.0, True)


def clip_unsigned(x: Tensor, clip: Tensor, bits: int) -> Tensor:
    """Return ``x`` on the grid ``c round(n clamp(x / c, 0, 1)) / n``, n = 2^bits - 1; arguments as ``odd_levels``."""
    return _Clip.apply(x, clip, 2**bits - 1, 0.0, False)


def clip_signed(x: Tensor, clip: Tensor, bits: int) -> Tensor:
    """Return ``x`` on the grid of ``ops.quant.fake_quantize`` with step ``c / (2^(bits-1) - 1)``.

    Codes run from ``-2^(bits-1)``, so the lowest level is one step below ``-c``. Ours: the paper clips at zero.
    """
    top = 2 ** (bits - 1) - 1
    return _Clip.apply(x, clip, top, -(top + 1) / top, False)


def normalise_weight(weight: Tensor) -> Tensor:
    """Return ``(weight - mean) / std`` over the whole tensor (std unbiased); both are constants in backward."""
    constant = weight.detach()
    return (weight - constant.mean()) / constant.std()


class _LIQWeights(nn.Module):
    """What the convolution and the linear layer share.

    ``offset`` is a tensor [as weight] added to the quantized weights. A zero leaf that requires gradients collects
    dL/dQ over any number of micro batches; a constant perturbs the quantized weights themselves.

    Args:
        source: The float layer; its parameters are adopted.
        choices: Widths (weights, input) the layer can be switched to; the first is active. Each weight width
            and each input width has a clip of its own.
        normalise: Quantize ``normalise_weight(weight)`` instead of the weights (changes their scale: for layers
            that a batch norm follows).
        inputs: One of ``INPUT_GRIDS``.

    Raises:
        RecipeError: A width out of range or an unknown grid.
    """

    def __init__(
        self,
        source: nn.Conv2d | nn.Linear,
        choices: tuple[Widths, ...] = ((4, 4),),
        *,
        normalise: bool = False,
        inputs: str = "unsigned",
    ) -> None:
        super().__init__()
        where = type(self).__name__
        if inputs not in INPUT_GRIDS or not choices:
            raise RecipeError(f"{where}: inputs={inputs!r}, choices={choices}; allowed are {INPUT_GRIDS}, one width")
        self.choices = tuple((check_width(w, where), check_width(a, where)) for w, a in choices)
        self.normalise, self.inputs = normalise, inputs
        self.weight, self.bias = source.weight, source.bias
        self._places = tuple({b: i for i, b in enumerate(dict.fromkeys(side))} for side in zip(*choices, strict=True))
        new = source.weight.detach().new_ones
        self.weight_clip = nn.Parameter(new(len(self._places[0])))
        self.input_clip = nn.Parameter(new(len(self._places[1]))) if inputs != "float" else None
        self.offset: Tensor | None = None
        self.widths = self.choices[0]
        if not normalise:
            self.weight_clip.data.fill_(max(0.8 * float(source.weight.detach().abs().max()), 1e-6))

    def select(self, widths: Widths) -> None:
        """Switch to ``widths`` (weights, input).

        Raises:
            RecipeError: Not one of the choices.
        """
        if tuple(widths) not in self.choices:
            raise RecipeError(f"{type(self).__name__}: widths {tuple(widths)}; allowed are {self.choices}")
        self.widths = (widths[0], widths[1])

    @property
    def weight_bits(self) -> int:
        """Active width of the weights."""
        return self.widths[0]

    @property
    def input_bits(self) -> int:
        """Active width of the input."""
        return self.widths[1]

    def place(self, side: str) -> int:
        """Return the index of the clip in use of ``"weight"`` or ``"input"``."""
        k = 0 if side == "weight" else 1
        return self._places[k][self.widths[k]]

    def active_clip(self, side: str) -> Tensor:
        """Return the positive clip [1] in use of ``"weight"`` or ``"input"``, with gradient.

        Raises:
            ModelError: The input is not quantized.
        """
        clips = self.weight_clip if side == "weight" else self.input_clip
        if clips is None:
            raise ModelError(f"{type(self).__name__}: the input is not quantized and has no clip")
        place = self.place(side)
        return clips[place : place + 1].abs()

    def grid_weight(self) -> Tensor:
        """Return the weights that are rounded [as weight]: normalised if so asked."""
        return normalise_weight(self.weight) if self.normalise else self.weight

    def on_grid(self, x: Tensor, side: str) -> Tensor:
        """Return ``x`` on the grid in use of ``"weight"`` or ``"input"``."""
        if side == "weight":
            return odd_levels(x, self.active_clip(side), self.widths[0])
        put = clip_unsigned if self.inputs == "unsigned" else clip_signed
        return put(x, self.active_clip(side), self.widths[1])

    def quantized_weight(self) -> Tensor:
        """Return the weights on their grid [as weight], without ``offset``."""
        return self.weight if self.widths[0] == FLOAT_BITS else self.on_grid(self.grid_weight(), "weight")

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return ``x`` on the input's grid."""
        return x if self.inputs == "float" or self.widths[1] == FLOAT_BITS else self.on_grid(x, "input")

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return input and weight to compute with."""
        weight = self.quantized_weight()
        return self.quantized_input(x), weight if self.offset is None else weight + self.offset

    def extra_repr(self) -> str:
        shape = tuple(self.weight.shape)
        return f"{shape}, widths={self.widths} of {self.choices}, normalise={self.normalise}, inputs={self.inputs}"


class LIQLinear(_LIQWeights):
    """``nn.Linear`` with quantized weights and input; arguments as ``_LIQWeights``."""

    def __init__(self, source: nn.Linear, choices: tuple[Widths, ...] = ((4, 4),), **options: Any) -> None:
        super().__init__(source, choices, **options)
        self.in_features, self.out_features = source.in_features, source.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of ``x`` [..., in]."""
        x, weight = self.operands(x)
        return F.linear(x, weight, self.bias)


class LIQConv2d(_LIQWeights):
    """``nn.Conv2d`` (zero padding) with quantized weights and input; arguments as ``_LIQWeights``.

    Raises:
        ModelError: Padding that is not a number of zeros.
    """

    def __init__(self, source: nn.Conv2d, choices: tuple[Widths, ...] = ((4, 4),), **options: Any) -> None:
        if source.padding_mode != "zeros" or isinstance(source.padding, str):
            raise ModelError(
                f"LIQConv2d: padding {source.padding!r} in mode {source.padding_mode!r}; allowed is a number of "
                f"zeros. Keep this layer in float"
            )
        super().__init__(source, choices, **options)
        self.in_channels, self.out_channels = source.in_channels, source.out_channels
        self.kernel_size, self.stride, self.padding = source.kernel_size, source.stride, source.padding
        self.dilation, self.groups, self.padding_mode = source.dilation, source.groups, source.padding_mode

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution [B, out, H', W'] of ``x`` [B, in, H, W]."""
        x, weight = self.operands(x)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
