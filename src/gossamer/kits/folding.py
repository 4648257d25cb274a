"""Batch norms folded into the layers before them, in float or deployed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.models.contracts import replace_module
from gossamer.ops.adder_layers import Int8AdderConv2d
from gossamer.ops.int8 import Int8Conv2d, Int8Linear

__all__ = ["fold_norms", "left_of"]


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return gain and shift [C] of a batch norm in evaluation mode, in double precision."""
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    shift = -gain * norm.running_mean.double()
    return gain, shift if norm.bias is None else shift + norm.bias.double()


def left_of(norm: nn.Module) -> nn.Module:
    """Return what a norm does after normalising: nothing, or the activation that timm puts inside."""
    left = [m for m in norm.children() if not isinstance(m, nn.Identity)]
    return left[0] if len(left) == 1 else nn.Sequential(*left) if left else nn.Identity()


@torch.no_grad()
def fold_norms(model: nn.Module, pairs: Sequence[Sequence[str]]) -> nn.Module:
    """Fold batch norms into the layers they follow, in place; each leaves its activation behind, or nothing.

    Outputs in evaluation mode stay the same up to rounding. Deployed layers need a bias and one weight
    step per row.

    Args:
        model: The model.
        pairs: ``[layer, batch norm]`` module paths, as ``kits.dataflow`` finds them.

    Raises:
        ModelError: A path is missing or of another kind, or the layer cannot take the norm.
    """
    for name, norm_name in pairs:
        try:
            layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
        except AttributeError as err:
            raise ModelError(f"folding {norm_name!r} into {name!r}: {err}; fold the model it was found in") from None
        if getattr(norm, "running_var", None) is None:
            raise ModelError(f"folding {norm_name!r}: a {type(norm).__name__} without running statistics cannot be")
        gain, shift = _affine(norm)
        if isinstance(layer, Int8Conv2d | Int8Linear | Int8AdderConv2d):
            layer.scale_outputs(gain.float(), shift.float())
        else:
            _scale_rows(layer, gain, shift)
        replace_module(model, norm_name, left_of(norm))
    return model


def _scale_rows(layer: Any, gain: Tensor, shift: Tensor) -> None:
    weight = layer.weight
    rows = gain.reshape(-1, *[1] * (weight.dim() - 1))
    bias = shift if layer.bias is None else shift + gain * layer.bias.double()
    layer.weight = nn.Parameter((weight.double() * rows).to(weight), requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(weight), requires_grad=weight.requires_grad)
