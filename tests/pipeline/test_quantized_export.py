"""The graph of a quantized model computes what its simulated form computes."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from gossamer.core import registry
from gossamer.export.exporting import export
from gossamer.kits.calibration import calibrate
from gossamer.kits.example import tiny_vit


@pytest.mark.parametrize("bits", [6, 8])
def test_the_exported_graph_gives_the_simulated_logits(tmp_path: Path, bits: int) -> None:
    """QuantizeLinear / DequantizeLinear (8 bit) or round and clip (else), with the runtime's fusions off."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    options = {"unsigned_softmax": True, "equalise": 0.8, "per_channel": True, "n_candidates": 8, "max_iter": 2}
    method = registry.build("ptq_vit", {"w_bits": bits, "a_bits": bits, **options})
    done = calibrate(method, tiny_vit().eval(), images)
    artefact = export(done, tmp_path / "onnx", format="onnx", batch=4, tolerance=0.05)
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(artefact.graph), plain, providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    with torch.no_grad():
        expected = done(images)
    error = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 1e-3
