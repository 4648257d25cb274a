"""One forward pass under torch's own counter: every product with its module, MACs and bit widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from gossamer.ops.steps import StepKind, steps_of

__all__ = ["Product", "Trace", "storage_of", "tensors_in", "trace"]

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
if _CPU_ATTENTION not in flop_registry:  # torch 2.14 counts every fused attention but this one
    flop_registry[_CPU_ATTENTION] = flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]
_CONVOLUTIONS = frozenset({torch.ops.aten.convolution, torch.ops.aten._convolution})


@dataclass(frozen=True)
class Product:
    """One executed matrix product, convolution, fused attention, or sum of differences.

    Attributes:
        module: Innermost module that ran it.
        op: Name of the operator (``"aten.addmm"``).
        steps: Inner steps for the whole batch: terms that are added up.
        kind: Operations of one step.
        weighted: Whether one operand is a weight; else both are activations.
    """

    module: nn.Module
    op: str
    steps: int
    kind: StepKind
    weighted: bool

    @property
    def macs(self) -> int:
        """Multiply-accumulates for the whole batch: steps that multiply."""
        return self.steps if self.kind.multiplications else 0


@dataclass
class Trace:
    """What one forward pass did.

    Attributes:
        products: Executed products, in order.
        output_bytes: Bytes that each layer put out, by module; views and in-place results of its
            input count 0. Layers are childless modules and, as a whole, those that declare a width.
        peak_bytes: Largest sum of input and output bytes of one layer.
    """

    products: list[Product] = field(default_factory=list)
    output_bytes: dict[nn.Module, int] = field(default_factory=dict)
    peak_bytes: int = 0


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def storage_of(x: Tensor) -> int:
    """Return what identifies the memory of ``x``; valid while that memory is held."""
    return x.untyped_storage()._cdata


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the values of ``tensors``, each memory counted once."""
    unique = {storage_of(x): x for x in tensors}
    return sum(x.numel() * x.element_size() for x in unique.values())


def _layers(root: nn.Module) -> set[nn.Module]:
    """Return the modules whose outputs count: childless ones and, as a whole, those that declare their width."""
    declaring = {m for m in root.modules() if hasattr(m, "weight_bits")}
    inside = {part for m in declaring for part in m.modules() if part is not m}
    childless = {m for m in root.modules() if next(m.children(), None) is None}
    return (childless | declaring) - inside


class _Stack:
    """The modules that are running, outermost first, and what their calls put out."""

    def __init__(self, root: nn.Module, found: Trace) -> None:
        self.running: list[nn.Module] = [root]
        self._known = set(root.modules())
        self._layers = _layers(root)
        self._found = found

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running.append(module)

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.running.pop()
        if module not in self._layers:
            return
        given, made = list(tensors_in(args)), list(tensors_in(out))
        old = {storage_of(x) for x in given}
        size = _num_bytes([x for x in made if storage_of(x) not in old])
        self._found.output_bytes[module] = self._found.output_bytes.get(module, 0) + size
        self._found.peak_bytes = max(self._found.peak_bytes, _num_bytes(given) + size)

    @property
    def innermost(self) -> nn.Module:
        return next(m for m in reversed(self.running) if m in self._known)


def _recorder(op: Any, formula: Callable[..., int], stack: _Stack, weights: set[int], found: Trace) -> Any:
    def record(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        flops = formula(*args, out_val=out_val, **kwargs)
        module = stack.innermost
        weighted = (
            hasattr(module, "weight_bits")
            or op in _CONVOLUTIONS
            or any(storage_of(x) in weights for x in tensors_in([args, kwargs]))
        )
        found.products.append(Product(module, str(op), flops // 2, steps_of(op), weighted))
        return flops

    record._get_raw = True  # type: ignore[attr-defined]  # torch then hands over tensors, not shapes
    return record


@contextmanager
def _tracked(stack: _Stack) -> Iterator[None]:
    handles = [
        register_module_forward_pre_hook(stack.enter),
        register_module_forward_hook(stack.leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for gradients: torch's counter hooks every one that a module is handed as its input."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    """Run ``model(*inputs)`` once without gradients, as it stands, and return what it did.

    Products are whatever ``torch.utils.flop_counter`` knows (including what was added to it by
    ``register_flop_formula``); a module that runs no product of its own appears in none.
    """
    found = Trace()
    stack = _Stack(model, found)
    weights = {storage_of(x) for x in (*model.parameters(), *model.buffers())}
    mapping = {op: _recorder(op, formula, stack, weights, found) for op, formula in flop_registry.items()}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.no_grad(), _frozen(model), _tracked(stack), counter:
        model(*inputs)
    return found
