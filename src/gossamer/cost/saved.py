"""What a training forward pass keeps for its backward pass: every memory once, with its module and operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.cost.counting import storage_of, tensors_in

__all__ = ["SavedTensor", "by_operator", "saved_tensors"]

_PLAIN_NAMES = {"__matmul__": "matmul", "__mul__": "mul", "__rmul__": "mul", "__truediv__": "div", "__pow__": "pow"}


@dataclass(frozen=True)
class SavedTensor:
    """One memory that waits for the backward pass.

    Attributes:
        module: Innermost module that saved it first.
        op: Operator that saved it first: a torch function (``"linear"``), or the class of the module that called
            an autograd function.
        shape: Shape of what was saved.
        dtype: Its type.
        bytes: Size of the whole memory (a saved view keeps all of what it looks at).
        weight_copy: Whether it is a copy of a parameter in another type (autocast makes them).
    """

    module: nn.Module
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    weight_copy: bool


class _Names(TorchFunctionMode):
    """Knows which torch function is running."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        self.running.append(_PLAIN_NAMES.get(name, name))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.running.pop()


class _WeightCopies(TorchDispatchMode):
    """Remembers the memory of parameters' copies in another type."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self._own = own
        self._held: list[Tensor] = []  # an address means nothing once its memory is free
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and storage_of(args[0]) in self._own:
            self._held.append(out)
            self.storages.add(storage_of(out))
        return out


class _Keeper:
    """The saved-tensor hook: files every memory under the module and operator that saved it first."""

    def __init__(self, model: nn.Module, names: _Names) -> None:
        self.own = {storage_of(x) for x in (*model.parameters(), *model.buffers())}
        self.found: dict[int, tuple[Tensor, nn.Module, str]] = {}
        self._running: list[nn.Module] = [model]
        self._known = set(model.modules())
        self._names = names

    def enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._running.pop()

    def add(self, x: Tensor, op: str) -> None:
        if storage_of(x) not in self.own:
            self.found.setdefault(storage_of(x), (x.detach(), self.innermost, op))

    @property
    def innermost(self) -> nn.Module:
        return next(m for m in reversed(self._running) if m in self._known)

    def pack(self, x: Tensor) -> Tensor:
        self.add(x, self._names.running[0] if self._names.running else type(self.innermost).__name__)
        return x.detach()

    def add_attributes(self, out: Any) -> None:
        """Add tensors that autograd functions keep as plain attributes of their context, past the hooks."""
        waiting = [x.grad_fn for x in tensors_in(out) if x.grad_fn is not None]
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                for x in tensors_in(list(vars(node).values())):
                    self.add(x, type(node).__name__.removesuffix("Backward"))
            new = {n for n, _ in node.next_functions if n is not None} - seen
            seen |= new
            waiting.extend(new)


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Put modes, buffers and torch's random state back."""
    modes = {m: m.training for m in model.modules()}
    before = {name: b.clone() for name, b in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])


def saved_tensors(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[SavedTensor]:
    """Return every memory that a training forward pass keeps for the backward pass, in order.

    Parameters and buffers themselves are left out. A memory that several operators save is filed where it was
    saved first. Tensors that autograd functions keep as attributes of their context count like those given to
    ``save_for_backward``. Modes, buffers and torch's random state are as before afterwards.

    Args:
        model: Any module.
        inputs: Its arguments.
        dtype: Run under autocast to this type.
    """
    names = _Names()
    keeper = _Keeper(model, names)
    copies = _WeightCopies(keeper.own)
    device = inputs[0].device.type if inputs[0].device.type != "meta" else "cpu"
    handles = [
        register_module_forward_pre_hook(keeper.enter),
        register_module_forward_hook(keeper.leave, always_call=True),
    ]
    try:
        with (
            _as_before(model),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(keeper.pack, lambda x: x),
            torch.autocast(device, dtype, enabled=dtype is not None),
            copies,
            names,
        ):
            keeper.add_attributes(model.train()(*inputs))
    finally:
        for handle in handles:
            handle.remove()
    return [
        SavedTensor(m, op, tuple(x.shape), x.dtype, x.untyped_storage().nbytes(), storage in copies.storages)
        for storage, (x, m, op) in keeper.found.items()
    ]


def by_operator(found: Sequence[SavedTensor]) -> dict[str, int]:
    """Return bytes by operator, largest first."""
    sums: dict[str, int] = {}
    for s in found:
        sums[s.op] = sums.get(s.op, 0) + s.bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
