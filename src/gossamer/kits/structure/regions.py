"""Coupled structures: units that run through several tensors and can only be removed from all at once.

A *region* is one axis of one tensor seen as a grid, one dimension of which counts the units. Axis 0 of a
query layer of 12 heads of width 64 is the grid (12, 64): heads run along dimension 0, query channels
along dimension 1. Nothing here knows what kind of model the tensors belong to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "Keep",
    "Region",
    "Structure",
    "count_elements",
    "cut",
    "decode_keep",
    "encode_keep",
    "enforce",
    "keep_all",
    "keep_first",
    "unit_sums",
]

Keep = dict[str, Tensor]
"""By structure: which of its units stay, bool [units]."""


@dataclass(frozen=True)
class Region:
    """One axis of a tensor along which a structure runs.

    Attributes:
        tensor: Name of the parameter or buffer in the model.
        axis: Axis of the tensor.
        grid: Shape as which the axis is seen; its product is the axis' length.
        dim: Dimension of the grid that counts the units.
    """

    tensor: str
    axis: int
    grid: tuple[int, ...]
    dim: int = 0

    @property
    def units(self) -> int:
        """Number of units."""
        return self.grid[self.dim]

    def view(self, x: Tensor) -> Tensor:
        """Return a view of ``x`` (shaped as the tensor) with the units as first dimension."""
        return x.movedim(self.axis, 0).unflatten(0, self.grid).movedim(self.dim, 0)


@dataclass(frozen=True)
class Structure:
    """Units that can be removed, with everything that goes with them.

    Attributes:
        name: Unique name (``"blocks.3.mlp"``).
        kind: What the units are (``"head"``).
        removes: Regions that lose a removed unit.
        scores: Regions whose values tell how much a unit matters.
        divisor: Sums over ``scores`` are divided by it, so that structures can be compared.
    """

    name: str
    kind: str
    removes: tuple[Region, ...]
    scores: tuple[Region, ...]
    divisor: float = 1.0

    @property
    def units(self) -> int:
        """Number of units."""
        return self.removes[0].units


def unit_sums(values: Mapping[str, Tensor], regions: Iterable[Region]) -> Tensor:
    """Return for every unit the sum of ``values`` over its share of the regions, [units].

    Args:
        values: By tensor name, shaped as the tensor.
        regions: Regions of one structure.
    """
    return torch.stack([r.view(values[r.tensor]).reshape(r.units, -1).sum(1) for r in regions]).sum(0)


def keep_all(structures: Iterable[Structure]) -> Keep:
    """Return masks that keep every unit."""
    return {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures}


def keep_first(structures: Iterable[Structure], counts: Mapping[str, int]) -> Keep:
    """Return masks that keep the first ``counts[name]`` units (all where a name is missing)."""
    return {s.name: torch.arange(s.units) < counts.get(s.name, s.units) for s in structures}


@torch.no_grad()
def enforce(tensors: Mapping[str, Tensor], structures: Iterable[Structure], keep: Keep) -> None:
    """Set everything that removed units hold to zero, in place.

    Args:
        tensors: Parameters and buffers by name.
        structures: The structures.
        keep: Their masks.
    """
    for s in structures:
        gone = (~keep[s.name]).nonzero().squeeze(1)
        if len(gone):
            for r in s.removes:
                x = tensors[r.tensor]
                r.view(x.data).index_fill_(0, gone.to(x.device), 0)


def _axes(structures: Iterable[Structure]) -> dict[str, dict[int, list[tuple[Region, str]]]]:
    """Return the regions by tensor and axis, each with the name of its structure."""
    found: dict[str, dict[int, list[tuple[Region, str]]]] = {}
    for s in structures:
        for r in s.removes:
            found.setdefault(r.tensor, {}).setdefault(r.axis, []).append((r, s.name))
    return found


def count_elements(
    shapes: Mapping[str, Sequence[int]], structures: Iterable[Structure], counts: Mapping[str, int]
) -> int:
    """Return how many elements the tensors would have if each structure kept ``counts[name]`` units.

    Args:
        shapes: Shapes of all tensors to count.
        structures: The structures.
        counts: Units kept, by structure.
    """
    axes = _axes(structures)
    total = 0
    for name, shape in shapes.items():
        sizes = list(shape)
        for axis, regions in axes.get(name, {}).items():
            grid = list(regions[0][0].grid)
            for r, owner in regions:
                grid[r.dim] = counts[owner]
            sizes[axis] = math.prod(grid)
        total += math.prod(sizes)
    return total


def _fit(module: nn.Module, name: str) -> None:
    """Set the sizes that common layers note beside their weights."""
    weight = getattr(module, name)
    if name != "weight" or weight is None:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Conv2d) and module.groups == 1:
        module.out_channels, module.in_channels = weight.shape[:2]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = weight.shape[0]


@torch.no_grad()
def cut(model: nn.Module, structures: Sequence[Structure], keep: Keep) -> None:
    """Cut removed units out of the model, in place; sizes noted by linear, convolution and norm layers follow.

    All parameters of the model become new objects, so that an optimiser starts afresh with every one of them.

    Args:
        model: The model that holds the tensors.
        structures: The structures.
        keep: Their masks.
    """
    for name, axes in _axes(structures).items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, leaf)
        new = old.detach()
        for axis, regions in axes.items():
            stays = torch.ones(regions[0][0].grid, dtype=torch.bool)
            for r, owner in regions:
                shape = [-1 if d == r.dim else 1 for d in range(len(r.grid))]
                stays &= keep[owner].cpu().view(shape)
            new = new.index_select(axis, stays.flatten().nonzero().squeeze(1).to(new.device))
        if new.shape != old.shape:
            is_parameter = isinstance(old, nn.Parameter)
            setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new)
            _fit(module, leaf)
    renewed = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        for leaf, p in list(module.named_parameters(recurse=False)):
            setattr(module, leaf, renewed[id(p)])


def encode_keep(keep: Keep) -> dict[str, str]:
    """Return masks as JSON: hexadecimal digits of 4 units each, the first unit as the highest bit."""
    texts = {}
    for name, mask in keep.items():
        bits = "".join("1" if k else "0" for k in mask.tolist())
        bits += "0" * (-len(bits) % 4)
        texts[name] = f"{int(bits, 2):0{len(bits) // 4}x}"
    return texts


def decode_keep(texts: Mapping[str, str], structures: Iterable[Structure]) -> Keep:
    """Undo ``encode_keep``."""
    keep = {}
    for s in structures:
        bits = "".join(f"{int(c, 16):04b}" for c in texts[s.name])
        keep[s.name] = torch.tensor([b == "1" for b in bits[: s.units]])
    return keep
