"""Proof that an exported graph computes what the torch model computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, RunError
from gossamer.export.artefact import Artefact
from gossamer.ops.int8 import Int8Conv2d, Int8Linear
from gossamer.runtimes import get

__all__ = ["RUNTIMES", "TOLERANCE", "Parity", "has_int8", "parity", "sensitivity", "verify"]

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}
"""The runtime each format is meant for."""
TOLERANCE = {"float": 1e-3, "fp16": 1e-2, "int8": 2e-2}
"""Largest relative error (root mean square over that of the logits), see ``verify`` for 8 bits."""
_NUDGE, _MARGIN = 1e-6, 3.0
_INT8_TOP = 127
_PICTURE = 4


@dataclass(frozen=True)
class Parity:
    """How far logits are from those of torch.

    Attributes:
        max_abs: Largest absolute difference.
        scale: Largest absolute logit of torch.
        relative: Root mean square of the difference over that of torch's logits, or, of pictures, over their deviation.
        tolerance: What ``relative`` was allowed to be.
    """

    max_abs: float
    scale: float
    relative: float
    tolerance: float

    def to_json(self) -> dict[str, float]:
        """Return plain numbers."""
        return asdict(self)


def has_int8(model: nn.Module) -> bool:
    """Whether values of the model are rounded to codes: int8 weights, or layers that round their input."""
    return any(b.dtype == torch.int8 and b.numel() > 1 for b in model.buffers()) or any(
        hasattr(m, "input_bits") for m in model.modules()
    )


def parity(got: np.ndarray, want: np.ndarray, tolerance: float) -> Parity:
    """Compare logits [B, K] with those of torch; pictures [B, C, H, W] too, whose mean level proves nothing."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    rms = float(np.sqrt(np.mean(want**2))) if want.ndim < _PICTURE else float(want.std())
    return Parity(
        max_abs=float(np.abs(got - want).max()),
        scale=float(np.abs(want).max()),
        relative=float(np.sqrt(np.mean((got - want) ** 2))) / max(rms, 1e-12),
        tolerance=tolerance,
    )


def _round_biases(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Put biases on the step of their accumulators, where integer kernels keep them; return each with what it was."""
    kept = []
    for layer in model.modules():
        if not isinstance(layer, Int8Conv2d | Int8Linear) or layer.bias is None or layer.input_grid is None:
            continue
        wide = _INT8_TOP // int(layer.weight.int().abs().max().clamp_min(1))  # the export lets narrow codes fill int8
        step = layer.weight_scale / max(1, wide) * layer.input_grid.scale
        kept.append((layer.bias, layer.bias.clone()))
        layer.bias.copy_(torch.round(layer.bias / step) * step)
    return kept


def sensitivity(model: nn.Module, images: Tensor) -> float:
    """Return the relative change of the logits by what correct implementations may do differently.

    What enters the 8-bit layers changes by a millionth, and their biases are rounded as runtimes round
    them. A value on the border of two codes may fall to either side, and later layers amplify that, most
    on grids of few bits: two correct implementations of a deep 8-bit model differ by about this much.
    (Nudging the images would show nothing: pixels sit in the middle of their codes.)
    """
    draw = torch.Generator().manual_seed(1)

    def nudge(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a * (1 + _NUDGE * torch.randn(a.shape, generator=draw)) for a in args)

    with torch.no_grad():
        want = model(images)
        handles = [m.register_forward_pre_hook(nudge) for m in model.modules() if hasattr(m, "input_bits")]
        kept = _round_biases(model)
        try:
            got = model(images)
        finally:
            for handle in handles:
                handle.remove()
            for bias, value in kept:
                bias.copy_(value)
    return parity(got.numpy(), want.numpy(), 0.0).relative


def verify(
    artefact: Artefact,
    model: nn.Module,
    images: Tensor,
    *,
    runtime: str | None = None,
    precision: str = "f32",
    tolerance: float | None = None,
) -> Parity:
    """Run the graph and the model on the same images.

    Args:
        artefact: The export.
        model: The model it was made from, in evaluation mode, on the CPU, in float32.
        images: Preprocessed images [B, C, H, W], B as exported.
        runtime: A runtime that reads the graph; the format's own by default.
        precision: Dense precision of the runtime.
        tolerance: Largest relative error; by default ``TOLERANCE`` for this kind of graph, in 8 bits
            plus three times the model's own ``sensitivity`` to rounding.

    Raises:
        RunError: The error is larger, or not a number.
        ModelError: The model is in training mode.
    """
    name = runtime or RUNTIMES[artefact.format]
    kind = "int8" if artefact.int8 else "fp16" if artefact.fp16 else "float"
    if model.training:
        raise ModelError("verify: the model is in training mode; call model.eval() first")
    allowed = TOLERANCE[kind] if tolerance is None else tolerance
    if artefact.int8 and tolerance is None:
        allowed += _MARGIN * sensitivity(model, images)
    with torch.no_grad():
        want = model(images).float().numpy()
    got = get(name).load(artefact.graph, precision=precision).run(images.numpy())
    found = parity(got, want, allowed)
    if not found.relative <= allowed:
        raise RunError(
            f"export to {artefact.graph}: {name} differs from torch by {found.relative:.2g} of the logits "
            f"(largest {found.max_abs:.3g} at a scale of {found.scale:.3g}); allowed is {allowed:g}"
        )
    return found
