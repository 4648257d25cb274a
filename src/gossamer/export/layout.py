"""What each runtime wants of an 8-bit graph: the same numbers, written so that int8 kernels are used.

Measured in ``benchmarks/int8_layout.md``. OpenVINO multiplies two activations in int8 only if
neither has a zero point, so its signed grids are written as int8. ONNX Runtime's kernels want uint8
activations, weights that are not transposed at run time, biases as int32 and a patch embedding that
is a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gossamer.export.projection import pack_projections, split_projections
from gossamer.export.rewrite import (
    add_constant,
    add_node,
    attribute,
    constant,
    graph_of,
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
MIN_BIAS_CODE = 64
"""Least code of a layer's largest bias: at 2 to 4 bits the step of an accumulator is coarse beside the bias."""


def _fold_transposed_weights(model: ir.Model) -> None:
    """Store int8 weights as the product reads them, instead of transposing dequantized ones."""
    for node in list(model.graph):
        if node.op_type != "Transpose" or list(attribute(node, "perm") or ()) not in ([], [1, 0]):
            continue
        weight = quantized_constant(node.inputs[0])
        if weight is None or weight[0].ndim != 2:
            continue
        codes, scale, axis, source = weight
        zero = constant(source.inputs[2])
        inputs = [
            add_constant(model.graph, codes.T, "weight_t"),
            source.inputs[1],
            source.inputs[2] if zero is not None else add_constant(model.graph, np.zeros(scale.shape, np.int8), "zero"),
        ]
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
    """Write grids with zero point 128 as int8 with zero point 0 (the codes minus 128)."""
    for node in list(model.graph):
        if node.op_type not in _QDQ or len(node.inputs) < 3 or constant(node.inputs[0]) is not None:
            continue
        old = constant(node.inputs[2])
        if old is None or old.dtype != np.uint8 or scalar(node.inputs[2]) != SIGNED_ZERO:
            continue
        node.replace_input_with(2, add_constant(model.graph, np.zeros((), np.int8), "signed_zero"))
        if node.op_type == "QuantizeLinear":
            _mark_signed(node.outputs[0])


def _mark_signed(codes: ir.Value) -> None:
    pending = [codes]
    while pending:
        value = pending.pop()
        value.type = ir.TensorType(ir.DataType.INT8)
        for use in value.uses():
            if use.node.op_type != "DequantizeLinear":
                pending += use.node.outputs


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


def _input_step(value: ir.Value | None) -> float | None:
    node = producer(value, "DequantizeLinear")
    return None if node is None or constant(node.inputs[0]) is not None else scalar(node.inputs[1])


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
    """Store biases of int8 layers as int32 at the step of their accumulators."""
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
        if top >= 2**30 or top < MIN_BIAS_CODE:
            continue  # would not fit beside the accumulator, or be rounded too coarsely: stays in float
        scale = scale if scale.size > 1 else scale.reshape(())
        inputs = [
            add_constant(model.graph, codes.astype(np.int32), "bias_codes"),
            add_constant(model.graph, scale, "bias_scale"),
            add_constant(model.graph, np.zeros(scale.shape, np.int32), "bias_zero"),
        ]
        out = add_node(node, "DequantizeLinear", inputs, {"axis": 0}, dtype=ir.DataType.FLOAT, shape=bias.shape)
        node.replace_input_with(slot, out)


def _is_patch_embedding(node: ir.Node) -> bool:
    kernel = attribute(node, "kernel_shape")
    return (
        node.op_type == "Conv"
        and kernel is not None
        and len(kernel) == 2
        and list(attribute(node, "strides") or ()) == list(kernel)
        and not any(attribute(node, "pads") or ())
        and set(attribute(node, "dilations") or (1,)) == {1}
        and attribute(node, "group") in (1, None)
        and attribute(node, "auto_pad") in ("NOTSET", None)
    )


