"""Small tools for rewriting an ONNX graph in memory (onnx_ir)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = [
    "add_constant",
    "add_node",
    "attribute",
    "chain",
    "constant",
    "graph_of",
    "only_user",
    "producer",
    "quantized_constant",
    "replace",
    "scalar",
    "sizes",
]


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array a value holds, ``None`` if it is computed from the input."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """Return the number a constant of one element holds, else ``None``."""
    array = constant(value)
    return None if array is None or array.size != 1 else float(array.reshape(()))


def producer(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """Return the node that makes ``value`` if it is of one of ``kinds``, else ``None``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in kinds else None


def only_user(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """Return the node that alone uses ``value`` if it is of one of ``kinds`` (any without), else ``None``."""
    uses = [] if value is None else list(value.uses())
    if value is None or len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if not kinds or node.op_type in kinds else None


def sizes(value: ir.Value | None) -> list[int | str] | None:
    """Return the shape of a value, free dimensions by name; ``None`` if its rank is not known."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else str(d) for d in value.shape]


def attribute(node: ir.Node, name: str) -> Any:
    """Return the value of an attribute, ``None`` if it is not set."""
    found = node.attributes.get(name)
    return None if found is None else found.value


def quantized_constant(value: ir.Value | None) -> tuple[np.ndarray, np.ndarray, int, ir.Node] | None:
    """Return (codes, scales, axis, node) of a dequantized int8 constant with zero point 0, else ``None``."""
    node = producer(value, "DequantizeLinear")
    if node is None:
        return None
    codes, scale = constant(node.inputs[0]), constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if codes is None or scale is None or codes.dtype != np.int8 or (zero is not None and zero.any()):
        return None
    axis = attribute(node, "axis")
    return codes, scale.reshape(-1), 1 if axis is None else int(axis), node


def _fresh(graph: ir.Graph, hint: str) -> str:
    index = len(graph.initializers)
    while f"{hint}_{index}" in graph.initializers:
        index += 1
    return f"{hint}_{index}"


def add_constant(graph: ir.Graph, array: np.ndarray, hint: str) -> ir.Value:
    """Store ``array`` in the graph under a new name that starts with ``hint``."""
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape))
    name = _fresh(graph, hint)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def graph_of(node: ir.Node) -> ir.Graph:
    """Return the graph that holds ``node``."""
    if not isinstance(node.graph, ir.Graph):
        raise TypeError(f"node {node.name!r} of kind {node.op_type} belongs to no graph")
    return node.graph


def add_node(  # noqa: PLR0913 - what a node consists of
    before: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any] | None = None,
    *,
    dtype: ir.DataType,
    shape: Sequence[int | str | ir.SymbolicDim | None] | None,
) -> ir.Value:
    """Put a new node before ``before`` and return its output."""
    node = ir.node(kind, list(inputs), attributes or {})
    out = node.outputs[0]
    out.type = ir.TensorType(dtype)
    if shape is not None:
        out.shape = ir.Shape(list(shape))
    graph_of(before).insert_before(before, node)
    return out


def replace(old: ir.Value | None, new: ir.Value | None) -> None:
    """Let every user of ``old`` use ``new``."""
    if old is None or new is None:
        raise TypeError("an absent input cannot be replaced")
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _chain(value: ir.Value, kinds: frozenset[str]) -> Iterator[ir.Node]:
    """Yield the single-use nodes that follow ``value``, ending with the first that is not of ``kinds``."""
    node = only_user(value)
    while node is not None:
        yield node
        node = only_user(node.outputs[0]) if node.op_type in kinds else None


def chain(value: ir.Value, *kinds: str) -> list[ir.Node]:
    """Return the single-use nodes after ``value``; all but the last are of ``kinds``."""
    return list(_chain(value, frozenset(kinds)))
