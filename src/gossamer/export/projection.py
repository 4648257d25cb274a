"""Fused q/k/v projections laid out so that runtimes need no copies.

A ViT computes q, k and v by one linear layer, turns [B, N, P, H, D] into [P, B, H, N, D] and cuts it
into P parts. Runtimes carry out that transpose in float although int8 or no copy at all would do:

- ``pack_projections`` (8-bit graphs): if every part is put on an 8-bit grid, the steps are absorbed
  by the rows of the weights, so that one grid of step 1 stands right behind the layer. Its integer
  codes are transposed and cut instead; each part is dequantized with its own step as before.
- ``split_projections``: the layer becomes P layers, each followed by a [B, N, H, D] -> [B, H, N, D]
  transpose that attention kernels absorb.
"""

from __future__ import annotations

from dataclasses import dataclass

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

__all__ = ["pack_projections", "split_projections"]

_ORDER = [2, 0, 3, 1, 4]
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Mul")


@dataclass(frozen=True)
class _Projection:
    """A linear layer whose output is cut into equal parts.

    Attributes:
        product: Its MatMul.
        add: The Add of its bias, if it has one.
        reshape: [B, N, P*H*D] -> [B, N, P, H, D].
        parts: Its parts [B, H, N, D] in order; ``None`` where one is not used.
        heads: (H, D).
    """

    product: ir.Node
    add: ir.Node | None
    reshape: ir.Node
    parts: list[ir.Value | None]
    heads: tuple[int, int]

    @property
    def out(self) -> ir.Value:
        return (self.add or self.product).outputs[0]

    @property
    def bias(self) -> np.ndarray | None:
        if self.add is None:
            return None
        arrays = [a for a in map(constant, self.add.inputs) if a is not None]
        return arrays[0]


def _part_index(node: ir.Node, count: int) -> int | None:
    """Return which single index of axis 0 a Slice or Gather takes, else ``None``."""
    if node.op_type == "Gather":
        at = constant(node.inputs[1])
        return int(at) % count if at is not None and at.ndim == 0 and attribute(node, "axis") in (0, None) else None
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return None
    start, end, axis = (scalar(v) for v in node.inputs[1:4])
    step = scalar(node.inputs[4]) if len(node.inputs) > 4 else 1.0
    if start is None or end is None or axis != 0 or step != 1 or end - start != 1:
        return None
    return int(start) % count


def _parts(permuted: ir.Value, count: int) -> list[ir.Value | None] | None:
    """Return the values that index axis 0 of ``permuted``, or ``None`` if it is used in another way."""
    parts: list[ir.Value | None] = [None] * count
    if permuted.is_graph_output():
        return None
    for use in permuted.uses():
        if use.node.op_type == "Split" and len(use.node.outputs) == count and attribute(use.node, "axis") in (0, None):
            cuts = list(enumerate(use.node.outputs))
        else:
            index = _part_index(use.node, count)
            if index is None:
                return None
            cuts = [(index, use.node.outputs[0])]
        for index, cut in cuts:
            value = cut
            if use.node.op_type != "Gather":
                squeeze = only_user(cut, "Squeeze")
                if squeeze is None or len(squeeze.inputs) < 2 or scalar(squeeze.inputs[1]) != 0:
                    return None
                value = squeeze.outputs[0]
            if parts[index] is not None:
                return None
            parts[index] = value
    return parts


def _match(reshape: ir.Node) -> _Projection | None:
    before, after = sizes(reshape.inputs[0]), sizes(reshape.outputs[0])
    if before is None or after is None or len(before) != 3 or len(after) != 5:
        return None
    inner = [n for n in after[2:] if isinstance(n, int)]
    if len(inner) != 3 or before[:2] != after[:2] or np.prod(inner) != before[2]:
        return None
    transpose = only_user(reshape.outputs[0], "Transpose")
    if transpose is None or list(attribute(transpose, "perm")) != _ORDER or only_user(reshape.inputs[0]) is None:
        return None
    add = producer(reshape.inputs[0], "Add")
    sources = [reshape.inputs[0]] if add is None else list(add.inputs)
    products = [p for p in (producer(v, "MatMul") for v in sources) if p is not None]
    if len(products) != 1 or only_user(products[0].outputs[0]) is None:
        return None
    if add is not None and all(constant(v) is None for v in add.inputs):
        return None
    parts = _parts(transpose.outputs[0], inner[0])
    if parts is None:
        return None
    return _Projection(products[0], add, reshape, parts, (inner[1], inner[2]))


def _projections(model: ir.Model) -> list[_Projection]:
    found = [_match(node) for node in model.graph if node.op_type == "Reshape"]
    return [p for p in found if p is not None]


@dataclass(frozen=True)
class _Grid:
    """The grid a part is put on, seen from the output of the layer."""

    quantize: ir.Node
    multiplies: list[ir.Node]
    step: float
    zero: np.ndarray


def _grid(part: ir.Value | None) -> _Grid | None:
    nodes = [] if part is None else chain(part, *_MOVES)
    if not nodes or nodes[-1].op_type != "QuantizeLinear":
        return None
    quantize, factor, multiplies = nodes[-1], 1.0, []
    for node in nodes[:-1]:
        if node.op_type == "Mul":
            numbers = [n for n in map(scalar, node.inputs) if n is not None]
            if len(numbers) != 1 or numbers[0] <= 0:
                return None
            factor *= numbers[0]
            multiplies.append(node)
    step, zero = scalar(quantize.inputs[1]), constant(quantize.inputs[2])
    if step is None or zero is None or zero.size != 1:
        return None
    return _Grid(quantize, multiplies, step / factor, zero.reshape(()))


