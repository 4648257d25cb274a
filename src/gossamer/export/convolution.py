"""Convolutions written so that integer kernels run them from end to end.

Runtimes fuse a convolution with the quantizer behind it. What stands between the two is moved (rounding
is monotone, so that it changes places with bounds and maxima without changing a value), and weights
whose levels lie between two codes are spread over more input channels.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gossamer.export.rewrite import (
    add_constant,
    add_node,
    attribute,
    chain,
    constant,
    graph_of,
    only_user,
    producer,
    quantized_constant,
    replace,
    scalar,
    sizes,
)

__all__ = [
    "clip_codes",
    "merge_half_levels",
    "round_before_pooling",
    "round_before_shuffling",
    "use_leaky_relu",
    "use_products_for_patches",
]

_MONOTONE = ("Relu", "Clip", "MaxPool")
"""What may stand between a convolution and the quantizer that a runtime fuses with it."""


def use_leaky_relu(model: ir.Model) -> None:
    """Write a PRelu of one slope as LeakyRelu, which has an integer kernel in ONNX Runtime."""
    for node in list(model.graph):
        slope = scalar(node.inputs[1]) if node.op_type == "PRelu" else None
        if slope is not None:
            old, real = node.outputs[0], ir.DataType.FLOAT
            replace(old, add_node(node, "LeakyRelu", [node.inputs[0]], {"alpha": slope}, dtype=real, shape=sizes(old)))


def round_before_shuffling(model: ir.Model) -> None:
    """Turn DepthToSpace -> QuantizeLinear (-> Clip) round: the convolution before is rounded at once."""
    for node in list(model.graph):
        quantize = only_user(node.outputs[0], "QuantizeLinear") if node.op_type == "DepthToSpace" else None
        if quantize is None or scalar(quantize.inputs[1]) is None:
            continue
        x, last = node.inputs[0], quantize
        kind = quantize.outputs[0].dtype or ir.DataType.UINT8
        value = add_node(node, "QuantizeLinear", [x, *quantize.inputs[1:]], dtype=kind, shape=sizes(x))
        clip = only_user(quantize.outputs[0], "Clip")
        if clip is not None:
            value, last = add_node(node, "Clip", [value, *clip.inputs[1:]], dtype=kind, shape=sizes(x)), clip
        given = {k: a.value for k, a in node.attributes.items()}
        value = add_node(node, "DepthToSpace", [value], given, dtype=kind, shape=sizes(node.outputs[0]))
        replace(last.outputs[0], value)


def round_before_pooling(model: ir.Model) -> None:
    """Turn MaxPool -> QuantizeLinear -> DequantizeLinear round: rounding is monotone, so the values stay the same."""
    for node in list(model.graph):
        quantize = only_user(node.outputs[0], "QuantizeLinear") if node.op_type == "MaxPool" else None
        dequantize = None if quantize is None else only_user(quantize.outputs[0], "DequantizeLinear")
        if quantize is None or dequantize is None or scalar(quantize.inputs[1]) is None or len(node.outputs) > 1:
            continue
        x, real = node.inputs[0], ir.DataType.FLOAT
        codes = [x, *quantize.inputs[1:]]
        value = add_node(node, "QuantizeLinear", codes, dtype=quantize.outputs[0].dtype or real, shape=sizes(x))
        value = add_node(node, "DequantizeLinear", [value, *dequantize.inputs[1:]], dtype=real, shape=sizes(x))
        node.replace_input_with(0, value)
        replace(dequantize.outputs[0], node.outputs[0])


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Return what an activation clips to, ``None`` for one that is no clipping to constants."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    given = [v if v is None else scalar(v) for v in (*node.inputs[1:], None, None)[:2]]
    if any(g is None and v is not None for g, v in zip(given, node.inputs[1:], strict=False)):
        return None
    return given[0] if given[0] is not None else -float("inf"), given[1] if given[1] is not None else float("inf")


def clip_codes(model: ir.Model) -> None:
    """Let the integer codes be clipped instead of the floats that are rounded to them.

    Where the grid ends no further than the bound, saturation does it, and nothing is left to do.
    """
    for node in list(model.graph):
        quantize = only_user(node.outputs[0], "QuantizeLinear") if node.op_type in ("Relu", "Clip") else None
        bounds = None if quantize is None else _bounds(node)
        if quantize is None or bounds is None or len(quantize.inputs) < 3:
            continue
        step, zero = scalar(quantize.inputs[1]), constant(quantize.inputs[2])
        if step is None or zero is None or zero.size != 1:
            continue
        kind = np.iinfo(zero.dtype)
        with np.errstate(over="ignore"):
            codes = np.rint(np.asarray(bounds, np.float32) / np.float32(step)) + float(zero.reshape(()))
        low, high = (int(np.clip(c, kind.min, kind.max)) for c in codes)
        quantize.replace_input_with(0, node.inputs[0])
        if (low, high) == (kind.min, kind.max):
            continue
        old = quantize.outputs[0]
        users = list(old.uses())
        limits = [add_constant(model.graph, np.array(v, zero.dtype), "code_bound") for v in (low, high)]
        dtype = ir.tensor(zero).dtype
        new = add_node(users[0].node, "Clip", [old, *limits], dtype=dtype, shape=sizes(old))
        for use in users:
            use.node.replace_input_with(use.idx, new)


def _half_levels(node: ir.Node) -> tuple[ir.Node, np.ndarray] | None:
    """Return the convolution of ``conv(x, W) + s * conv(x, ones)`` and its weights in units of s, if that is it."""
    for slot in (0, 1):
        conv, scaled = producer(node.inputs[slot], "Conv"), producer(node.inputs[1 - slot], "Mul")
        sums = None if scaled is None else next((p for p in (producer(v, "Conv") for v in scaled.inputs) if p), None)
        if conv is None or scaled is None or sums is None or conv.inputs[0] is not sums.inputs[0]:
            continue
        weight, ones = quantized_constant(conv.inputs[1]), quantized_constant(sums.inputs[1])
        half = next((a for a in map(constant, scaled.inputs) if a is not None), None)
        if weight is None or ones is None or half is None or attribute(conv, "group") not in (1, None):
            continue
        if ones[0].min() == ones[0].max() == 1 and np.array_equal(half.reshape(-1), weight[1] / 2):
            return conv, 2 * weight[0].astype(np.int32) + 1
    return None


def merge_half_levels(model: ir.Model) -> None:
    """Turn ``conv(x, W) + s * conv(x, ones)`` into one convolution of several copies of the codes of x.

    The odd multiples of s that both make up (at most 255) are sums of two or three int8 weights.
    """
    for node in list(model.graph):
        found = _half_levels(node) if node.op_type == "Add" else None
        source = None if found is None else producer(found[0].inputs[0], "DequantizeLinear")
        if found is None or source is None or source.inputs[0] is None:
            continue
        conv, odd = found
        parts = [np.clip(odd // 2, -128, 127)]
        while (rest := odd - sum(parts)).any():
            parts.append(np.clip(rest, -128, 127))
        graph, codes, scale = model.graph, source.inputs[0], quantized_constant(conv.inputs[1])
        shape, kind = sizes(codes), codes.dtype
        if scale is None or kind is None:
            continue
        wide = None if shape is None else [shape[0], len(parts) * int(shape[1]), *shape[2:]]
        value = add_node(node, "Concat", [codes] * len(parts), {"axis": 1}, dtype=kind, shape=wide)
        real = ir.DataType.FLOAT
        value = add_node(node, "DequantizeLinear", [value, *source.inputs[1:]], dtype=real, shape=wide)
        weight = [
            add_constant(graph, np.concatenate(parts, 1).astype(np.int8), "odd_weight"),
            add_constant(graph, (scale[1] / 2).astype(np.float32), "odd_scale"),
            add_constant(graph, np.zeros(scale[1].shape, np.int8), "odd_zero"),
        ]
        shape = [len(odd), len(parts) * odd.shape[1], *odd.shape[2:]]
        matrix = add_node(node, "DequantizeLinear", weight, {"axis": 0}, dtype=real, shape=shape)
        given = {k: a.value for k, a in conv.attributes.items()}
        out = add_node(node, "Conv", [value, matrix, *conv.inputs[2:]], given, dtype=real, shape=sizes(node.outputs[0]))
        replace(node.outputs[0], out)


def _is_rounded_at_once(value: ir.Value) -> bool:
    nodes = chain(value, *_MONOTONE)
    return bool(nodes) and nodes[-1].op_type == "QuantizeLinear"


def _is_patch_embedding(node: ir.Node) -> bool:
    kernel = attribute(node, "kernel_shape")
    return (
        node.op_type == "Conv"
        and kernel is not None
        and len(kernel) == 2
        and max(kernel) > 1  # of one pixel: the transposes cost more than int8 saves
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


def use_products_for_patches(model: ir.Model) -> None:
    """Turn int8 convolutions whose windows do not overlap into matrix products.

    Not those whose output is rounded at once: they run as integer convolutions anyway.
    """
    graph = model.graph
    for node in list(graph):
        if not _is_patch_embedding(node) or _is_rounded_at_once(node.outputs[0]):
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