def _patches_as_rows(node: ir.Node, codes: ir.Value | None) -> ir.Value | None:
    """Return the int8 patches of ``codes`` [B, C, H, W] as rows [B, H' W', C k k]."""
    shape, (high, wide) = sizes(codes), attribute(node, "kernel_shape")
    if codes is None or codes.dtype is None or shape is None or not all(isinstance(n, int) for n in shape[1:]):
        return None
    channels, height, width = (int(n) for n in shape[1:])
    if height % high or width % wide:
        return None
    graph, batch = graph_of(node), shape[0]
    grid = [height // high, width // wide]
    cut = np.array([0, channels, grid[0], high, grid[1], wide], np.int64)
    cells = [batch, channels, grid[0], high, grid[1], wide]
    value = add_node(node, "Reshape", [codes, add_constant(graph, cut, "cut")], dtype=codes.dtype, shape=cells)
    cells = [batch, *grid, channels, high, wide]
    value = add_node(node, "Transpose", [value], {"perm": [0, 2, 4, 1, 3, 5]}, dtype=codes.dtype, shape=cells)
    rows = [grid[0] * grid[1], channels * high * wide]
    flat = add_constant(graph, np.array([0, *rows], np.int64), "rows")
    return add_node(node, "Reshape", [value, flat], dtype=codes.dtype, shape=[batch, *rows])


def _use_products_for_patches(model: ir.Model) -> None:
    """Turn int8 convolutions whose windows do not overlap into matrix products."""
    graph = model.graph
    for node in list(graph):
        if not _is_patch_embedding(node):
            continue
        weight, source = quantized_constant(node.inputs[1]), producer(node.inputs[0], "DequantizeLinear")
        shape = sizes(node.outputs[0])
        if weight is None or source is None or shape is None or (weight[2] != 0 and weight[1].size > 1):
            continue
        rows = _patches_as_rows(node, source.inputs[0])
        if rows is None:
            continue
        codes, scale, _, dequantize = weight
        batch, out, tokens = shape[0], codes.shape[0], (sizes(rows) or [0, 0])[1]
        activations = add_node(
            node, "DequantizeLinear", [rows, *source.inputs[1:]], dtype=ir.DataType.FLOAT, shape=sizes(rows)
        )
        table = add_constant(graph, codes.reshape(out, -1).T, "patch_weight")
        matrix = add_node(
            node, "DequantizeLinear", [table, *dequantize.inputs[1:]], {"axis": 1}, dtype=ir.DataType.FLOAT,
            shape=[codes[0].size, out],
        )  # fmt: skip
        flat = [batch, tokens, out]
        value = add_node(node, "MatMul", [activations, matrix], dtype=ir.DataType.FLOAT, shape=flat)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            value = add_node(node, "Add", [value, node.inputs[2]], dtype=ir.DataType.FLOAT, shape=flat)
        _join_patches(node, value, shape)


def _join_patches(node: ir.Node, rows: ir.Value, shape: list[int | str]) -> None:
    """Give the users of a convolution its output from ``rows`` [B, H' W', out]; nothing moves if they flatten it."""
    graph = graph_of(node)
    reshape = only_user(node.outputs[0], "Reshape")
    transpose = None if reshape is None else only_user(reshape.outputs[0], "Transpose")
    if transpose is not None and sizes(transpose.outputs[0]) == sizes(rows):
        replace(transpose.outputs[0], rows)
        return
    back = {"perm": [0, 2, 1]}
    turned = add_node(
        node, "Transpose", [rows], back, dtype=ir.DataType.FLOAT, shape=[shape[0], shape[1], (sizes(rows) or [0, 0])[1]]
    )
    target = add_constant(graph, np.array([0, *shape[1:]], np.int64), "map")
    replace(node.outputs[0], add_node(node, "Reshape", [turned, target], dtype=ir.DataType.FLOAT, shape=shape))


STEPS: dict[str, tuple[Callable[[ir.Model], object], ...]] = {
    "onnxruntime": (
        _fold_transposed_weights,
        pack_projections,
        _use_scalars,
        _use_products_for_patches,
        _use_integer_biases,
    ),
    "openvino": (
        _fold_transposed_weights,
        pack_projections,
        split_projections,
        _use_scalars,
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
