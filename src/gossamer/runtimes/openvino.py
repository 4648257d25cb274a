"""OpenVINO on the CPU."""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gossamer.core.errors import ModelError, StateError
from gossamer.runtimes.session import OpClock, OpTime, Runtime, Session, first_line

__all__ = ["OpenVINO", "OpenVINOSession", "core", "import_openvino"]

_TELEMETRY = "openvino_telemetry"
_PRODUCTS = frozenset({"FullyConnected", "MatMul", "Convolution", "Deconvolution", "GroupConvolution"})
_FUSED = frozenset({"Subgraph", "ScaledDotProductAttention", "SDPA", "MHA", "QKVProjection", "LLMMLP"})
_PRODUCT_NAME = re.compile(r"matmul|attention|bmm|einsum", re.IGNORECASE)
_ARITHMETIC = re.compile(r"_(i8|u8|bf16|f16|f32|fp32|fp16|i32|i64|boolean)$")
_SAME = {"u8": "i8", "fp32": "f32", "fp16": "f16"}


def import_openvino() -> ModuleType:
    """Import and return ``openvino`` with its telemetry off; import it through this function only.

    OpenVINO reports to its maker on import unless the package ``openvino_telemetry`` is missing,
    in which case it uses a silent stub. So that package is hidden during the import. Where
    somebody imported OpenVINO before us, the reporter in use has its consent withdrawn.
    """
    if "openvino" not in sys.modules:
        hidden = sys.modules.get(_TELEMETRY)
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # makes its import raise ImportError
        try:
            return importlib.import_module("openvino")
        finally:
            del sys.modules[_TELEMETRY]
            if hidden is not None:
                sys.modules[_TELEMETRY] = hidden
    module = importlib.import_module("openvino")
    reporter = getattr(sys.modules.get("openvino.tools.ovc"), "telemetry", None)
    if reporter is not None and hasattr(reporter, "consent"):
        reporter.consent = False
    return module


@cache
def core() -> Any:
    """Return the process's one ``openvino.Core``; make no other.

    The CPU plugin of every Core installs a signal stack of its own and puts back the one it found when it
    goes. Two Cores that go in the order they came leave the freed stack of the first behind, and the next
    signal with a Python handler (Ctrl-C, the end of a child process) kills the process. This one stays.
    """
    return import_openvino().Core()


def _arithmetic(kernel: str) -> str:
    found = _ARITHMETIC.search(kernel.lower())
    return _SAME.get(found[1], found[1]) if found else ""


def _product_nodes(model: Any, compiled: Any) -> frozenset[str]:
    """Return the nodes of the compiled graph that hold a matrix product or convolution.

    Fused groups ("Subgraph") do not tell their kind: they count if one of the operators they were
    made of was a product in the graph as read.
    """
    named = {op.get_friendly_name() for op in model.get_ops() if op.get_type_name() in _PRODUCTS}
    found = set()
    for op in compiled.get_runtime_model().get_ops():
        facts = op.get_rt_info()
        kind, parts = facts["layerType"].value, facts["originalLayersNames"].value.split(",")
        if kind in _PRODUCTS or (
            kind in _FUSED and any(part in named or _PRODUCT_NAME.search(part) is not None for part in parts)
        ):
            found.add(op.get_friendly_name())
    return frozenset(found)


class OpenVINOSession(Session):
    """A graph compiled for the CPU, one stream."""

    runtime = "openvino"

    def __init__(self, compiled: Any, where: str, threads: int, products: frozenset[str] | None) -> None:
        """Wrap a compiled graph; ``products`` are the nodes that multiply matrices, if it is to be profiled."""
        self.where, self.threads = where, threads
        self.precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.input_shape = tuple(d.get_length() if d.is_static else None for d in compiled.input(0).partial_shape)
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._products = products
        self._clock = None if products is None else OpClock()

    def _run(self, x: np.ndarray) -> np.ndarray:
        out = self._request.infer({0: x}, share_inputs=True, share_outputs=True)[0]
        if self._clock is not None:
            self._clock.add(self._last_run())
        return np.array(out)

    def _last_run(self) -> list[OpTime]:
        ops = []
        for op in self._request.get_profiling_info():
            ms = op.real_time.total_seconds() * 1e3
            if str(op.status).endswith("EXECUTED") and ms > 0:
                kernel = op.exec_type.lower()
                product = op.node_name in (self._products or ())
                ops.append(OpTime(op.node_name, op.node_type, kernel, _arithmetic(kernel), ms, product))
        return ops

    def profile(self) -> list[OpTime]:
        """See ``Session.profile``."""
        if self._clock is None:
            raise StateError(f"openvino {self.where}: not loaded for profiling; load it with profile=True")
        return self._clock.mean()


class OpenVINO(Runtime):
    """The default CPU runtime: float32, bfloat16 where native, and int8 graphs."""

    name = "openvino"
    package = "openvino"
    suffixes = (".xml", ".onnx")
    prefers_fixed = True

    def _load(
        self, source: Any, precision: str | None, threads: int, profile: bool, batch: int | None = None
    ) -> OpenVINOSession:
        path: Path = self.find(source)
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERF_COUNT": profile,
            "INFERENCE_PRECISION_HINT": precision or self.precisions()[-1],
        }
        try:
            model = core().read_model(str(path))
            if batch is not None:
                shape = model.input(0).partial_shape
                shape[0] = batch
                model.reshape(shape)
            compiled = core().compile_model(model, "CPU", options)
        except Exception as err:
            raise ModelError(f"openvino cannot load {path}: {first_line(err)}") from err
        return OpenVINOSession(compiled, path.name, threads, _product_nodes(model, compiled) if profile else None)
