"""What each runtime wants of an 8-bit graph: the same numbers, written so that int8 kernels are used.

Measured in ``benchmarks/int8_layout.md``. OpenVINO multiplies two activations in int8 only if
neither has a zero point, so its signed grids are written as int8. ONNX Runtime's kernels want uint8
activations, weights that are not transposed at run time, biases as int32 and a patch embedding that
is a matrix product; a convolution is an integer one only if its output is rounded at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gossamer.export.convolution import (
    clip_codes,
    merge_half_levels,
    round_before_pooling,
    round_before_shuffling,
    use_leaky_relu,
    use_products_for_patches,
)
from gossamer.export.projection import pack_projections, split_projections
from gossamer.export.rewrite import (
    add_constant,
    add_node,
    attribute,
    constant,
    only_user,
    producer,
    quantized_constant,
    replace,
    scalar,
    sizes,
)
from gossamer.ops.grids import SIGNED_ZERO

__all__ = ["STEPS", "lay_out"]

_QDQ = ("QuantizeLinear", "DequantizeLinear")
_PASSED = ("Clip", "DepthToSpace", "Div", "Flatten", "MaxPool", "Mul", "Relu", "Reshape", "Slice", "Split", "Squeeze",
           "Transpose", "Unsqueeze")  # fmt: skip
_MIN_BIAS_CODE = 64
"""Least code of the largest bias beside inputs of few bits, whose accumulators have a step that is coarse for it."""
_INT8_TOP = 127


def _fold_transposed_weights(model: ir.Model) -> None:
    """Store int8 weights as the product reads them, instead of transposing dequantized ones."""
    for node in list(model.graph):
        if node.op_type != "Transpose" or list(attribute(node, "perm") or ()) not in ([], [1, 0]):
            continue
        weight = quantized_constant(node.inputs[0])
        if weight is None or weight[0].ndim != 2:
            continue
        codes, _, axis, source = weight
        inputs = [add_constant(model.graph, codes.T, "weight_t"), *source.inputs[1:]]
        shape = list(codes.T.shape)
        turned = {"axis": 1 - axis}
        out = add_node(node, "DequantizeLinear", inputs, turned, dtype=ir.DataType.FLOAT, shape=shape)
        replace(node.outputs[0], out)


def _use_scalars(model: ir.Model) -> None:
    """Give per-tensor grids scalars instead of vectors of one element."""
    made: dict[str, ir.Value] = {}
    for node in model.graph:
        if node.op_type not in _QDQ:
            continue
        for slot in (1, 2):
            value = node.inputs[slot] if len(node.inputs) > slot else None
            array = constant(value)
            if value is None or array is None or array.shape != (1,):
                continue
            name = str(value.name)
            if name not in made:
                made[name] = add_constant(model.graph, array.reshape(()), name)
            node.replace_input_with(slot, made[name])


def _use_signed_codes(model: ir.Model) -> None:
    """Write grids with zero point 128 as int8 with zero point 0 (the codes minus 128).

    Not beside a concatenation: OpenVINO 2026.4 computes another product if signed codes are concatenated before it.
    """
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
            continue
        zero = constant(node.inputs[2])
        if zero is None or zero.dtype != np.uint8 or scalar(node.inputs[2]) != SIGNED_ZERO:
            continue
        below = _after_codes(node.outputs[0])
        if _is_concatenated(node.inputs[0]) or any(_is_concatenated(n.outputs[0], down=True) for n in below):
            continue
        for user in (node, *below):
            if user.op_type in _QDQ:
                user.replace_input_with(2, add_constant(model.graph, np.zeros((), np.int8), "signed_zero"))
            if user.op_type == "Clip":
                for slot in (1, 2):
                    bound = np.array((scalar(user.inputs[slot]) or 0) - SIGNED_ZERO, np.int8)
                    user.replace_input_with(slot, add_constant(model.graph, bound, "signed_bound"))
            if user.op_type != "DequantizeLinear":
                for value in user.outputs:
                    value.type = ir.TensorType(ir.DataType.INT8)


def _after_codes(codes: ir.Value) -> list[ir.Node]:
    """Return the nodes that codes reach, up to those that make numbers of them."""
    found, pending = [], [codes]
    while pending:
        for node in (use.node for use in pending.pop().uses()):
            found.append(node)
            if node.op_type != "DequantizeLinear":
                pending += node.outputs
    return found


def _is_concatenated(value: ir.Value | None, *, down: bool = False) -> bool:
    """Whether a value comes from (``down``: goes into) a concatenation, past what OpenVINO moves quantizers past."""
    if value is None:
        return False
    nodes = [use.node for use in value.uses()] if down else [n for n in (value.producer(),) if n is not None]
    for node in nodes:
        if node.op_type == "Concat":
            return True
        read = _moved(node)
        if any(_is_concatenated(v, down=down) for v in (node.outputs if down and read else read)):
            return True
    return False


def _moved(node: ir.Node) -> Sequence[ir.Value | None]:
    """Return the input that a node passes on as OpenVINO may move a quantizer; none of a product of two variables."""
    if node.op_type not in _PASSED:
        return ()
    free = [v for v in node.inputs if constant(v) is None] if node.op_type in ("Mul", "Div") else node.inputs[:1]
    return free if len(free) == 1 else ()


def _dequantize_before_transposes(model: ir.Model) -> None:
    """Turn codes -> Transpose -> DequantizeLinear round: OpenVINO finds int8 products only that way."""
    for node in list(model.graph):
        transpose = producer(node.inputs[0], "Transpose") if node.op_type == "DequantizeLinear" else None
        if transpose is None or only_user(transpose.outputs[0]) is not node or scalar(node.inputs[1]) is None:
            continue
        codes, perm = transpose.inputs[0], list(attribute(transpose, "perm"))
        rest = [v for v in node.inputs[1:] if v is not None]
        real, shape = ir.DataType.FLOAT, sizes(codes)
        value = add_node(node, "DequantizeLinear", [codes, *rest], dtype=real, shape=shape)
        value = add_node(node, "Transpose", [value], {"perm": perm}, dtype=real, shape=sizes(node.outputs[0]))
        replace(node.outputs[0], value)


def _widen_weights(model: ir.Model) -> None:
    """Let the codes of narrow weights fill int8, their steps being smaller in turn: exact.

    ONNX Runtime rounds a bias to the product of both steps, which is coarse on narrow grids.
    """
    for node in list(model.graph):
        weight = quantized_constant(node.outputs[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None:
            continue
        codes, scale, _, _ = weight
        factor = _INT8_TOP // max(1, int(np.abs(codes.astype(np.int16)).max()))
        if factor > 1 and codes.size > 1:
            node.replace_input_with(0, add_constant(model.graph, codes * np.int8(factor), "wide_codes"))
            shape = constant(node.inputs[1]).shape  # type: ignore[union-attr]
            fine = (scale / factor).astype(np.float32).reshape(shape)
            node.replace_input_with(1, add_constant(model.graph, fine, "fine_scale"))


def _input_step(value: ir.Value | None) -> float | None:
    node = producer(value, "DequantizeLinear")
    return None if node is None or constant(node.inputs[0]) is not None else scalar(node.inputs[1])


def _is_narrow(value: ir.Value | None) -> bool:
    """Whether a dequantized input has fewer codes than its type holds: they are clipped."""
    node = producer(value, "DequantizeLinear")
    return node is not None and producer(node.inputs[0], "Clip") is not None


def _bias_slot(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Return the product a node adds a constant bias to and the input that holds it."""
    if node.op_type == "Gemm" and len(node.inputs) == 3 and constant(node.inputs[2]) is not None:
        return node, 2
    if node.op_type == "Add":
        for slot in (0, 1):
            product = producer(node.inputs[1 - slot], "MatMul")
            if product is not None and constant(node.inputs[slot]) is not None:
                return product, slot
    return None


