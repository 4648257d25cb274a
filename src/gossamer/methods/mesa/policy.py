"""Which layers pack, in how many groups, and which are left exact."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from gossamer.core.errors import ModelError, RecipeError, nearest
from gossamer.cost.ledger import default_example
from gossamer.cost.saved import saved_tensors
from gossamer.methods.mesa.layers import is_packed
from gossamer.models.contracts import AttentionView
from gossamer.models.timm_adapter import sort_attention, torch_kind
from gossamer.ops.act_store import ActStore
from gossamer.ops.attention import MatMul

__all__ = [
    "CLASSES",
    "KINDS",
    "Groups",
    "Policy",
    "choose",
    "classes_by_name",
    "packed_attention",
    "saved_per_image",
]

CLASSES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    MatMul: "matmul",
    nn.Softmax: "softmax",
    nn.GELU: "gelu",
    nn.LayerNorm: "layernorm",
    nn.ReLU: "relu",
    nn.ReLU6: "relu",
    nn.Conv2d: "conv",
    nn.BatchNorm2d: "batchnorm",
}
"""Kind of every plain layer that can pack."""
KINDS = tuple(dict.fromkeys(CLASSES.values()))
_KEEP_NOTHING = {
    "Identity", "Dropout", "DropPath", "Flatten", "MatMul", "Softmax", "ActStore", "AdaptiveAvgPool2d",
    "FastAdaptiveAvgPool", "AvgPool2d",
}  # fmt: skip
"""Layers without a tensor worth packing (dropout's masks stay exact); attention's own are listed with it."""
_ATTENTION = {"scores": MatMul, "softmax": nn.Softmax, "values": MatMul}

Groups = str | int | dict[str, int]


@dataclass(frozen=True)
class Policy:
    """What the user asks for.

    Attributes:
        kinds: Kinds of layers that pack.
        include: Patterns of module paths; a layer must match one.
        exclude: Patterns of module paths; a layer must match none.
        groups: ``"heads"``, a number, or ``{"channels": n}``.
    """

    kinds: Sequence[str]
    include: Sequence[str]
    exclude: Sequence[str]
    groups: Groups

    def check(self) -> None:
        """Raise ``RecipeError`` for a kind or a grouping that does not exist."""
        for kind in self.kinds:
            if kind not in KINDS:
                raise RecipeError(f"mesa: kind {kind!r}; allowed are {', '.join(KINDS)}{nearest(kind, KINDS)}")
        g = self.groups
        fine = g == "heads" or (isinstance(g, int) and g >= 1)
        if isinstance(g, dict):
            fine = g.keys() == {"channels"} and g["channels"] >= 1
        if not fine:
            raise RecipeError(f"mesa: grouping={g!r}; allowed are 'heads', a number above 0, or {{channels: n}}")

    def takes(self, path: str, kind: str) -> bool:
        """Return whether the layer at ``path`` is to pack."""
        wanted = any(fnmatchcase(path, p) for p in self.include)
        return kind in self.kinds and wanted and not any(fnmatchcase(path, p) for p in self.exclude)

    def count(self, width: int, heads: int, *, attention: bool) -> int:
        """Return the number of groups of ``width`` channels near an attention of ``heads`` heads."""
        if isinstance(self.groups, dict):
            return heads if attention else max(1, width // self.groups["channels"])
        return self.groups if isinstance(self.groups, int) else heads


def _class_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the plain class that the layer computes like, if it can pack."""
    own = torch_kind(module)
    found = next((c for c in CLASSES if issubclass(own, c) and own.forward is c.forward), None)
    if found is None or hasattr(module, "parametrizations"):
        return None
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return None
    if isinstance(module, nn.BatchNorm2d) and (module.momentum is None or not module.track_running_stats):
        return None
    return found


def _near(path: str, views: Sequence[AttentionView]) -> int:
    """Return the heads of the attention closest in the tree; of the last among equals, 1 where there is none."""
    if not views:
        return 1
    parts = path.split(".")

    def common(view: AttentionView) -> int:
        pairs = zip(parts, view.name.split("."), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(parts))

    return max(enumerate(views), key=lambda item: (common(item[1]), item[0]))[1].heads


def _width(module: nn.Module, last: int) -> int:
    """Return the channels that come in; an activation has those that the layer before it put out."""
    for name in ("in_features", "in_channels", "num_features"):
        if hasattr(module, name):
            return int(getattr(module, name))
    return int(module.normalized_shape[-1]) if isinstance(module, nn.LayerNorm) else last


def choose(model: nn.Module, policy: Policy) -> dict[str, Any]:
    """Return, as plain JSON, the layers that are to pack and do not yet.

    Returns:
        ``packed``: {path: class, groups, dim}; ``opened``: attention to open (or to hold open) for it; ``exact``:
        layers that would keep activations but cannot pack, and attention that cannot be opened.
    """
    views, strangers = sort_attention(model)
    inside = {v.name for v in views}
    packed: dict[str, dict[str, Any]] = {}
    opened, exact = [], [f"{s} ({type(model.get_submodule(s)).__name__})" for s in strangers]
    for view in views:
        attention = model.get_submodule(view.name)
        groups = policy.count(0, view.heads, attention=True)
        for leaf, cls in _ATTENTION.items():
            path = f"{view.name}.{leaf}"
            present = type(getattr(attention, leaf)) is cls if view.opened else True
            if present and policy.takes(path, CLASSES[cls]):
                packed[path] = {"class": cls.__name__, "groups": groups, "dim": 1}
        if any(f"{view.name}.{leaf}" in packed for leaf in _ATTENTION):
            opened.append(view.name)
    width, channels_last = 1, True
    for path, module in model.named_modules():
        kind = _class_of(module)
        own_products = path.rpartition(".")[0] in inside and path.rpartition(".")[2] in _ATTENTION
        if kind is not None and not own_products and kind not in (MatMul, nn.Softmax):
            channels_last = channels_last if kind in (nn.GELU, nn.ReLU, nn.ReLU6) else kind in (nn.Linear, nn.LayerNorm)
            if policy.takes(path, CLASSES[kind]):
                groups = policy.count(_width(module, width), _near(path, views), attention=False)
                packed[path] = {"class": kind.__name__, "groups": groups, "dim": -1 if channels_last else 1}
        elif kind is None and not is_packed(module) and next(module.children(), None) is None:
            name = type(module).__name__
            if path and name not in _KEEP_NOTHING and not isinstance(module, ActStore):
                exact.append(f"{path} ({name})")
        width = int(getattr(module, "out_features", getattr(module, "out_channels", width)))
    return {"packed": packed, "opened": opened, "exact": exact}


def packed_attention(model: nn.Module) -> list[str]:
    """Return the paths of open attention in which something packs."""
    opened = [v.name for v in sort_attention(model)[0] if v.opened]
    return [n for n in opened if any(is_packed(getattr(model.get_submodule(n), leaf)) for leaf in _ATTENTION)]


def saved_per_image(model: nn.Module) -> int | None:
    """Return the bytes that a training pass keeps for an image; ``None`` if the model does not tell its size."""
    try:
        shape = default_example(model).shape
    except ModelError:
        return None
    twin = copy.deepcopy(model)  # its ranges move, the model's stay
    example = torch.zeros(2, *shape[1:], device=next(model.parameters()).device)
    kept = saved_tensors(twin, (example,))
    return sum(s.bytes for s in kept) // len(example)


def classes_by_name() -> Mapping[str, type[nn.Module]]:
    """Return the plain classes by the names that edits use."""
    return {c.__name__: c for c in CLASSES}
