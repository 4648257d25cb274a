"""What methods may ask of a model, whatever library built it.

A *view* names the parts of a model by their module paths; methods put the paths into their edits
and never look at a library's classes. One adapter per model library fills the views
(``models/timm_adapter.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["AttentionView", "BlockView", "TokenView", "replace_module"]


@dataclass(frozen=True)
class AttentionView:
    """One attention module.

    Attributes:
        name: Module path.
        kind: ``"global"`` (all tokens), ``"window"``.
        opened: Whether its products are already open (``ops.attention``).
        heads: Number of heads.
    """

    name: str
    kind: str
    opened: bool
    heads: int


@dataclass(frozen=True)
class BlockView:
    """One pre-norm transformer block ``x + attn(norm1(x))``, ``x + mlp(norm2(x))``.

    Attributes:
        name: Module path of the block.
        attention: Module path of its attention.
        mlp: Module path of its MLP.
    """

    name: str
    attention: str
    mlp: str


@dataclass(frozen=True)
class TokenView:
    """A plain (non-hierarchical) vision transformer whose blocks see one token sequence.

    Attributes:
        blocks: Its blocks in order.
        num_tokens: Tokens that enter the first block, prefix included.
        num_prefix: Leading non-patch tokens (class, distillation, registers).
        has_class_token: Whether token 0 is a class token.
        grid: Patch grid (rows, columns).
        width: Channels of a token.
        pool: ``"token"`` or ``"avg"`` (mean of patch tokens), ``"map"`` (attention pooling),
            ``"unknown"`` for a user's own module.
        patch_macs: MACs of the patch embedding for one image.
        head_macs: MACs of the classifier for one image.
    """

    blocks: tuple[BlockView, ...]
    num_tokens: int
    num_prefix: int
    has_class_token: bool
    grid: tuple[int, int]
    width: int
    pool: str
    patch_macs: int
    head_macs: int


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` at module path ``name`` of ``model`` (training mode and device follow the old one)."""
    old = model.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new.train(old.training))
