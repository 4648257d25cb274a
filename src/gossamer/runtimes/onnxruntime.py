"""ONNX Runtime on the CPU."""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core.errors import ModelError, StateError
from gossamer.runtimes.session import OpClock, OpTime, Runtime, Session, first_line

__all__ = ["ONNXRuntime", "ONNXRuntimeSession"]

_INT8_PRODUCTS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QAttention",
        "QGemm",
        "QLinearConv",
        "QLinearConvTranspose",
        "QLinearMatMul",
    }
)
_PRODUCTS = _INT8_PRODUCTS | {
    "Attention",
    "Conv",
    "ConvTranspose",
    "Einsum",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "Gemm",
    "MatMul",
    "MultiHeadAttention",
    "NhwcFusedConv",
}
_KERNEL = "_kernel_time"
_QUIET = 3


def _op_time(event: dict[str, Any]) -> OpTime:
    args = event["args"]
    kind = args["op_name"]
    types = {name for entry in args.get("input_type_shape", []) for name in entry}
    narrow = kind in _INT8_PRODUCTS or bool(types & {"int8", "uint8"} and kind.startswith("QLinear"))
    return OpTime(
        name=event["name"].removesuffix(_KERNEL),
        type=kind,
        kernel=f"{args.get('provider', '')}:{kind}",
        precision="i8" if narrow else "f32",
        ms=event["dur"] / 1e3,
        product=kind in _PRODUCTS,
    )


class ONNXRuntimeSession(Session):
    """A graph optimised by ONNX Runtime; operators run one after another."""

    runtime = "onnxruntime"
    precision = "f32"

    def __init__(self, session: Any, where: str, threads: int, profile_folder: Any = None) -> None:
        self.where, self.threads = where, threads
        (self._input,) = (i.name for i in session.get_inputs()[:1])
        shape = session.get_inputs()[0].shape
        self.input_shape = tuple(n if isinstance(n, int) else None for n in shape)
        self._output = session.get_outputs()[0].name
        self._session = session
        self._folder = profile_folder
        self._profile: list[OpTime] | None = None
        self._num_runs = 0

    def _run(self, x: np.ndarray) -> np.ndarray:
        self._num_runs += 1
        return self._session.run([self._output], {self._input: x})[0]

    def profile(self) -> list[OpTime]:
        """See ``Session.profile``; recording ends with the first call."""
        if self._folder is None:
            raise StateError(f"onnxruntime {self.where}: not loaded for profiling; load it with profile=True")
        if self._profile is None:
            clock = OpClock()
            if self._num_runs:
                events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
                self._folder.cleanup()
                ops = [_op_time(e) for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)]
                size = len(ops) // self._num_runs
                for start in range(0, size * self._num_runs, size or 1):
                    clock.add(ops[start : start + size])
            self._profile = clock.mean()
        return self._profile


class ONNXRuntime(Runtime):
    """The portable runtime: float32 and int8 graphs (its CPU kernels have no bf16)."""

    name = "onnxruntime"
    package = "onnxruntime"
    suffixes = (".onnx",)

    def _load(
        self, source: Any, precision: str | None, threads: int, profile: bool, batch: int | None = None
    ) -> ONNXRuntimeSession:
        path: Path = self.find(source)
        ort = importlib.import_module("onnxruntime")
        ort.disable_telemetry_events()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = _QUIET
        folder = tempfile.TemporaryDirectory(prefix="gossamer-profile-") if profile else None
        if folder is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder.name) / "ort")
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as err:
            raise ModelError(f"onnxruntime cannot load {path}: {first_line(err)}") from err
        return ONNXRuntimeSession(session, path.name, threads, folder)
