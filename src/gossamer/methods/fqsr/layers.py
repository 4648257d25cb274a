"""The learnable interval and the layers that carry it: convolutions with three, additions with one for both operands.

arXiv 2011.14265; the quantizer's rules are those of the release (billhhh/FQSR at 24cb67a), by ``ops.liq``'s functions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.ops.grids import InputKind, LayerGrids, WeightKind
from gossamer.ops.int8 import Int8Conv2d
from gossamer.ops.liq import FLOAT_BITS, clip_signed, clip_unsigned, odd_levels
from gossamer.ops.sums import Add, RoundedAdd

__all__ = ["FQAdd", "FQConv2d", "Interval", "intervals"]

STARTS = ("max", "lsq", "one")
_LEAST = 1e-6
_DEPLOYED = 8


class _Distance(torch.autograd.Function):
    """mean |x - y|; keeps no buffer of its own, both tensors are kept by the rounding already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return (x - y).abs_().mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        to_x = (x - y).sgn_().mul_(grads[0] / x.numel())
        return to_x, -to_x


class Interval(nn.Module):
    """Rounds a tensor to the levels of an interval ``[0, c]`` or ``[-c, c]`` whose end c is learned.

    While it observes it returns its input as it is and lets c follow the mean of what ``start`` asks of the first
    ``warmup`` calls. Afterwards it notes the calibration loss mean |x - Q(x)| of every call in training; neither
    side is a constant, so that inside the interval only c receives a gradient of it (release).

    Args:
        bits: 2..16, or 32 for none.
        half: Levels in ``[0, c]``; else in ``[-c, c]``.
        zero: Full range with a zero (mid-tread, two's complement); else 2^bits levels without one (the paper's).
        start: ``"max"``: mean of max |x|. ``"lsq"``: step 2 mean |x| / sqrt(codes) (arXiv 1902.08153). ``"one"``: 1.
        warmup: Calls that are observed.
        scaled: Gradient of c times 1 / sqrt(values x codes), as LSQ.
        loss: ``"l1"``, ``"l2"`` or ``""`` for none.
    """

    calls: Tensor
    unit: Tensor

    def __init__(  # noqa: PLR0913 - the switches of the paper and its baseline
        self, bits: int, half: bool, *, zero: bool = False, start: str = "max", warmup: int = 20, scaled: bool = False,
        loss: str = "l1",
    ) -> None:  # fmt: skip
        super().__init__()
        self.bits, self.unsigned, self.zero = bits, half, zero
        self.start, self.warmup, self.scaled, self.loss = start, warmup, scaled, loss
        self.clip = nn.Parameter(torch.ones(1))
        self.register_buffer("unit", torch.ones(1))
        self.register_buffer("calls", torch.zeros(1))
        self.observing = start != "one"
        self.noted: list[Tensor] = []

    @property
    def codes(self) -> int:
        """Largest code: that of c."""
        return 2 ** (self.bits - 1) - 1 if self.zero and not self.unsigned else 2**self.bits - 1

    @property
    def kind(self) -> InputKind:
        """The deployed grid."""
        return "unsigned" if self.unsigned else "signed" if self.zero else "odd"

    def step(self) -> Tensor:
        """Return the value [1] of one unit of the deployed grid."""
        return (self.clip.detach() * self.unit).abs().clamp_min(_LEAST) / self.codes

    @torch.no_grad()
    def activate(self, relative: float) -> None:
        """Round from now on; ``relative``: Adam moves c by this many learning rates times what it is now; 0: by one."""
        self.observing = False
        if relative:
            self.unit.copy_(self.clip * relative)
            self.clip.fill_(1 / relative)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Let c follow one more tensor."""
        if float(self.calls) >= self.warmup:
            return
        size = x.abs().max() if self.start == "max" else 2 * x.abs().mean() * math.sqrt(self.codes)
        mean = self.clip if float(self.calls) else torch.zeros_like(self.clip)
        self.calls += 1
        self.clip.copy_((mean + (size - mean) / self.calls).clamp_min(_LEAST))

    def levels(self, x: Tensor) -> Tensor:
        """Return ``x`` on the levels."""
        clip = (self.clip * self.unit).abs()
        if self.scaled:
            factor = 1 / math.sqrt(x.numel() * self.codes)
            clip = clip * factor + (clip * (1 - factor)).detach()
        put = clip_unsigned if self.unsigned else clip_signed if self.zero else odd_levels
        return put(x, clip, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the levels, or as it is while observing or without a width."""
        if self.bits == FLOAT_BITS:
            return x
        if self.observing:
            self.observe(x)
            return x
        y = self.levels(x)
        if self.loss and self.training and torch.is_grad_enabled():
            self.noted.append(_Distance.apply(x, y) if self.loss == "l1" else (x - y).square().mean())
        return y

    def extra_repr(self) -> str:
        return f"bits={self.bits}, half={self.unsigned}, zero={self.zero}, observing={self.observing}"


