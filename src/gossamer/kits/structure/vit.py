"""The structures of a vision transformer: embedding channels, heads, query, value and MLP channels.

Source of the five structures and of what each takes along: NViT (arXiv 2110.04869, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gossamer.core.errors import ModelError, RecipeError, nearest
from gossamer.kits.structure.regions import Keep, Region, Structure, cut
from gossamer.models.contracts import BlockView, TokenView
from gossamer.models.timm_adapter import attention_widths, mlp_hidden, split_attention, token_view
from gossamer.models.widths import ViTWidths

__all__ = ["EMBED", "KINDS", "counts_of", "mlp_matrices", "open_blocks", "slice_vit", "vit_structures", "widths_from"]

KINDS = ("emb", "head", "qk", "v", "mlp")
EMBED = "emb"
"""Name of the structure that all blocks share through the residual stream."""
_TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed")
_STEM = ("patch_embed.proj",)
_NORMS = ("patch_embed.norm", "norm_pre", "norm", "fc_norm")
_HEAD_SUMS, _WIDTH_SUMS = 12.0, 2.0
"""Divisors of the release for heads (it divides by 6 for the six tensors, then by 2 as for Q and V) and widths."""


def _regions(model: nn.Module, layer: str, axis: int, grid: tuple[int, ...], dim: int = 0) -> list[Region]:
    """Return the regions of a layer's weight along ``axis``, and of its bias along axis 0."""
    module = model.get_submodule(layer)
    found = [Region(f"{layer}.weight", axis, grid, dim)]
    if axis == 0 and getattr(module, "bias", None) is not None:
        found.append(Region(f"{layer}.bias", 0, grid, dim))
    return found


