"""The one place that knows timm's classes: fills the views of ``models.contracts``."""

from __future__ import annotations

import torch
from timm.layers import GELU, Attention, LayerNorm, Mlp
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from gossamer.core.errors import ModelError
from gossamer.models.contracts import AttentionView, BlockView, TokenView, replace_module
from gossamer.ops.attention import OpenAttention, OpenWindowAttention

__all__ = [
    "attention_views",
    "attention_widths",
    "close_attention",
    "mlp_hidden",
    "open_attention",
    "sort_attention",
    "split_attention",
    "token_view",
    "torch_kind",
]

BLOCK_PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
"""Submodules of a pre-norm block. A block that has exactly these is one, whatever its class."""


def _is_block(module: nn.Module) -> bool:
    return type(module) is Block or {n for n, _ in module.named_children()} == set(BLOCK_PARTS)


def _what(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def sort_attention(model: nn.Module) -> tuple[list[AttentionView], list[str]]:
    """Return views of the attention that can be opened, and the paths of those that cannot, in module order."""
    views, strangers = [], []
    for name, module in model.named_modules():
        if isinstance(module, OpenAttention | OpenWindowAttention):
            kind = "global" if isinstance(module, OpenAttention) else "window"
            views.append(AttentionView(name, kind, True, module.num_heads))
        elif type(module) is Attention:
            views.append(AttentionView(name, "global", False, module.num_heads))
        elif type(module) is WindowAttention:
            views.append(AttentionView(name, "window", False, module.num_heads))
        elif any(w in type(module).__name__.lower() for w in ("attention", "attn")) and any(
            isinstance(m, nn.Linear) for m in module.children()
        ):
            strangers.append(name)
    return views, strangers


def attention_views(model: nn.Module) -> list[AttentionView]:
    """Return every attention module whose products can be opened, in module order.

    Raises:
        ModelError: The model holds an attention whose products gossamer cannot open; names it.
    """
    views, strangers = sort_attention(model)
    if strangers:
        raise ModelError(
            f"attention at {strangers[0]!r} is {_what(model.get_submodule(strangers[0]))}; expected timm's Attention "
            f"(ViT, DeiT) or WindowAttention (Swin). This model cannot be opened for quantized attention"
        )
    return views


def open_attention(model: nn.Module, name: str) -> nn.Module:
    """Replace the attention at ``name`` by its open form (if it is not yet) and return it.

    Whoever opens holds it open: ``close_attention`` closes what everybody has let go.
    """
    module = model.get_submodule(name)
    if isinstance(module, OpenAttention | OpenWindowAttention):
        module.holders += 1
        return module
    if type(module) is Attention:
        new: nn.Module = OpenAttention(module)
    elif type(module) is WindowAttention:
        new = OpenWindowAttention(module)
    else:
        raise ModelError(f"attention at {name!r} is {_what(module)}; expected timm's Attention or WindowAttention")
    replace_module(model, name, new)
    return new


def close_attention(model: nn.Module, name: str) -> None:
    """Let the attention at ``name`` go; the library's own comes back when nobody holds it open and it still fits."""
    module = model.get_submodule(name)
    if not isinstance(module, OpenAttention | OpenWindowAttention):
        return
    module.holders -= 1
    source = module.closed() if module.holders == 0 else None
    if source is not None:
        replace_module(model, name, source)


def torch_kind(module: nn.Module) -> type[nn.Module]:
    """Return the torch class that computes as ``module`` does, or its own class where none is known to."""
    if type(module) is LayerNorm and not module._fast_norm:
        return nn.LayerNorm
    return nn.GELU if type(module) is GELU else type(module)


def split_attention(model: nn.Module, name: str) -> OpenAttention:
    """Open the attention at ``name`` and give queries, keys and values a layer each, so that their widths may differ.

    Raises:
        ModelError: It is no attention over all tokens, or its widths are tied by another layer.
    """
    attention = open_attention(model, name)
    if not isinstance(attention, OpenAttention):
        raise ModelError(f"attention at {name!r} is {_what(attention)}; expected attention over all tokens (ViT, DeiT)")
    parts = ("q_norm", "k_norm", "norm", "gate")
    tied = [n for n in parts if not isinstance(getattr(attention, n), nn.Identity | None)]
    if tied:
        got = ", ".join(f"{n!r}" for n in tied)
        raise ModelError(f"attention at {name!r} has {got}, which ties the widths of its heads; expected none of these")
    attention.split()
    return attention


def attention_widths(attention: nn.Module) -> tuple[int, int, int]:
    """Return heads, query width and value width of a head, for timm's attention or an open one."""
    if isinstance(attention, OpenAttention):
        return attention.num_heads, attention.qk_dim, attention.v_dim
    return int(attention.num_heads), int(attention.head_dim), int(attention.head_dim)  # type: ignore[arg-type]


def _matrix_size(module: nn.Module | None) -> int:
    """Return the number of weights of a linear layer in any form (float, quantized), 0 for other modules."""
    weight = getattr(module, "weight", None)
    return weight.numel() if isinstance(weight, torch.Tensor) and weight.dim() == 2 else 0


def _block_views(model: nn.Module) -> tuple[BlockView, ...]:
    """Return the blocks of the model's only block list; raise where there is none or several."""
    lists: dict[str, list[str]] = {}
    strangers: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList) or not len(module):
            continue
        kinds = [_is_block(m) for m in module]
        if all(kinds):
            lists[name] = [f"{name}.{k}" if name else k for k, _ in module.named_children()]
        elif name.rpartition(".")[2] in ("blocks", "layers", "stages", "blocks_token_only"):
            strangers[name] = _what(next(m for m, ok in zip(module, kinds, strict=True) if not ok))
    if len(lists) != 1 or strangers:
        got = ", ".join(f"{n!r} holds {w}" for n, w in strangers.items()) or (
            f"{len(lists)} block lists: {sorted(lists)}" if lists else "no list of such blocks"
        )
        raise ModelError(
            f"{type(model).__name__}: {got}; expected one nn.Sequential or nn.ModuleList of timm pre-norm "
            f"Blocks (ViT, DeiT, DeiT-3, DINOv2)"
        )
    names = next(iter(lists.values()))
    for n in names:
        attn = model.get_submodule(f"{n}.attn")
        if not (type(attn) is Attention or isinstance(attn, OpenAttention)):
            raise ModelError(
                f"attention at '{n}.attn' is {_what(attn)}; expected timm's Attention (no relative or rotary "
                f"position inside, since tokens change places)"
            )
    return tuple(BlockView(n, f"{n}.attn", f"{n}.mlp") for n in names)