def intervals(model: nn.Module) -> list[Interval]:
    """Return the intervals of a model, shared ones once."""
    return [m for m in model.modules() if isinstance(m, Interval)]


class FQConv2d(nn.Module):
    """``nn.Conv2d`` (zero padding) whose input, weights and output are rounded.

    Args:
        source: The float layer; its parameters are adopted.
        weight: Interval of the weights.
        input: Interval of the input; ``None`` leaves it in float.
        output: Interval of the output; ``None`` leaves it in float.
        pad_first: Pad before rounding (released): the border lies on the level of 0. Else the border is 0.

    Raises:
        ModelError: Padding that is not a number of zeros.
    """

    def __init__(
        self, source: nn.Conv2d, weight: Interval, input: Interval | None, output: Interval | None,
        pad_first: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if source.padding_mode != "zeros" or isinstance(source.padding, str):
            raise ModelError(
                f"FQConv2d: padding {source.padding!r} in mode {source.padding_mode!r}; allowed is a number of zeros"
            )
        self.weight, self.bias = source.weight, source.bias
        self.in_channels, self.out_channels = source.in_channels, source.out_channels
        self.kernel_size, self.stride, self.padding = source.kernel_size, source.stride, source.padding
        self.dilation, self.groups, self.padding_mode = source.dilation, source.groups, source.padding_mode
        self.weight_interval, self.input_interval, self.output_interval = weight, input, output
        self.pad_first = pad_first

    @property
    def weight_bits(self) -> int:
        """Width of the weights."""
        return self.weight_interval.bits

    @property
    def input_bits(self) -> int:
        """Width of the input; a picture that stays in float counts as 8 bits."""
        return _DEPLOYED if self.input_interval is None else self.input_interval.bits

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution [B, out, H', W'] of ``x`` [B, in, H, W]."""
        padding: Any = self.padding
        if self.input_interval is not None:
            if self.pad_first:
                high, wide = padding
                x, padding = F.pad(x, (wide, wide, high, high)), 0
            x = self.input_interval(x)
        weight = self.weight_interval(self.weight)
        y = F.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)
        return y if self.output_interval is None else self.output_interval(y)

    @property
    def form(self) -> str:
        """Deployed form: ``"int8"``, ``"float"`` (nothing rounded) or ``"simulated"`` (9 to 16 bits stay)."""
        given = [i.bits for i in (self.weight_interval, self.input_interval, self.output_interval) if i is not None]
        if all(b == FLOAT_BITS for b in given):
            return "float"
        narrow = [self.weight_bits, 0 if self.input_interval is None else self.input_bits]
        return "int8" if max(narrow) <= _DEPLOYED else "simulated"

    def plain(self) -> nn.Conv2d:
        """Return the float layer with the weights as they are."""
        new = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,  # type: ignore[arg-type]
            self.groups, bias=self.bias is not None, device="meta",
        )  # fmt: skip
        new.weight, new.bias = self.weight, self.bias
        return new

    @torch.no_grad()
    def deployed(self) -> Int8Conv2d:
        """Return the integer layer that computes the same, without the rounding of its output."""
        inside = self.input_interval
        odd = not self.weight_interval.zero
        kind: WeightKind = "odd" if odd else "symmetric"
        level = inside is not None and inside.kind == "odd" and self.pad_first
        grids = LayerGrids(
            self.weight_bits, FLOAT_BITS if inside is None else self.input_bits, kind,
            "float" if inside is None else inside.kind, 1, "level" if level else "zero",
        )  # fmt: skip
        return Int8Conv2d.from_grids(
            self, grids, self.weight_interval.step(), None if inside is None else inside.step(),
            weight=self.weight_interval.levels(self.weight), bias=True if level else None,
        )  # fmt: skip


class FQAdd(nn.Module):
    """``Q(x) + Q(y)``: both operands on one interval, so that their integer sum needs no rescaling.

    Args:
        interval: The interval.
    """

    def __init__(self, interval: Interval) -> None:
        super().__init__()
        self.interval = interval

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of the rounded operands."""
        return self.interval(x) + self.interval(y)

    def deployed(self) -> nn.Module:
        """Return the form that ships."""
        if self.interval.bits == FLOAT_BITS:
            return Add()
        if self.interval.bits > _DEPLOYED:
            return self
        new = RoundedAdd(self.interval.bits, self.interval.kind)
        new.grid.fill("sum", self.interval.step())
        return new.to(self.interval.clip.device)