@dataclass(frozen=True)
class _Block:
    """What is needed of a block, by path."""

    model: nn.Module
    view: BlockView

    @property
    def widths(self) -> tuple[int, int, int]:
        return attention_widths(self.model.get_submodule(self.view.attention))

    @property
    def hidden(self) -> int:
        return int(self._last.in_features)

    @property
    def _last(self) -> nn.Linear:
        last = getattr(self.model.get_submodule(self.view.mlp), "fc2", None)
        if not isinstance(last, nn.Linear):
            raise ModelError(f"MLP at {self.view.mlp!r} has no linear layer fc2; expected timm's Mlp or a gated one")
        return last

    def first(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the MLP's first layers with the grid of their outputs (gated ones hold two values a channel)."""
        mlp, hidden = self.view.mlp, self.hidden
        layers = [(n, m) for n, m in self.model.get_submodule(mlp).named_children() if n.startswith("fc1")]
        found: list[tuple[str, tuple[int, ...]]] = []
        for name, layer in layers:
            rows = layer.out_features if isinstance(layer, nn.Linear) else 0
            if rows not in (hidden, 2 * hidden):
                raise ModelError(f"MLP layer {mlp}.{name}: {rows} outputs; expected {hidden} or {2 * hidden}")
            found.append((f"{mlp}.{name}", (hidden,) if rows == hidden else (2, hidden)))
        return found

    def embedding(self, width: int) -> tuple[list[Region], list[Region]]:
        """Return the regions of the embedding channels: all, and those that are scored."""
        a, b, grid = self.view.attention, self.view.name, (width,)
        scored = _regions(self.model, f"{a}.proj", 0, grid)
        scored += [r for layer, _ in self.first() for r in _regions(self.model, layer, 1, grid)]
        scored += _regions(self.model, f"{self.view.mlp}.fc2", 0, grid)
        scored += [r for n in "qkv" for r in _regions(self.model, f"{a}.{n}", 1, grid)]
        rest = [r for n in ("norm1", "norm2") for r in _regions(self.model, f"{b}.{n}", 0, grid)]
        for scale in ("ls1", "ls2"):
            if hasattr(self.model.get_submodule(f"{b}.{scale}"), "gamma"):
                rest.append(Region(f"{b}.{scale}.gamma", 0, grid))
        return scored + rest, scored

    def structures(self) -> Iterator[Structure]:
        """Return heads, query, value and MLP channels."""
        a, b = self.view.attention, self.view.name
        heads, qk, v = self.widths
        grids = {"q": (heads, qk), "k": (heads, qk), "v": (heads, v)}

        def rows(layer: str, dim: int) -> list[Region]:
            return _regions(self.model, f"{a}.{layer}", 0, grids[layer], dim)

        def columns(dim: int) -> list[Region]:
            return [Region(f"{a}.proj.weight", 1, (heads, v), dim)]

        projections = [r for n in "qkv" for r in rows(n, 0)]
        yield Structure(f"{b}.head", "head", (*projections, *columns(0)), tuple(projections), _HEAD_SUMS)
        yield Structure(f"{b}.qk", "qk", (*rows("q", 1), *rows("k", 1)), tuple(rows("q", 1)), _WIDTH_SUMS)
        yield Structure(f"{b}.v", "v", (*rows("v", 1), *columns(1)), tuple(rows("v", 1)), _WIDTH_SUMS)
        first = [r for n, grid in self.first() for r in _regions(self.model, n, 0, grid, len(grid) - 1)]
        last = Region(f"{self.view.mlp}.fc2.weight", 1, (self.hidden,))
        yield Structure(f"{b}.mlp", "mlp", (*first, last), tuple(first))


def _outside(model: nn.Module, width: int, blocks: Sequence[str]) -> tuple[list[Region], list[Region]]:
    """Return the regions of the embedding channels outside the blocks: all, and those that are scored.

    Raises:
        ModelError: A parameter whose part in the residual stream is not known.
    """
    regions, scored, grid = [], [], (width,)
    for name, p in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if name.startswith(tuple(f"{b}." for b in blocks)):
            continue
        if name in _TOKENS:
            regions.append(Region(name, p.ndim - 1, grid))
        elif layer in (*_STEM, *_NORMS):
            regions.append(Region(name, 0, grid))
            scored += [regions[-1]] if layer in _STEM else []
        elif layer in ("head", "head_dist") and isinstance(model.get_submodule(layer), nn.Linear):
            regions += [Region(name, 1, grid)] if leaf == "weight" else []
        else:
            raise ModelError(
                f"parameter {name!r} {list(p.shape)}: its part in the embedding is not known; expected timm's ViT or "
                f"DeiT. Leave 'emb' out of the structures"
            )
    return regions, scored


def open_blocks(model: nn.Module) -> TokenView:
    """Open every attention and give queries, keys and values layers of their own; returns the model's view.

    Raises:
        ModelError: The model is no plain vision transformer, or a layer ties widths together.
    """
    view = token_view(model)
    for block in view.blocks:
        split_attention(model, block.attention)
        tied = getattr(model.get_submodule(block.mlp), "norm", None)
        if not isinstance(tied, nn.Identity | None):
            what = type(tied).__name__
            raise ModelError(f"'{block.mlp}.norm' is {what}, which ties the MLP's channels; expected no norm there")
    return view


def vit_structures(model: nn.Module, kinds: Sequence[str] = KINDS) -> list[Structure]:
    """Return the structures of a model that ``open_blocks`` has opened: embedding first, then block by block.

    Args:
        model: The model.
        kinds: Which of ``KINDS``.

    Raises:
        RecipeError: An unknown kind.
        ModelError: The model is not of the kind expected.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise RecipeError(f"structure {kind!r}; allowed are {', '.join(KINDS)}{nearest(kind, KINDS)}")
    view = token_view(model)
    blocks = [_Block(model, b) for b in view.blocks]
    found = [s for block in blocks for s in block.structures() if s.kind in kinds]
    if "emb" in kinds:
        removes, scores = _outside(model, view.width, [b.name for b in view.blocks])
        for block in blocks:
            more, scored = block.embedding(view.width)
            removes, scores = removes + more, scores + scored
        found.insert(0, Structure(EMBED, "emb", tuple(removes), tuple(scores), float(len(blocks))))
    return found


def counts_of(keep: Keep) -> dict[str, int]:
    """Return the number of units that masks keep, by structure."""
    return {name: int(mask.sum()) for name, mask in keep.items()}


def widths_from(view: TokenView, dense: ViTWidths, counts: Mapping[str, int]) -> ViTWidths:
    """Return widths in which the structures of ``counts`` have those units, all else is as in ``dense``.

    Args:
        view: The model's blocks.
        dense: Its widths.
        counts: Units by structure name.
    """

    def row(kind: str, full: Sequence[int]) -> tuple[int, ...]:
        return tuple(counts.get(f"{b.name}.{kind}", n) for b, n in zip(view.blocks, full, strict=True))

    return ViTWidths(
        counts.get(EMBED, dense.embed),
        row("head", dense.heads), row("qk", dense.qk), row("v", dense.v), row("mlp", dense.mlp),
    )  # fmt: skip


def slice_vit(model: nn.Module, structures: Sequence[Structure], keep: Keep) -> nn.Module:
    """Cut removed units out of an opened vision transformer, in place, and return it.

    Args:
        model: The model.
        structures: Its structures.
        keep: Their masks.
    """
    view, counts = token_view(model), counts_of(keep)
    cut(model, structures, keep)
    for block in view.blocks:
        attention: Any = model.get_submodule(block.attention)
        for kind, name in (("head", "num_heads"), ("qk", "qk_dim"), ("v", "v_dim")):
            setattr(attention, name, counts.get(f"{block.name}.{kind}", getattr(attention, name)))
    width = counts.get(EMBED, view.width)
    for name in ("embed_dim", "num_features", "head_hidden_size"):
        if getattr(model, name, None) == view.width:
            setattr(model, name, width)
    return model


def mlp_matrices(model: nn.Module, block: BlockView) -> int:
    """Return how many matrices of embedding x hidden channels an MLP multiplies by (2; 3 where it is gated)."""
    return mlp_hidden(model, block) // _Block(model, block).hidden
