"""Transformer blocks that know how many patches each token stands for.

A ``TokenBlock`` replaces a pre-norm block and adopts its parts under the same names. Between attention
and MLP it calls ``reduce``, which methods override; the base keeps all tokens, so it computes what the
plain block computes (with proportional attention once sizes differ from one).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.ops.attention import Attended, OpenAttention
from gossamer.ops.tokens import TokenTrack, size_bias, weighted_token_mean

__all__ = ["SizeWeightedPool", "TokenBlock"]

PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


class TokenBlock(nn.Module):
    """Pre-norm block ``x + attn(norm1(x))``, reduce, ``x + mlp(norm2(x))`` over tokens with sizes.

    Args:
        source: The block to replace, or a ``TokenBlock``; its attention must be open.
        index: Position among the model's blocks.
        track: Shared by all blocks of the model.
        num_prefix: Leading tokens that are never reduced.
        has_class: Whether token 0 is a class token.
    """

    proportional: bool = True
    norm1: nn.Module
    attn: OpenAttention
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(self, source: nn.Module, index: int, track: TokenTrack, num_prefix: int, has_class: bool) -> None:
        super().__init__()
        if not isinstance(source.attn, OpenAttention):
            raise ModelError(f"block {index}: attention is {type(source.attn).__name__}; expected OpenAttention")
        for name in PARTS:
            setattr(self, name, getattr(source, name))
        self.index = index
        self.track = track
        self.num_prefix = num_prefix
        self.has_class = has_class

    def counts(self, n: int) -> tuple[int, int]:
        """Return how many of ``n`` tokens are left after pruning and after merging."""
        return n, n

    def attend(self, x: Tensor, bias: Tensor | None) -> Attended:
        """Return the attention's parts for normalised tokens ``x`` [B, N, C]."""
        return self.attn.attend(x, bias)

    def reduce(
        self, x: Tensor, size: Tensor | None, parts: Attended, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens and sizes that go on; override to drop or merge some.

        Args:
            x: Tokens after the attention's residual sum [B, N, C].
            size: [B, N], ``None`` while all are one.
            parts: What the attention computed on the way.
            bias: The score bias it used.
        """
        return x, size

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the block's output tokens [B, M, C]; the signature is that of timm's block."""
        if attn_mask is not None or is_causal:
            raise ModelError(
                f"block {self.index}: got an attention mask; tokens change places in a token-reduced model, so a mask "
                f"over positions has no meaning. Call the model without one"
            )
        track, i = self.track, self.index
        if i == 0:
            track.begin(x)
        size = track.size[i]
        track.source[i + 1], track.mask[i + 1], track.alive[i + 1] = track.source[i], track.mask[i], track.alive[i]
        bias = size_bias(size) if self.proportional else None
        bias = bias if bias is None else bias.to(x.dtype)
        parts = self.attend(self.norm1(x), bias)
        x = x + self.drop_path1(self.ls1(parts.out))
        x, track.size[i + 1] = self.reduce(x, size, parts, bias)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class SizeWeightedPool(nn.Module):
    """Average pooling of patch tokens in which a token counts as the patches it stands for.

    Args:
        track: The model's track.
        num_prefix: Leading tokens; left out where the caller left them out.
    """

    def __init__(self, track: TokenTrack, num_prefix: int) -> None:
        super().__init__()
        self.track = track
        self.num_prefix = num_prefix

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled features [B, C] of ``x`` [B, N or N - num_prefix, C]."""
        size, mask = self.track.size[-1], self.track.mask[-1]
        weights = [w for w in (size, mask) if w is not None]
        if not weights:
            return x.mean(1)
        weight = torch.stack(weights).prod(0)[:, -x.shape[1] :]
        return weighted_token_mean(x, weight.to(x.dtype), detach_total=mask is not None)
