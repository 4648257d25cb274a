"""Layers that pack what they keep. Each holds exactly what the plain layer holds, under the same names.

In training with gradients a layer computes through ``ops.compressed``; in evaluation it is the plain layer. In
training without gradients (the first pass of reentrant checkpointing) it only moves its running ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gossamer.ops import compressed
from gossamer.ops.act_store import ActStore
from gossamer.ops.attention import MatMul

__all__ = ["PACKED", "is_packed", "packs", "plain", "stores"]


def _packing(module: nn.Module, *kept: tuple[nn.Module, Tensor]) -> bool:
    if not module.training:
        return False
    if not torch.is_grad_enabled():
        for store, x in kept:
            store.observe(x)  # type: ignore[operator]
    return torch.is_grad_enabled()


class PackedLinear(nn.Linear):
    """Keeps its input packed."""

    store: ActStore

    def forward(self, x: Tensor) -> Tensor:
        if _packing(self, (self.store, x)):
            return compressed.linear(x, self.weight, self.bias, self.store)
        return super().forward(x)


class PackedConv2d(nn.Conv2d):
    """Keeps its input packed."""

    store: ActStore

    def forward(self, x: Tensor) -> Tensor:
        if _packing(self, (self.store, x)):
            geometry = (self.stride, self.padding, self.dilation, self.groups)
            return compressed.conv2d(x, self.weight, self.bias, geometry, self.store)
        return super().forward(x)


class PackedLayerNorm(nn.LayerNorm):
    """Keeps its input packed, mean and deviation exact."""

    store: ActStore

    def forward(self, x: Tensor) -> Tensor:
        if _packing(self, (self.store, x)):
            return compressed.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, self.store)
        return super().forward(x)


class PackedBatchNorm2d(nn.BatchNorm2d):
    """Keeps its input packed, the batch's statistics exact."""

    store: ActStore

    def forward(self, x: Tensor) -> Tensor:
        if not _packing(self, (self.store, x)):
            return super().forward(x)
        self._check_input_dim(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        running = (self.running_mean, self.running_var)
        momentum = self.momentum or 0.0
        return compressed.batch_norm(x, self.weight, self.bias, running, momentum, self.eps, self.store)


class PackedGELU(nn.GELU):
    """Keeps its input packed."""

    store: ActStore
    approximate = "none"  # of activations that have no such choice

    def forward(self, x: Tensor) -> Tensor:
        if _packing(self, (self.store, x)):
            return compressed.gelu(x, self.store, self.approximate)
        return super().forward(x)


class PackedReLU(nn.ReLU):
    """Keeps one bit per element, which loses nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return compressed.relu(x) if _packing(self) else super().forward(x)


class PackedReLU6(nn.ReLU6):
    """Keeps one bit per element, which loses nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return compressed.relu(x, 6.0) if _packing(self) else super().forward(x)


class PackedSoftmax(nn.Softmax):
    """Keeps its output packed; with a second store its input too, as the release does."""

    store: ActStore

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if not torch.is_grad_enabled():
            y = super().forward(x)
            self.store.observe(y)
            return y
        given = self._modules.get("input_store")
        return compressed.softmax(x, -1 if self.dim is None else self.dim, self.store, given)  # type: ignore[arg-type]


class PackedMatMul(MatMul):
    """Keeps both factors packed; a softmax's output is kept once for softmax and product."""

    store: ActStore
    second: ActStore

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if _packing(self, (self.store, a), (self.second, b)):
            return compressed.matmul(a, b, self.store, self.second)
        return super().forward(a, b)


PACKED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
    nn.LayerNorm: PackedLayerNorm,
    nn.BatchNorm2d: PackedBatchNorm2d,
    nn.GELU: PackedGELU,
    nn.ReLU: PackedReLU,
    nn.ReLU6: PackedReLU6,
    nn.Softmax: PackedSoftmax,
    MatMul: PackedMatMul,
}
"""Packing layer of every plain one."""
_NAMES = ("store", "second", "input_store")


def _recast(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Return a ``cls`` that holds everything ``module`` holds: parameters, buffers, hooks, attributes."""
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    return new


def packs(module: nn.Module, plain_class: type[nn.Module], kept: Sequence[ActStore]) -> nn.Module:
    """Return the packing layer of ``module``, which computes like ``plain_class``.

    Args:
        module: A plain layer.
        plain_class: A key of ``PACKED``.
        kept: Its stores: one; two of a product; one or two of a softmax (output, input); none of a ReLU.
    """
    new = _recast(module, PACKED[plain_class])
    new._plain_class = type(module)  # type: ignore[assignment]
    names = ("store", "input_store") if plain_class is nn.Softmax else _NAMES
    for name, store in zip(names, kept, strict=False):
        new.add_module(name, store)
    return new


def is_packed(module: nn.Module) -> bool:
    """Return whether ``packs`` made the layer."""
    return "_plain_class" in module.__dict__


def plain(module: nn.Module) -> nn.Module:
    """Return the plain layer of a packing one, with what it holds now."""
    new = _recast(module, module._plain_class)  # type: ignore[arg-type]
    for name in _NAMES:
        new._modules.pop(name, None)
    del new.__dict__["_plain_class"]
    return new


def stores(model: nn.Module) -> Iterator[tuple[str, ActStore]]:
    """Yield the stores of a model's packing layers by path."""
    for path, module in model.named_modules():
        if isinstance(module, ActStore):
            yield path, module
