"""The graph of a quantized model computes what its simulated form computes."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from gossamer.core import registry
from gossamer.export.exporting import export
from gossamer.export.onnx import trace, write
from gossamer.kits.calibration import calibrate
from gossamer.kits.example import tiny_vit


def quantized(bits: int, images: Tensor) -> nn.Module:
    options = {"unsigned_softmax": True, "equalise": 0.8, "per_channel": True, "n_candidates": 8, "max_iter": 2}
    return calibrate(registry.build("ptq_vit", {"w_bits": bits, "a_bits": bits, **options}), tiny_vit().eval(), images)


def error(path: Path, model: nn.Module, images: Tensor) -> float:
    """Return the relative error of a graph run with the runtime's fusions off, as its operators are defined."""
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), plain, providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    with torch.no_grad():
        expected = model(images)
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", [6, 8])
def test_the_graph_gives_the_simulated_logits(tmp_path: Path, bits: int) -> None:
    """QuantizeLinear / DequantizeLinear (8 bit) or round and clip (else)."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = quantized(bits, images)
    write(trace(model, images), tmp_path / "plain.onnx")
    assert error(tmp_path / "plain.onnx", model, images) < 1e-3


def test_the_layout_for_a_runtime_moves_only_close_calls(tmp_path: Path) -> None:
    """Laid out for ONNX Runtime, biases are int32: a value between two codes may fall to the other one."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = quantized(8, images)
    artefact = export(model, tmp_path / "onnx", format="onnx", batch=4, example=images)
    assert artefact.parity["relative"] <= artefact.parity["tolerance"]
    assert error(artefact.graph, model, images) < 0.05
