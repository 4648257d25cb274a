"""Selecting tokens: which matter, which stay, and the record of what every token stands for.

Sources: DiffRate (arXiv 2305.17997, section 3.2) for importance and sorting, ToMe (arXiv
2210.09461, section 3) for sizes, proportional attention and source matrices. Prefix tokens (class,
distillation, registers) always stay in front and are never pruned or merged away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.ops.attention import Attended, class_attention

__all__ = [
    "TokenTrack",
    "find_track",
    "rank_tokens",
    "size_bias",
    "take_tokens",
    "token_importance",
    "weighted_token_mean",
]


class TokenTrack:
    """What travels between the blocks of one token-reducing model, shared by all of them.

    Entry ``i`` is what enters block ``i``; entry ``depth`` is what leaves the last block. The first
    block resets it, so that every forward pass starts afresh. A copy of a model gets an empty track.

    Attributes:
        depth: Number of blocks.
        trace: Record ``source`` for every block.
        size: Token sizes [B, N_i], ``None`` while every token still stands for one patch.
        source: 0/1 membership [B, N_i, N_0]: row m marks the original tokens that token m stands
            for; a dropped token is in no row. ``None`` unless ``trace``.
        mask: 1 for tokens that are still there [B, N_0], in searches that drop none; else ``None``.
        alive: Number of tokens still there, in such searches.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.trace = False
        self.clear()

    def clear(self) -> None:
        """Forget everything recorded."""
        self.size: list[Tensor | None] = [None] * (self.depth + 1)
        self.source: list[Tensor | None] = [None] * (self.depth + 1)
        self.mask: list[Tensor | None] = [None] * (self.depth + 1)
        self.alive: list[int] = [0] * (self.depth + 1)

    def begin(self, x: Tensor) -> None:
        """Start a forward pass on tokens ``x`` [B, N_0, C]."""
        self.clear()
        self.alive[0] = x.shape[1]
        if self.trace:
            eye = torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
            self.source[0] = eye.expand(x.shape[0], -1, -1)

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenTrack:
        new = TokenTrack(self.depth)
        new.trace = self.trace
        return new

    def __reduce__(self) -> tuple[type[TokenTrack], tuple[int]]:
        return TokenTrack, (self.depth,)


def find_track(model: nn.Module) -> TokenTrack | None:
    """Return the track of a token-reducing model, ``None`` if the model reduces no tokens."""
    for module in model.modules():
        track = getattr(module, "track", None)
        if isinstance(track, TokenTrack):
            return track
    return None


def token_importance(parts: Attended, scale: float, bias: Tensor | None, num_prefix: int, has_class: bool) -> Tensor:
    """Return the importance of every patch token [B, N - num_prefix].

    With a class token: the mean over heads of its attention to the token. Without: the mean over
    heads and queries of the attention paid to the token (DiffRate, release: the CAFormer path).

    Args:
        parts: What ``OpenAttention.attend`` returned. Where the fused kernel hid the attention, the
            class row is recomputed in O(N C), the whole matrix where there is no class token.
        scale: Score scale.
        bias: The score bias that the attention used.
        num_prefix: Leading tokens that are not ranked.
        has_class: Whether token 0 is a class token.
    """
    rows = 1 if has_class else parts.q.shape[-2]
    attn = parts.attn[:, :, :rows] if parts.attn is not None else class_attention(parts.q, parts.k, scale, bias, rows)
    return attn.mean((1, 2))[:, num_prefix:]


def rank_tokens(importance: Tensor, keep: int, num_prefix: int, *, ordered: bool = True) -> Tensor:
    """Return the indices of the ``keep`` most important tokens [B, keep], prefix first.

    Args:
        importance: [B, N - num_prefix].
        keep: Tokens to keep, prefix included.
        num_prefix: Leading tokens kept unconditionally, in their order.
        ordered: Whether the patches must come in descending order of importance.
    """
    best = importance.topk(keep - num_prefix, dim=-1, sorted=ordered).indices + num_prefix
    if num_prefix == 0:
        return best
    prefix = torch.arange(num_prefix, device=best.device).expand(best.shape[0], -1)
    return torch.cat((prefix, best), dim=1)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Return ``x[b, index[b]]``: whole rows are copied, which runtimes do far faster than element gathers.

    Args:
        x: [B, N, ...].
        index: [B, K].
    """
    b, n, *rest = x.shape
    if b == 1:
        return x.index_select(1, index[0])
    rows = (index + torch.arange(b, device=x.device).unsqueeze(1) * n).flatten()
    return x.reshape(b * n, *rest).index_select(0, rows).reshape(b, index.shape[1], *rest)


def size_bias(size: Tensor | None) -> Tensor | None:
    """Return the score bias of proportional attention, ``log(size)`` of the keys [B, 1, 1, N] (ToMe, eq. 1).

    Args:
        size: [B, N], positive; ``None`` (all ones) gives ``None``.
    """
    return None if size is None else size.log()[:, None, None, :]


def weighted_token_mean(x: Tensor, weight: Tensor, *, detach_total: bool = False) -> Tensor:
    """Return the weighted mean of tokens [B, C] (DiffRate release, MAE: global pooling by size).

    Args:
        x: [B, N, C].
        weight: [B, N], non-negative.
        detach_total: Treat the sum of weights as constant (the release's training form).
    """
    total = weight.sum(1, keepdim=True)
    weight = weight / (total.detach() if detach_total else total)
    return (x * weight.unsqueeze(-1)).sum(1)
