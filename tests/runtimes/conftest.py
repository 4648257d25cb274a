"""Two small graphs written by hand: one dense, one 8-bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

IN, HIDDEN, OUT = (3, 4, 4), 32, 8


def _save(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], batch: int | str) -> Path:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, OUT])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def dense_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flatten, product, ReLU, product; free batch."""
    rng = np.random.default_rng(0)
    constants = {
        "w1": rng.standard_normal((int(np.prod(IN)), HIDDEN)).astype(np.float32),
        "w2": rng.standard_normal((HIDDEN, OUT)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="second"),
    ]
    return _save(tmp_path_factory.mktemp("graphs") / "model.onnx", nodes, constants, "batch")


@pytest.fixture(scope="session")
def int8_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One product with 8-bit inputs and weights (QuantizeLinear, DequantizeLinear), batch 2."""
    rng = np.random.default_rng(0)
    width = int(np.prod(IN))
    constants = {
        "w": rng.integers(-127, 128, (width, OUT)).astype(np.int8),
        "ws": np.full(OUT, 0.01, np.float32),
        "wz": np.zeros(OUT, np.int8),
        "xs": np.float32(0.03),
        "xz": np.uint8(128),
    }
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("QuantizeLinear", ["f", "xs", "xz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["y"], name="product"),
    ]
    return _save(tmp_path_factory.mktemp("int8") / "model.onnx", nodes, constants, 2)