def token_view(model: nn.Module, num_tokens: int | None = None, num_prefix: int | None = None) -> TokenView:
    """Return the token view of a plain vision transformer.

    Args:
        model: A timm ``VisionTransformer`` (any of its variants), or a module with one list of timm
            pre-norm blocks.
        num_tokens: Tokens entering the blocks, for a user's own module without ``patch_embed`` and
            ``num_prefix_tokens``.
        num_prefix: Leading non-patch tokens, likewise.

    Raises:
        ModelError: The model is not of that kind; says which module stands in the way.
    """
    if isinstance(model, VisionTransformer) and model.attn_pool is not None:
        kind = type(model.attn_pool).__name__
        if kind != "SizeWeightedPool":
            raise ModelError(f"{type(model).__name__}: attn_pool is {kind}; expected class-token or average pooling")
    if getattr(model, "dynamic_img_size", False):
        raise ModelError(f"{type(model).__name__}: dynamic_img_size=True; token counts must be fixed to be reduced")
    blocks = _block_views(model)
    embed = getattr(model, "patch_embed", None)
    if num_prefix is None:
        num_prefix = getattr(model, "num_prefix_tokens", None)
    grid = tuple(getattr(embed, "grid_size", None) or ())
    if num_prefix is None or (num_tokens is None and len(grid) != 2):
        raise ModelError(
            f"{type(model).__name__}: cannot tell the number of tokens; expected patch_embed.grid_size and "
            f"num_prefix_tokens, or pass num_tokens= and num_prefix="
        )
    if num_tokens is None:
        num_tokens = grid[0] * grid[1] + num_prefix
    elif len(grid) != 2 or grid[0] * grid[1] + num_prefix != num_tokens:
        side = int((num_tokens - num_prefix) ** 0.5)
        grid = (side, side) if side * side == num_tokens - num_prefix else (1, num_tokens - num_prefix)
    width = _width(model, blocks[0])
    proj = getattr(embed, "proj", None)
    patch_macs = grid[0] * grid[1] * proj.weight.numel() if proj is not None else 0
    heads = [getattr(model, h, None) for h in ("head", "head_dist")]
    head_macs = sum(_matrix_size(h) for h in heads)
    has_class = getattr(model, "cls_token", None) is not None and num_prefix > 0
    pool = getattr(model, "global_pool", "unknown")
    pool = pool if pool in ("token", "avg") else "unknown"
    return TokenView(blocks, num_tokens, num_prefix, has_class, (grid[0], grid[1]), width, pool, patch_macs, head_macs)


def _width(model: nn.Module, block: BlockView) -> int:
    return model.get_parameter(f"{block.name}.norm1.weight").numel()


def mlp_hidden(model: nn.Module, block: BlockView) -> int:
    """Return the MACs per token of a block's MLP divided by its width (hidden width for a plain MLP, doubled)."""
    mlp = model.get_submodule(block.mlp)
    weights = [n for n in map(_matrix_size, mlp.modules()) if n]
    width = _width(model, block)
    if not weights:
        raise ModelError(f"MLP at {block.mlp!r} has no linear layer; expected {Mlp.__module__}.Mlp or a gated MLP")
    return int(torch.tensor(weights).sum()) // width
