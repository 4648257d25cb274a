"""Native adder convolutions: checked calls of the extension module. Formulas and references are in ``ops.adder``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from gossamer.kernels import cpu
from gossamer.kernels.adder_shape import RULES, AdderShape

__all__ = ["forward", "forward_codes", "input_grad", "takes", "weight_grad"]

_PACKED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Filters of 8 bits as the kernels read them, by their tensor: packing costs more than a small product."""


def takes(*tensors: Tensor) -> bool:
    """Return whether the native kernels can work on these: real CPU memory, float32."""
    return cpu._native is not None and all(
        x.device.type == "cpu" and x.dtype == torch.float32 and not isinstance(x, FakeTensor) for x in tensors
    )


def forward(x: Tensor, weight: Tensor, shape: AdderShape, p: float) -> Tensor:
    """Return ``-sum |w - x|^p`` [N, O, H', W'], in the memory format of ``x``."""
    out = shape.empty_output(x)
    weight = weight.contiguous()
    cpu._native.adder_forward(
        x.data_ptr(), x.stride(), weight.data_ptr(), shape.numbers(), p, out.data_ptr(), out.stride(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def input_grad(grad: Tensor, x: Tensor, weight: Tensor, shape: AdderShape, rule: str, p: float) -> Tensor:
    """Return ``sum_o,taps g * rule(w - x)`` of the shape of ``x``."""
    out, weight = torch.zeros_like(x), weight.contiguous()
    cpu._native.adder_input_grad(
        grad.data_ptr(), grad.stride(), x.data_ptr(), x.stride(), weight.data_ptr(), shape.numbers(),
        RULES.index(rule), p, out.data_ptr(), out.stride(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, shape: AdderShape, rule: str, p: float) -> Tensor:
    """Return ``sum_pixels g * rule(x - w)`` of the shape of ``weight``."""
    weight = weight.contiguous()
    out = torch.empty_like(weight)
    cpu._native.adder_weight_grad(
        grad.data_ptr(), grad.stride(), x.data_ptr(), x.stride(), weight.data_ptr(), shape.numbers(),
        RULES.index(rule), p, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _packed(codes: Tensor, shape: AdderShape) -> Tensor:
    codes = codes.contiguous()
    key = (cpu._native.isa(), codes.data_ptr(), 0 if codes.is_inference() else codes._version)
    known = _PACKED.get(codes)
    if known is None or known[0] != key:
        numbers = shape.numbers()
        packed = torch.empty(cpu._native.adder_packed_size(numbers), dtype=torch.uint8)
        cpu._native.adder_pack_filter_codes(codes.data_ptr(), numbers, packed.data_ptr())
        known = (key, packed)
        _PACKED[codes] = known
    return known[1]


def forward_codes(
    x: Tensor, codes: Tensor, shape: AdderShape, step: float, zero: int, affine: tuple[Tensor, Tensor]
) -> Tensor:
    """Return ``shift - gain * sum |code of x - code|`` [N, O, H', W']; codes: uint8; affine: gain, shift [O]."""
    out = shape.empty_output(x)
    gain, shift = (t.contiguous() for t in affine)
    cpu._native.adder_forward_codes(
        x.data_ptr(), x.stride(), _packed(codes, shape).data_ptr(), shape.numbers(), step, float(zero),
        gain.data_ptr(), shift.data_ptr(), out.data_ptr(), out.stride(), torch.get_num_threads(),
    )  # fmt: skip
    return out
