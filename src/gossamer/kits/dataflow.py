"""Which module feeds which: batch norms that follow a layer, and tensors that should stay in 8 bits.

Read off a symbolic trace (``torch.fx``) of models without data-dependent control flow. A module that
holds weights of its own, or has no children, is a leaf, so that layers in any form (float, simulated,
deployed) keep their module paths.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import ModelError
from gossamer.kits.folding import left_of
from gossamer.ops.sums import Add
from gossamer.runtimes.session import first_line

__all__ = ["Dataflow"]

_CLIPS = (nn.ReLU, nn.ReLU6)
_KEEPS = (nn.Identity, nn.Dropout, nn.MaxPool2d, nn.PixelShuffle)
_PASSES = (*_CLIPS, *_KEEPS)
"""Modules that a quantizer can be moved across, or that do nothing: they are no stop on the way to it."""
_MEANS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d)
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")


class _Tracer(fx.Tracer):
    """Records, beside the graph, the innermost module that returns each value."""

    def __init__(self) -> None:
        super().__init__()
        self.returned_by: dict[fx.Node, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = not any(True for _ in m.children()) and not isinstance(m, Add)
        return whole or "weight" in m._parameters or "weight" in m._buffers

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_module(m, forward, args, kwargs)
        if isinstance(out, fx.Proxy):
            self.returned_by.setdefault(out.node, self.path_of_module(m))
        return out


def _is_layer(module: nn.Module | None) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() in (2, 4)


class Dataflow:
    """The dataflow of a model, as it is once the batch norms that can be folded are.

    Attributes:
        norms: ``[layer, batch norm]`` paths where a norm alone reads what a linear layer or convolution puts out.

    Args:
        model: Any module that ``torch.fx`` can trace; is not changed.

    Raises:
        ModelError: It cannot be traced; says why.
    """

    def __init__(self, model: nn.Module) -> None:
        tracer = _Tracer()
        try:
            self._graph = tracer.trace(model)
        except Exception as err:
            raise ModelError(
                f"{type(model).__name__}: its dataflow cannot be traced ({first_line(err)}); batch norms are folded "
                f"and sums kept in 8 bits only in models without data-dependent control flow"
            ) from err
        self._returned_by = tracer.returned_by
        self._modules = dict(model.named_modules())
        called = [n.target for n in self._graph.nodes if n.op == "call_module"]
        self._once = {n for n in called if called.count(n) == 1}
        self.norms = self._norm_pairs()
        for _, name in self.norms:
            self._modules[name] = left_of(self._modules[name])

    def _module(self, node: Any) -> nn.Module | None:
        return self._modules[node.target] if isinstance(node, fx.Node) and node.op == "call_module" else None

    def _norm_pairs(self) -> list[list[str]]:
        pairs = []
        for node in self._graph.nodes:
            norm = self._module(node)
            if not isinstance(norm, _BatchNorm) or norm.running_mean is None or node.target not in self._once:
                continue
            source = node.args[0]
            if _is_layer(self._module(source)) and len(source.users) == 1 and source.target in self._once:
                pairs.append([source.target, node.target])
        return pairs

    def _is_sum(self, node: fx.Node) -> bool:
        tensors = [a for a in node.args[:2] if isinstance(a, fx.Node) and a.op != "get_attr"]
        return node.op in ("call_function", "call_method") and node.target in _ADDS and len(tensors) == 2

    def _end(self, node: fx.Node) -> fx.Node:
        """Return the last value on the way on which ``node`` only passes activations and pooling."""
        users = list(node.users)
        while len(users) == 1 and isinstance(self._module(users[0]), _PASSES):
            node, users = users[0], list(users[0].users)
        return node

    def _is_nonnegative(self, node: Any) -> bool:
        """Whether no value of ``node`` can be below 0, whatever the weights."""
        module = self._module(node)
        if isinstance(module, (*_KEEPS, *_MEANS)):
            return self._is_nonnegative(node.args[0])
        if isinstance(node, fx.Node) and self._is_sum(node):
            return all(self._is_nonnegative(a) for a in node.args[:2])
        return isinstance(module, _CLIPS)

    def unsigned_inputs(self, layers: Collection[str]) -> list[str]:
        """Return those of ``layers`` whose input cannot be negative."""
        calls = [n for n in self._graph.nodes if n.op == "call_module" and n.target in layers]
        signed = {n.target for n in calls if not self._is_nonnegative(n.args[0])}
        return [n for n in dict.fromkeys(c.target for c in calls) if n not in signed]

    # -- who reads what ----------------------------------------------------------------------------
    def _readers(self, readers: Collection[str]) -> dict[str, list[fx.Node]]:
        """Return the nodes by which each of ``readers`` (layers, ``Add`` modules) reads."""
        found: dict[str, list[fx.Node]] = {}
        for node in self._graph.nodes:
            made = self._returned_by.get(node) if self._is_sum(node) else None
            name = node.target if node.op == "call_module" else made
            if name in readers:
                found.setdefault(str(name), []).append(node)
        return found

    def sums(self) -> tuple[list[str], list[str]]:
        """Return the paths of ``Add`` modules in order, and descriptions of sums that are no such module."""
        nodes = [n for n in self._graph.nodes if self._is_sum(n)]
        made = [(n, self._returned_by.get(n)) for n in nodes]
        known = [p for _, p in made if p is not None and isinstance(self._modules[p], Add)]
        return list(dict.fromkeys(known)), [n.name for n, p in made if p not in known]

    def reads(self, readers: Collection[str]) -> dict[str, list[str]]:
        """Return names of the values that each of ``readers`` reads; equal names are one and the same value."""
        calls = self._readers(readers)
        return {
            name: [a.name for n in nodes for a in n.args[:2] if isinstance(a, fx.Node)] for name, nodes in calls.items()
        }

    def ends(self, layers: Collection[str]) -> tuple[list[str], list[str]]:
        """Return those of ``layers`` before which, and those behind which, there is no other of them."""
        calls = {node: name for name, nodes in self._readers(layers).items() for node in nodes}

        def reaches(node: fx.Node, back: bool, seen: set[fx.Node]) -> bool:
            for other in node.all_input_nodes if back else node.users:
                if other not in seen:
                    seen.add(other)
                    if other in calls or reaches(other, back, seen):
                        return True
            return False

        first, last = ([name for n, name in calls.items() if not reaches(n, back, set())] for back in (True, False))
        return list(dict.fromkeys(first)), list(dict.fromkeys(last))

    def read_by(self, name: str, readers: Collection[str]) -> bool:
        """Whether what a module puts out is read by ``readers`` alone, straight or through what rounding may cross."""
        ends = {node for nodes in self._readers(readers).values() for node in nodes}
        pending = [n for n in self._graph.nodes if n.op == "call_module" and n.target == name]
        while pending:
            for user in pending.pop().users:
                if user in ends:
                    continue
                if not isinstance(self._module(user), _PASSES):
                    return False
                pending.append(user)
        return True

    def _is_closed(self, end: fx.Node, layers: Collection[str]) -> bool:
        """Whether the value is rounded by its only reader, read by an activation in float, or returned."""
        users = list(end.users)
        if any(u.op == "output" for u in users):
            return True
        reader = self._module(users[0]) if len(users) == 1 else None
        return reader is not None and (users[0].target in layers or not isinstance(reader, _MEANS))

    def open_tensors(self, layers: Collection[str]) -> tuple[dict[str, str], list[str]]:
        """Return where values have to be rounded, so that no product or sum ends in float.

        A value made by one of ``layers`` or by a sum is closed if its only reader is another of
        ``layers``, which rounds it. Where several read it, or a sum or a mean, it must be rounded
        where it is made. What the model returns is left alone, and what a module reads that is no
        such layer (an activation that is not piecewise linear).

        Args:
            layers: Paths of the layers that round their inputs.

        Returns:
            Kind of grid (``"unsigned"``, ``"signed"``) by the path of the module whose output to round,
            and descriptions of values that no module returns.
        """
        points: dict[str, str] = {}
        lost = []
        for node in self._graph.nodes:
            if not (self._is_sum(node) or (node.op == "call_module" and node.target in layers)):
                continue
            end = self._end(node)
            if self._is_closed(end, layers):
                continue
            path = self._returned_by.get(end)
            if path:
                points[path] = "unsigned" if self._is_nonnegative(end) else "signed"
            else:
                lost.append(f"{end.name} (of {node.target if node.op == 'call_module' else node.name})")
        return points, lost
