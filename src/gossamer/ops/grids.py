"""Uniform grids of at most 8 bits: which integers stand for which values.

``quantize`` and ``dequantize`` mean exactly what QuantizeLinear and DequantizeLinear mean in ONNX, so
that an exported graph computes what these operators compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, nearest

__all__ = [
    "INPUT_GRIDS",
    "SIGNED_ZERO",
    "WEIGHT_GRIDS",
    "InputGrid",
    "InputKind",
    "LayerGrids",
    "WeightKind",
    "covering_grid",
    "dequantize",
    "pack_codes",
    "positive",
    "quantize",
    "unpack_codes",
    "weight_codes",
    "weight_values",
]

WeightKind = Literal["symmetric", "odd"]
InputKind = Literal["signed", "unsigned", "asymmetric", "odd", "float"]

WEIGHT_GRIDS = {"symmetric": range(2, 9), "odd": range(1, 9)}
"""Widths b of each grid of weights. ``symmetric``: step * m, m = -2^(b-1) .. 2^(b-1) - 1. ``odd``: step * m
with m = +-1, +-3 .. +-(2^b - 1), the 2^b levels without a zero of arXiv 2111.12273 and 2011.14265."""
INPUT_GRIDS = {
    "signed": range(2, 9),
    "unsigned": range(1, 9),
    "asymmetric": range(1, 9),
    "odd": range(1, 9),
    "float": range(32, 33),
}
"""Widths b of each grid of activations. ``signed``: as symmetric weights. ``unsigned``: step * (0 .. 2^b - 1).
``asymmetric``: step * (0 .. 2^b - 1 minus a zero point). ``odd``: as odd weights. ``float``: left as it is."""
SIGNED_ZERO = 128
"""Code of zero on a signed grid."""
_RANGE = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
_BYTE = 8
_TIE = 1e-5


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """Return ``values`` [1] or [C] shaped to broadcast along ``axis`` of ``x``."""
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


@torch.library.custom_op("gossamer::quantize", mutates_args=())
def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    dtype: torch.dtype,
    low: int | None = None,
    high: int | None = None,
) -> Tensor:
    """Return the integer codes ``saturate(round(x / scale) + zero_point)``, as ONNX QuantizeLinear.

    Rounds half to even. Has no gradient: these layers are for inference.

    Args:
        x: Any shape, float.
        scale: Steps [1] or [C], positive.
        zero_point: Codes of zero, shape of ``scale``.
        axis: Axis of ``x`` that has C entries (ignored for one scale).
        dtype: ``torch.uint8`` or ``torch.int8``.
        low: Smallest code of a grid narrower than the dtype.
        high: Largest code of such a grid.
    """
    bottom, top = _RANGE[dtype]
    codes = torch.round(x.float() / _along(scale, x, axis)) + _along(zero_point, x, axis)
    return codes.clamp(bottom if low is None else low, top if high is None else high).to(dtype)


@quantize.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    dtype: torch.dtype,
    low: int | None = None,
    high: int | None = None,
) -> Tensor:
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


def positive(where: str, scale: Tensor | float, allowed: tuple[int, ...]) -> Tensor:
    """Return steps as a float vector on the CPU after checking their number and sign.

    Raises:
        ModelError: Another number of steps than one of ``allowed``, or one that is not finite and above 0.
    """
    vector = torch.as_tensor(scale, dtype=torch.float32).detach().reshape(-1).cpu().clone()
    if vector.numel() not in allowed:
        raise ModelError(f"{where}: {vector.numel()} scales; allowed are {sorted(set(allowed))}")
    if not bool((torch.isfinite(vector) & (vector > 0)).all()):
        raise ModelError(f"{where}: scale {vector.min():g}; every scale must be finite and above 0")
    return vector


def _check(where: str, name: str, kind: str, bits: int, known: dict[str, range]) -> None:
    if kind not in known:
        raise ModelError(f"{where}: {name}_grid={kind!r}; allowed are {', '.join(known)}{nearest(kind, known)}")
    widths = known[kind]
    if bits not in widths:
        allowed = f"{widths[0]}..{widths[-1]}" if len(widths) > 1 else str(widths[0])
        raise ModelError(
            f"{where}: {name}_bits={bits}; the {kind} grid has {allowed} bits here. Keep this layer in float"
        )


@dataclass(frozen=True)
class LayerGrids:
    """Grids of a deployed layer; plain JSON through ``dataclasses.asdict``.

    Attributes:
        weight_bits: Width of the weights, see ``WEIGHT_GRIDS``.
        input_bits: Width of the input, see ``INPUT_GRIDS``; 32 for ``"float"``.
        weight_grid: ``"symmetric"`` or ``"odd"``.
        input_grid: ``"signed"``, ``"unsigned"``, ``"asymmetric"``, ``"odd"`` or ``"float"``.
        num_scales: Weight steps: 1 (per tensor), a divisor of the output rows (equal groups of consecutive
            rows, e.g. 3 for a fused q/k/v) or their number (per channel).
        pads: What a convolution meets outside of its input: ``"zero"``, or ``"level"``, the value that the grid
            rounds 0 to (inputs padded before they are rounded). On a grid without zero the latter is the cheaper
            one: what the levels lie between the codes then adds the same everywhere, and is part of the bias.
    """

    weight_bits: int = 8
    input_bits: int = 8
    weight_grid: WeightKind = "symmetric"
    input_grid: InputKind = "signed"
    num_scales: int = 1
    pads: Literal["zero", "level"] = "zero"

    def check(self, where: str, rows: int) -> None:
        """Raise ``ModelError`` where a layer of ``rows`` output rows cannot hold these grids."""
        _check(where, "weight", self.weight_grid, self.weight_bits, WEIGHT_GRIDS)
        _check(where, "input", self.input_grid, self.input_bits, INPUT_GRIDS)
        if self.num_scales < 1 or rows % self.num_scales:
            raise ModelError(
                f"{where}: {self.num_scales} weight scales for {rows} rows; allowed are 1 and the divisors of {rows}"
            )

    @property
    def halved(self) -> bool:
        """Whether odd weights are too wide for their multiples of the step to be stored as such.

        At 8 bits m reaches 255; (m - 1) / 2 is stored, and the layer adds step times the sum of its input.
        """
        return self.weight_grid == "odd" and self.weight_bits == _BYTE


def weight_codes(weight: Tensor, step: Tensor, grids: LayerGrids) -> Tensor:
    """Return the int8 codes nearest to ``weight``, shape of ``weight``.

    Args:
        weight: Float weights [out, ...].
        step: Steps [1] or [out].
        grids: The grid; odd multiples are halved as ``LayerGrids.halved`` says.
    """
    ratio = weight.detach().float().cpu() / _along(step, weight, 0)
    half = 2 ** (grids.weight_bits - 1)
    if grids.weight_grid == "symmetric":
        return torch.round(ratio).clamp(-half, half - 1).to(torch.int8)
    # counted from the lowest level, so that ties fall as in the papers' round((z + 1) / 2 * n)
    code = (torch.round((ratio + 2 * half - 1) / 2) - half).clamp(-half, half - 1)
    return (code if grids.halved else 2 * code + 1).to(torch.int8)


def weight_values(codes: Tensor, scale: Tensor, grids: LayerGrids) -> Tensor:
    """Return the float weights that stored codes [out, ...] stand for; ``scale`` [1] or [out] is theirs."""
    values = codes.to(scale.dtype)
    return (values + 0.5 if grids.halved else values) * _along(scale, codes, 0)


def covering_grid(grids: LayerGrids, step: Tensor) -> tuple[LayerGrids, Tensor]:
    """Return the symmetric 8-bit grid that covers odd 8-bit weights, and its steps.

    A deployment grid for weights whose levels lie between two codes (``LayerGrids.halved``): it saves the
    product with ones, and its rounding errors are as large as those of the odd grid but others
    (``benchmarks/int8_conv.md`` has cost and error of both). Round the float weights to it, not the odd
    levels: these lie half-way between two codes, and all would move towards zero.
    Other grids are returned as they are.

    Args:
        grids: Grids of the layer.
        step: Steps of the odd grid [1] or [out].
    """
    if not grids.halved:
        return grids, step
    return replace(grids, weight_grid="symmetric"), step * (2**_BYTE - 1) / (2 ** (_BYTE - 1) - 1)


def _lowest(grids: LayerGrids) -> tuple[int, int]:
    """Return the smallest stored code of weights and the distance of two codes."""
    half = 2 ** (grids.weight_bits - 1)
    return (1 - 2 * half, 2) if grids.weight_grid == "odd" and not grids.halved else (-half, 1)


def pack_codes(codes: Tensor, grids: LayerGrids) -> Tensor:
    """Return weight codes as a stream of ``weight_bits`` bits each, uint8 [ceil(numel * bits / 8)].

    Codes follow in the order of the tensor, lowest bit first; the last byte is filled with zeros.

    Raises:
        ModelError: A code that the grid does not have.
    """
    low, stride = _lowest(grids)
    index = codes.detach().cpu().reshape(-1).to(torch.int16).sub_(low)
    if bool(((index < 0) | (index % stride != 0) | (index // stride >= 2**grids.weight_bits)).any()):
        raise ModelError(
            f"packing: codes {int(codes.min())}..{int(codes.max())} are not all on the {grids.weight_grid} grid of "
            f"{grids.weight_bits} bits"
        )
    index = (index // stride).to(torch.uint8)
    bits = (index[:, None] >> torch.arange(grids.weight_bits, dtype=torch.uint8)) & 1
    return torch.from_numpy(np.packbits(bits.numpy().reshape(-1), bitorder="little"))


def unpack_codes(packed: Tensor, shape: Sequence[int], grids: LayerGrids) -> Tensor:
    """Undo ``pack_codes``; returns int8 codes of ``shape``.

    Raises:
        ModelError: A stream of another length.
    """
    low, stride = _lowest(grids)
    count, width = math.prod(shape), grids.weight_bits
    if packed.dtype != torch.uint8 or list(packed.shape) != [-(-count * width // 8)]:
        raise ModelError(
            f"unpacking: {packed.dtype} {list(packed.shape)} for {count} codes of {width} bits; expected torch.uint8 "
            f"[{-(-count * width // 8)}]"
        )
    bits = np.unpackbits(packed.numpy(), count=count * width, bitorder="little").reshape(count, width)
    index = torch.from_numpy(bits).to(torch.int16) @ (2 ** torch.arange(width, dtype=torch.int16))
    return (index * stride + low).to(torch.int8).reshape(tuple(shape))


class InputGrid(nn.Module):
    """The grid of one activation: ``forward`` rounds a tensor to it.

    Args:
        bits: Width.
        kind: See ``INPUT_GRIDS`` (not ``"float"``).
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int = 8, kind: InputKind = "signed") -> None:
        super().__init__()
        _check("InputGrid", "input", kind, bits, {k: v for k, v in INPUT_GRIDS.items() if k != "float"})
        self.bits, self.kind = bits, kind
        centred = kind in ("signed", "odd")
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.tensor([SIGNED_ZERO if centred else 0], dtype=torch.uint8))
        half = 2 ** (bits - 1)
        self._span = (SIGNED_ZERO - half, SIGNED_ZERO + half - 1) if centred else (0, 2 * half - 1)

    @property
    def shift(self) -> Tensor | None:
        """What ``codes`` leaves out of every value: half the distance of two odd levels, else nothing."""
        return self.scale / 2 if self.kind == "odd" else None

    def fill(self, where: str, step: Tensor | float, zero_point: int | None = None) -> None:
        """Set the step and, on an asymmetric grid, the code of zero.

        Raises:
            ModelError: A step that cannot be held, or a zero point off the grid or on a grid without one.
        """
        self.scale.copy_(positive(where, step, (1,)) * (2 if self.kind == "odd" else 1))
        if zero_point is None:
            return
        if self.kind != "asymmetric" or not 0 <= zero_point <= self._span[1]:
            raise ModelError(
                f"{where}: zero point {zero_point} on a {self.kind} grid of {self.bits} bits; allowed is "
                f"0..{2**self.bits - 1} on an asymmetric one"
            )
        self.zero_point.fill_(zero_point)

    def codes(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the grid less ``shift``: what an integer kernel multiplies."""
        if self.kind == "odd":  # a little less than half a distance: 0 is no tie, and goes up everywhere
            x = x - self.scale.to(x.dtype) * (0.5 - _TIE)
        narrow = self._span if self.bits < _BYTE else (None, None)
        codes = quantize(x, self.scale, self.zero_point, 0, torch.uint8, *narrow)
        return dequantize(codes, self.scale, self.zero_point, 0).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the grid, in the dtype of ``x``."""
        shift = self.shift
        return self.codes(x) if shift is None else self.codes(x) + shift.to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, kind={self.kind}"