def _retype(value: ir.Value, stop: ir.Node, dtype: ir.DataType) -> None:
    """Mark ``value`` and all that follows, up to the inputs of ``stop`` and dequantizers, as ``dtype``."""
    pending = [value]
    while pending:
        current = pending.pop()
        current.type = ir.TensorType(dtype)
        for use in current.uses():
            if use.node is not stop and use.node.op_type != "DequantizeLinear":
                pending += use.node.outputs


def _pack(projection: _Projection) -> bool:
    weight = quantized_constant(projection.product.inputs[1])
    grids = [_grid(part) for part in projection.parts]
    if weight is None or weight[2] != 1 or any(g is None for g in grids):
        return False
    known = [g for g in grids if g is not None]
    if len({(str(g.zero.dtype), int(g.zero)) for g in known}) != 1:
        return False
    _, scale, _, dequantize = weight
    rows = weight[0].shape[1]
    steps = np.repeat([g.step for g in known], rows // len(known)).astype(np.float64)
    graph, first = graph_of(projection.reshape), projection.reshape
    dequantize.replace_input_with(1, add_constant(graph, (scale / steps).astype(np.float32), "packed_scale"))
    dequantize.replace_input_with(2, add_constant(graph, np.zeros(rows, np.int8), "packed_zero"))
    bias = projection.bias
    if projection.add is not None and bias is not None:
        slot = next(i for i, v in enumerate(projection.add.inputs) if constant(v) is not None)
        packed = (np.broadcast_to(bias.reshape(-1), rows) / steps).astype(np.float32)
        projection.add.replace_input_with(slot, add_constant(graph, packed, "packed_bias"))
    one = add_constant(graph, np.ones((), np.float32), "packed_step")
    zero = add_constant(graph, known[0].zero, "packed_zero")
    dtype = ir.tensor(known[0].zero).dtype
    codes = add_node(first, "QuantizeLinear", [projection.out, one, zero], dtype=dtype, shape=sizes(projection.out))
    first.replace_input_with(0, codes)
    for grid in known:
        for node in grid.multiplies:
            source = next(v for v in node.inputs if scalar(v) is None)
            replace(node.outputs[0], source)
        replace(grid.quantize.outputs[0], grid.quantize.inputs[0])
    _retype(codes, projection.product, dtype)
    return True


def pack_projections(model: ir.Model) -> int:
    """Move the grids of q, k and v right behind their common int8 layer; return how many layers changed.

    Exact up to float rounding: ``round((x W s + b) / t) = round(x W (s / t) + b / t)``.
    """
    return sum(_pack(p) for p in _projections(model))


def _sliced_weight(projection: _Projection, index: int, width: int) -> ir.Value | None:
    """Return the weight of one part as a value, ``None`` if the weight is not constant."""
    graph, span = graph_of(projection.reshape), slice(index * width, (index + 1) * width)
    value = projection.product.inputs[1]
    quantized = quantized_constant(value)
    if quantized is None:
        weight = constant(value)
        return None if weight is None else add_constant(graph, weight[:, span], "part_weight")
    codes, scale, axis, node = quantized
    if axis != 1 and scale.size > 1:
        return None
    part = scale[span] if scale.size > 1 else scale
    inputs = [
        add_constant(graph, codes[:, span], "part_codes"),
        add_constant(graph, part if scale.size > 1 else part.reshape(()), "part_scale"),
        add_constant(graph, np.zeros(part.shape if scale.size > 1 else (), np.int8), "part_zero"),
    ]
    shape = [codes.shape[0], width]
    return add_node(
        projection.product, "DequantizeLinear", inputs, {"axis": 1}, dtype=ir.DataType.FLOAT, shape=shape
    )  # fmt: skip


def _split(projection: _Projection) -> bool:
    heads, depth = projection.heads
    width, bias = heads * depth, projection.bias
    batch, tokens, _ = projection.out.shape or (None, None, None)
    graph, at = graph_of(projection.reshape), projection.product
    if _sliced_weight(projection, 0, width) is None:
        return False
    target = add_constant(graph, np.array([0, 0, heads, depth], np.int64), "part_shape")
    for index, part in enumerate(projection.parts):
        weight = _sliced_weight(projection, index, width)
        if part is None or weight is None:
            continue
        flat = [batch, tokens, width]
        kind = projection.out.dtype or ir.DataType.FLOAT
        value = add_node(at, "MatMul", [at.inputs[0], weight], dtype=kind, shape=flat)
        if bias is not None:
            row = np.broadcast_to(bias.reshape(-1), width * len(projection.parts))
            vector = add_constant(graph, row[index * width : (index + 1) * width].copy(), "part_bias")
            value = add_node(at, "Add", [value, vector], dtype=kind, shape=flat)
        value = add_node(at, "Reshape", [value, target], dtype=kind, shape=[batch, tokens, heads, depth])
        order = {"perm": [0, 2, 1, 3]}
        value = add_node(at, "Transpose", [value], order, dtype=kind, shape=[batch, heads, tokens, depth])
        replace(part, value)
    return True


def split_projections(model: ir.Model) -> int:
    """Turn every fused projection that is cut into parts into one layer per part; return how many."""
    return sum(_split(p) for p in _projections(model))