def _use_integer_biases(model: ir.Model) -> None:
    """Store biases of int8 layers as int32 at the step of their accumulators.

    A bias left in float, however small, takes the product out of integers; at 8 bits none is too small to be rounded.
    """
    for node in list(model.graph):
        found = _bias_slot(node)
        if found is None:
            continue
        product, slot = found
        weight, step = quantized_constant(product.inputs[1]), _input_step(product.inputs[0])
        bias = constant(node.inputs[slot])
        if weight is None or step is None or bias is None or bias.ndim != 1:
            continue
        scale = (weight[1].astype(np.float64) * step).astype(np.float32)
        codes = np.round(bias / scale)
        top = np.abs(codes).max()
        if top >= 2**30 or (top < _MIN_BIAS_CODE and _is_narrow(product.inputs[0])):
            continue  # would not fit beside the accumulator, or be rounded too coarsely: stays in float
        scale = scale if scale.size > 1 else scale.reshape(())
        inputs = [
            add_constant(model.graph, codes.astype(np.int32), "bias_codes"),
            add_constant(model.graph, scale, "bias_scale"),
            add_constant(model.graph, np.zeros(scale.shape, np.int32), "bias_zero"),
        ]
        out = add_node(node, "DequantizeLinear", inputs, {"axis": 0}, dtype=ir.DataType.FLOAT, shape=bias.shape)
        node.replace_input_with(slot, out)


STEPS: dict[str, tuple[Callable[[ir.Model], object], ...]] = {
    "onnxruntime": (
        _fold_transposed_weights,
        pack_projections,
        _use_scalars,
        use_leaky_relu,
        round_before_shuffling,
        merge_half_levels,
        _widen_weights,
        clip_codes,
        use_products_for_patches,
        _use_integer_biases,
    ),
    "openvino": (
        _fold_transposed_weights,
        pack_projections,
        split_projections,
        _use_scalars,
        round_before_shuffling,
        round_before_pooling,
        _use_signed_codes,
        _dequantize_before_transposes,
    ),
}
"""The rewrites for each runtime, in order."""


def lay_out(model: ir.Model, target: str, without: str | None = None) -> None:
    """Rewrite a traced graph in place for ``target``; values stay the same up to rounding.

    Graphs without 8-bit layers are only touched for OpenVINO (``split_projections``).

    Args:
        model: The graph.
        target: ``"openvino"`` or ``"onnxruntime"``.
        without: Name of a step to leave out, to see what it is worth (``benchmarks/int8_layout.py``).
    """
    for step in STEPS[target]:
        if step.__name__.lstrip("_") != without:
            step(model)
            RemoveUnusedNodesPass()(model)  # the next step counts users
