"""What token-reducing methods share at the level of the model: installing blocks, costs, pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, RecipeError
from gossamer.models.contracts import TokenView, replace_module
from gossamer.models.timm_adapter import attention_widths, mlp_hidden, open_attention, token_view
from gossamer.ops.token_blocks import SizeWeightedPool, TokenBlock
from gossamer.ops.token_rates import TokenMacs
from gossamer.ops.tokens import TokenTrack, find_track

__all__ = [
    "describe_tokens",
    "install_blocks",
    "parse_macs",
    "reducible_view",
    "source_maps",
    "swap_blocks",
    "token_blocks",
    "token_macs",
]


def reducible_view(
    model: nn.Module, method: str, num_tokens: int | None = None, num_prefix: int | None = None
) -> TokenView:
    """Return the token view of a model whose tokens have not been reduced yet.

    Args:
        model: The model.
        method: Name for messages.
        num_tokens: Tokens entering the blocks, where the model does not tell.
        num_prefix: Leading non-patch tokens, likewise.

    Raises:
        ModelError: The model is no plain vision transformer, or its tokens are already reduced.
    """
    if find_track(model) is not None:
        raise ModelError(f"{method}: the model's tokens are already reduced; start from the dense model")
    return token_view(model, num_tokens, num_prefix)


def token_macs(model: nn.Module, view: TokenView) -> TokenMacs:
    """Return the model's MACs as a function of its token counts."""
    attention, pairs, mlp = [], [], []
    for block in view.blocks:
        attn = model.get_submodule(block.attention)
        attention.append(sum(m.weight.numel() for m in attn.modules() if isinstance(m, nn.Linear)))
        heads, qk, v = attention_widths(attn)
        pairs.append(heads * (qk + v))
        mlp.append(mlp_hidden(model, block) * view.width)
    fixed = view.patch_macs + view.head_macs
    return TokenMacs(view.num_tokens, fixed, tuple(attention), tuple(pairs), tuple(mlp))


def parse_macs(text: str | float, dense: int, lowest: int, method: str) -> int:
    """Return a budget of MACs given as ``"60%"`` of the dense model or as ``"2.9G"``, ``"800M"`` or a number.

    Args:
        text: The budget.
        dense: MACs of the dense model.
        lowest: MACs of the smallest model the method can reach.
        method: Name for messages.

    Raises:
        RecipeError: Not a budget, or out of reach; names the reachable range.
    """
    units = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    word = str(text).strip()
    try:
        if word.endswith("%"):
            target = float(word[:-1]) / 100 * dense
        elif word[-1:].upper() in units:
            target = float(word[:-1]) * units[word[-1:].upper()]
        else:
            target = float(word)
    except ValueError:
        raise RecipeError(
            f"{method}: macs={text!r}; expected a share such as '60%' or an amount such as '2.9G'"
        ) from None
    if not lowest <= target <= dense:
        raise RecipeError(
            f"{method}: macs={text!r} is {target / 1e9:.4g} G; no schedule can meet it. Reachable are "
            f"{lowest / 1e9:.4g} G to {dense / 1e9:.4g} G ({100 * lowest / dense:.1f}% to 100% of the dense model)"
        )
    return int(target)


def install_blocks(model: nn.Module, blocks: Sequence[dict[str, Any]], layout: dict[str, Any]) -> TokenTrack:
    """Replace every block by a ``TokenBlock`` that keeps all tokens; returns their common track.

    Args:
        model: The model, changed in place.
        blocks: ``{"name", "attention"}`` of each block, in order.
        layout: ``{"num_prefix", "has_class", "pool"}``.
    """
    track = TokenTrack(len(blocks))
    for i, block in enumerate(blocks):
        open_attention(model, block["attention"])
        old = model.get_submodule(block["name"])
        new = TokenBlock(old, i, track, layout["num_prefix"], layout["has_class"])
        replace_module(model, block["name"], new)
    if layout["pool"] == "avg":
        model.attn_pool = SizeWeightedPool(track, layout["num_prefix"])
    return track


def swap_blocks(model: nn.Module, make: Callable[[TokenBlock], TokenBlock]) -> None:
    """Replace every token block of the model by what ``make`` returns for it."""
    for name in [n for n, m in model.named_modules() if isinstance(m, TokenBlock)]:
        block = model.get_submodule(name)
        if isinstance(block, TokenBlock):
            replace_module(model, name, make(block))


def token_blocks(model: nn.Module) -> list[TokenBlock]:
    """Return the model's token blocks in order."""
    return sorted((m for m in model.modules() if isinstance(m, TokenBlock)), key=lambda m: m.index)


def describe_tokens(counts: Sequence[tuple[int, int]], num_tokens: int, macs: TokenMacs) -> dict[str, Any]:
    """Return the report's part on tokens.

    Args:
        counts: Tokens left after pruning and after merging, per block.
        num_tokens: Tokens entering the first block.
        macs: The model's cost.
    """
    rows, n = [], num_tokens
    for i, (pruned, merged) in enumerate(counts):
        rows.append([i, n, pruned, merged])
        n = merged
    total = macs([m for _, m in counts])
    table = {"title": "Tokens per block", "columns": ["block", "in", "after pruning", "after merging"], "rows": rows}
    return {
        "tables": [table],
        "facts": {
            "macs": total,
            "macs_dense": macs.dense,
            "macs_share": total / macs.dense,
            "tokens_pruned": sum(r[1] - r[2] for r in rows),
            "tokens_merged": sum(r[2] - r[3] for r in rows),
        },
        "tokens": {"in": num_tokens, "after_prune": [r[2] for r in rows], "after_merge": [r[3] for r in rows]},
    }


@torch.no_grad()
def source_maps(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Return what became of every patch of some images, for pictures.

    Args:
        model: A token-reduced model.
        images: [B, 3, H, W], preprocessed.

    Returns:
        ``grid`` (rows, columns) and, per block output, ``groups``: for every image the index of the token
        that stands for each patch, -1 where the patch was pruned, as an int tensor [B, patches].

    Raises:
        ModelError: The model reduces no tokens.
    """
    track = find_track(model)
    if track is None:
        raise ModelError("source_maps: the model reduces no tokens; expected one finished by a token-reducing method")
    before, training = track.trace, model.training
    track.trace = True
    try:
        model.eval()(images)
        prefix = token_blocks(model)[0].num_prefix
        groups = []
        for source in track.source[1:]:
            patches = source[:, :, prefix:]  # type: ignore[index]  # traced above
            groups.append(torch.where(patches.amax(1) > 0, patches.argmax(1), -1).cpu())
    finally:
        track.trace = before
        track.clear()
        model.train(training)
    num_patches = groups[0].shape[1]
    grid = tuple(getattr(getattr(model, "patch_embed", None), "grid_size", None) or (1, num_patches))
    return {"grid": grid, "groups": groups}
