"""Graph rewrites: what they do to the graph, and that they do not change its values."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from gossamer.export.layout import lay_out
from gossamer.export.onnx import trace
from gossamer.export.rewrite import constant

ROUNDING = 3e-2
"""What a few values on the border of two codes change in these small random models."""
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def kinds(graph):
    return Counter(node.op_type for node in graph.graph)


def run(graph, images=IMAGES):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
    return session.run(None, {"image": images.numpy()})[0]


def relative(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(("dynamic", "scales"), [(False, 1), (True, 3), (False, 192)])
def test_values_stay_the_same(small_vit, in_8_bits, target, dynamic, scales):
    model = in_8_bits(small_vit(), scales=scales)
    with torch.no_grad():
        want = model(IMAGES).numpy()
    graph = trace(model, IMAGES, dynamic=dynamic)
    assert relative(run(graph), want) < ROUNDING
    lay_out(graph, target)
    assert relative(run(graph), want) < ROUNDING


def test_projections_are_packed_behind_one_grid(vit8):
    graph = trace(vit8, IMAGES)
    before = kinds(graph)
    lay_out(graph, "openvino")
    after = kinds(graph)
    assert before["QuantizeLinear"] - after["QuantizeLinear"] == 2 * 2
    assert after["Mul"] == 0  # the score scale went into the weights
    assert before["MatMul"] == after["MatMul"]


def test_weights_are_stored_as_int8_and_not_transposed_at_run_time(vit8):
    graph = trace(vit8, IMAGES)
    lay_out(graph, "onnxruntime")
    wide = [v for v in graph.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and v.const_value.size > 4096]
    assert not wide
    turned = [n.inputs[0].producer() for n in graph.graph if n.op_type == "Transpose"]
    assert not [node for node in turned if node.op_type == "DequantizeLinear"]


def test_float_projections_are_split_for_openvino_only(vit):
    for target, products in (("openvino", 2 * (3 + 2 + 3)), ("onnxruntime", 2 * (1 + 2 + 3))):
        graph = trace(vit, IMAGES)
        lay_out(graph, target)
        assert kinds(graph)["MatMul"] == products
        assert relative(run(graph), vit(IMAGES).detach().numpy()) < 1e-5


def test_openvino_gets_signed_codes_and_onnxruntime_unsigned(vit8):
    for target, dtype in (("openvino", np.int8), ("onnxruntime", np.uint8)):
        graph = trace(vit8, IMAGES)
        lay_out(graph, target)
        zeros = [constant(n.inputs[2]) for n in graph.graph if n.op_type == "QuantizeLinear"]
        assert sum(z.dtype == dtype for z in zeros) >= len(zeros) - 2  # softmax output is unsigned in both


def test_onnxruntime_gets_integer_biases_and_no_convolution(vit8):
    graph = trace(vit8, IMAGES)
    lay_out(graph, "onnxruntime")
    assert "Conv" not in kinds(graph)
    biases = [n for n in graph.graph if n.op_type == "DequantizeLinear" and n.inputs[0].dtype == ir.DataType.INT32]
    assert len(biases) == 1 + 2 * 4 + 1


def test_small_biases_of_8_bit_layers_become_integers_too(small_vit, in_8_bits):
    model = in_8_bits(small_vit())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(".bias"):
                buffer.mul_(1e-6)
    graph = trace(model, IMAGES)
    lay_out(graph, "onnxruntime")
    biases = [n for n in graph.graph if n.op_type == "DequantizeLinear" and n.inputs[0].dtype == ir.DataType.INT32]
    assert len(biases) == 1 + 2 * 4 + 1


def test_a_part_that_is_also_used_in_float_is_not_packed(small_vit, in_8_bits):
    class Peeking(torch.nn.Module):
        """Reads k in float, as token merging does."""

        def __init__(self):
            super().__init__()
            self.model = in_8_bits(small_vit(depth=1))

        def forward(self, x):
            m = self.model
            tokens = m._pos_embed(m.patch_embed(x))
            out = m.blocks[0].attn.attend(m.blocks[0].norm1(tokens))
            return out.out.mean(1) + out.k.mean((1, 2)).repeat(1, 2)

    model = Peeking().eval()
    with torch.no_grad():
        want = model(IMAGES).numpy()
    for target, products in (("openvino", 3 + 2 + 1), ("onnxruntime", 1 + 2 + 1 + 1)):  # q, k, v apart; patches as rows
        graph = trace(model, IMAGES)
        lay_out(graph, target)
        assert kinds(graph)["MatMul"] == products
        assert relative(run(graph), want) < ROUNDING
