"""A finished model as an ONNX graph, through ``torch.onnx.export(dynamo=True)``."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset19
from torch import Tensor, nn

from gossamer.core.errors import ModelError, RecipeError
from gossamer.ops import grids  # noqa: F401 - registers the operators translated below

__all__ = ["DEFAULT_OPSET", "INPUT", "OPSETS", "OUTPUT", "trace", "write"]

DEFAULT_OPSET = 20
"""Newest opset that both runtimes read in releases of several years; newer ones ran no faster (int8_layout.md)."""
OPSETS = (20, 23)
"""Oldest and newest opset that can be asked for."""
INPUT, OUTPUT = "image", "logits"
_TWO_GIB = 2**31


def _quantize(  # noqa: PLR0913 - the operator's own arguments
    x: Any, scale: Any, zero_point: Any, axis: int, dtype: Any, low: Any = None, high: Any = None
) -> Any:  # dtype follows from zero_point
    codes: Any = opset19.QuantizeLinear(x, scale, zero_point, axis=axis)
    if low is None or high is None:
        return codes
    return opset19.Clip(codes, opset19.CastLike(low, zero_point), opset19.CastLike(high, zero_point))


def _dequantize(q: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    return opset19.DequantizeLinear(q, scale, zero_point, axis=axis)


def _translations() -> dict[Any, Any]:
    ops = torch.ops.gossamer
    return {ops.quantize.default: _quantize, ops.dequantize.default: _dequantize}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress lines and its warnings about its own deprecations."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [log.level for log in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for log in loggers:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)


def trace(model: nn.Module, example: Tensor, *, dynamic: bool = False, opset: int = DEFAULT_OPSET) -> ir.Model:
    """Trace ``model`` in evaluation mode.

    Args:
        model: Finished model: one image batch in, logits out.
        example: Images [B, C, H, W].
        dynamic: Leave the batch free (``example`` then holds at least 2 images).
        opset: ONNX operator set.

    Raises:
        RecipeError: An opset that is not supported.
        ModelError: The exporter cannot trace the model; says why.
    """
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise RecipeError(f"export: opset={opset}; allowed are {OPSETS[0]}..{OPSETS[1]}")
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model, (example,), dynamo=True, opset_version=opset, custom_translation_table=_translations(),
                dynamic_shapes=shapes, input_names=[INPUT], output_names=[OUTPUT], verbose=False,
            )  # fmt: skip
    except Exception as err:
        lines = [s.strip() for s in str(err.__cause__ or err).splitlines() if s.strip()]
        kind = "a free batch" if dynamic else f"batch {example.shape[0]}"
        raise ModelError(f"{type(model).__name__} cannot be exported with {kind}: {' '.join(lines[:2])[:300]}") from err
    if program is None:
        raise ModelError(f"{type(model).__name__} cannot be exported: the exporter returned nothing")
    return program.model


def write(graph: ir.Model, path: Path) -> None:
    """Write a traced graph; weights beyond 2 GiB go into a second file beside it.

    Raises:
        ModelError: The graph is not valid ONNX.
    """
    size = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value is not None)
    ir.save(graph, path, external_data=f"{path.name}.data" if size > 0.95 * _TWO_GIB else None)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as err:
        raise ModelError(f"{path}: not a valid ONNX graph: {str(err).splitlines()[0]}") from err
