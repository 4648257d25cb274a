"""Differentiable token counts: rates as probabilities, masks with straight-through gradients, MACs.

Source: DiffRate (arXiv 2305.17997, section 3.3 and release ``ddp.py``, ``patch/deit.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["TokenMacs", "keep_mask", "keep_probability", "kept_count", "masked_softmax", "ste_ceil", "ste_min"]


class _Ceil(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, multiple: int, offset: int) -> Tensor:
        return ((x + offset) / multiple).ceil() * multiple - offset

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


def ste_ceil(x: Tensor, multiple: int = 1, offset: int = 0) -> Tensor:
    """Return the smallest value >= ``x`` for which ``value + offset`` is a multiple; gradient 1.

    Args:
        x: Any shape.
        multiple: Step of the grid; 1 is the plain ceiling.
        offset: Shift of the grid.
    """
    return _Ceil.apply(x, multiple, offset)


class _Min(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, current: Tensor, *counts: Tensor) -> Tensor:
        return torch.stack([current, *counts]).amin(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *(grads[0] if need else None for need in ctx.needs_input_grad[1:])


def ste_min(current: Tensor, *counts: Tensor) -> Tensor:
    """Return the smallest of the scalars. The gradient goes unchanged to every one of ``counts``, never to
    ``current``, whichever is the smallest (release ``utils.py``, here for any number of counts).

    Args:
        current: Count so far, scalar.
        counts: New counts, scalars.
    """
    return _Min.apply(current, *counts)


def kept_count(logits: Tensor, candidates: Tensor, num_prefix: int, multiple: int = 1) -> Tensor:
    """Return the number of tokens kept (prefix included), a scalar with a straight-through gradient.

    ``ceil(sum_j c_j p_j) + num_prefix`` with ``p = softmax(logits)`` (eq. 6); with ``multiple`` the total is
    rounded up to a multiple of it, but not above all tokens.

    Args:
        logits: [J].
        candidates: Patch counts [J], descending.
        num_prefix: Tokens kept in any case.
        multiple: Tile of the device.
    """
    expected = (candidates * logits.softmax(-1)).sum()
    kept = ste_ceil(expected, multiple, num_prefix) + num_prefix
    top = candidates.max() + num_prefix
    return kept - (kept - top).clamp(min=0).detach()


def keep_probability(logits: Tensor, candidates: Tensor, num_prefix: int, num_tokens: int) -> Tensor:
    """Return the probability that the token of each rank is kept [num_tokens] (eq. 7); non-increasing from 1.

    Args:
        logits: [J].
        candidates: Patch counts [J].
        num_prefix: Tokens kept in any case.
        num_tokens: All tokens, prefix included.
    """
    rank = torch.arange(num_tokens, device=logits.device)
    stays = rank.unsqueeze(1) < (candidates + num_prefix).unsqueeze(0)
    return stays.to(logits.dtype) @ logits.softmax(-1)


def keep_mask(probability: Tensor, kept: int, current: int) -> Tensor:
    """Return the mask over ranks [N]: 0 from ``kept`` up to ``current``, else 1; gradient of ``probability``.

    Ranks from ``current`` on are already gone (the running product of masks holds their zero).

    Args:
        probability: ``keep_probability`` [N].
        kept: Tokens kept now.
        current: Tokens before.
    """
    rank = torch.arange(probability.shape[0], device=probability.device)
    hard = ((rank < kept) | (rank >= current)).to(probability.dtype)
    return hard + (probability - probability.detach())


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def _weighted(scores: Tensor, top: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``exp(scores - top)`` and the same with masked columns put out, diagonal spared."""
        exp = (scores - top).float().exp_()
        kept = exp * mask[:, None, None, :].float()
        kept.diagonal(dim1=-2, dim2=-1).copy_(exp.diagonal(dim1=-2, dim2=-1))
        return exp, kept

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor, eps: float) -> Tensor:
        top = scores.amax(-1, keepdim=True)
        _, kept = _MaskedSoftmax._weighted(scores, top, mask)
        total = kept.sum(-1, keepdim=True) + eps
        attn = kept.add_(eps / scores.shape[-1]).div_(total).to(scores.dtype)
        ctx.save_for_backward(scores, mask, total, attn)
        return attn

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        scores, mask, total, attn = ctx.saved_tensors
        top, where = scores.max(-1, keepdim=True)
        exp, kept = _MaskedSoftmax._weighted(scores, top, mask)
        grad = grads[0].float()
        grad = (grad - (grad * attn).sum(-1, keepdim=True)) / total
        exp = exp.mul_(grad)
        exp.diagonal(dim1=-2, dim2=-1).zero_()
        to_mask = exp.sum((1, 2)).to(mask.dtype) if ctx.needs_input_grad[1] else None
        to_scores = kept.mul_(grad)
        to_scores.scatter_add_(-1, where, -to_scores.sum(-1, keepdim=True))  # through the maximum, as autograd would
        return to_scores.to(scores.dtype), to_mask, None


def masked_softmax(scores: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the softmax over tokens that are still there (release ``softmax_with_policy``, after DynamicViT).

    ``A_ij = (e_ij w_ij + eps / N) / (sum_j e_ij w_ij + eps)`` with ``e = exp(scores - max)``,
    ``w_ij = mask_j`` off the diagonal and 1 on it, computed in float32. The gradient is the exact one,
    towards the mask too; it keeps two [B, H, N, N] tensors, one of which the value product shares.

    Args:
        scores: [B, H, N, N].
        mask: [B, N].
        eps: Smoothing.
    """
    return _MaskedSoftmax.apply(scores, mask, eps)


@dataclass(frozen=True)
class TokenMacs:
    """MACs of a plain vision transformer as a function of its token counts.

    Attributes:
        num_tokens: Tokens entering the first block.
        fixed: MACs outside the blocks (patch embedding, classifier).
        attention: MACs per token of each block's attention projections (4 C^2).
        pairs: MACs per pair of tokens of each block's two products (2 C).
        mlp: MACs per token of each block's MLP (8 C^2).
    """

    num_tokens: int
    fixed: int
    attention: tuple[int, ...]
    pairs: tuple[int, ...]
    mlp: tuple[int, ...]

    def __call__(self, counts: Iterable[Any]) -> Any:
        """Return the MACs when ``counts[l]`` tokens leave the attention of block l; ints or scalar tensors."""
        total: Any = self.fixed
        n: Any = self.num_tokens
        for attention, pairs, mlp, new in zip(self.attention, self.pairs, self.mlp, counts, strict=True):
            total = total + n * attention + n * n * pairs + new * mlp
            n = new
        return total

    @property
    def dense(self) -> int:
        """MACs with all tokens."""
        return self([self.num_tokens] * len(self.mlp))
