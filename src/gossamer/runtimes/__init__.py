"""Run and time a graph: OpenVINO, ONNX Runtime, torch."""

from __future__ import annotations

from gossamer.core.errors import RecipeError, nearest
from gossamer.runtimes.device import best_dense_precisions, device_key, device_report
from gossamer.runtimes.onnxruntime import ONNXRuntime
from gossamer.runtimes.openvino import OpenVINO
from gossamer.runtimes.routed import as_recorded
from gossamer.runtimes.session import OpTime, Runtime, Session, int8_share
from gossamer.runtimes.torch_runtime import Torch

__all__ = [
    "OpTime",
    "Runtime",
    "Session",
    "all_runtimes",
    "as_recorded",
    "best_dense_precisions",
    "device_key",
    "device_report",
    "get",
    "int8_share",
]

_RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (OpenVINO(), ONNXRuntime(), Torch())}


def all_runtimes() -> dict[str, Runtime]:
    """Return every runtime by name, installed or not."""
    return dict(_RUNTIMES)


def get(name: str) -> Runtime:
    """Return the runtime called ``name``.

    Raises:
        RecipeError: No such runtime (names the nearest), or its package is missing (names the command).
    """
    if name not in _RUNTIMES:
        raise RecipeError(f"runtime {name!r}; allowed are {', '.join(_RUNTIMES)}{nearest(name, _RUNTIMES)}")
    runtime = _RUNTIMES[name]
    runtime.require()
    return runtime
