"""The method's own formulas: ranking loss, pair order, nuclear sensitivity (arXiv 2106.14156)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "RANK_ON",
    "RankingLoss",
    "ScoreView",
    "all_pairs",
    "nuclear_norm",
    "projection_scores",
    "ranking_loss",
    "sample_pairs",
    "sensitivity",
]

RANK_ON = ("scaled_scores", "scores", "attention")
Reduction = Literal["mean", "sum"]


def all_pairs(num_keys: int) -> Tensor:
    """Return all pairs i < j of keys [2, n (n - 1) / 2]."""
    return torch.triu_indices(num_keys, num_keys, 1)


def sample_pairs(num_keys: int, count: int | None, key: int) -> Tensor:
    """Return ``count`` of the pairs drawn without replacement, or all of them for ``None``."""
    pairs = all_pairs(num_keys)
    if count is None or pairs.shape[1] <= count:
        return pairs
    draw = torch.randperm(pairs.shape[1], generator=torch.Generator().manual_seed(key))
    return pairs[:, draw[:count]]


def _gaps(scores: Tensor, pairs: Tensor) -> Tensor:
    return scores.index_select(-1, pairs[0]) - scores.index_select(-1, pairs[1])


def ranking_loss(
    scores: Tensor, target: Tensor, theta: float = 0.2, reduction: Reduction = "mean", pairs: Tensor | None = None
) -> Tensor:
    """Return the hinge loss on the order of keys under each query (eq. 13).

    ``sum over pairs i < j of max(0, theta - (s_i - s_j) sign(t_i - t_j))``. Pairs that tie in the
    target have no order and are left out (the formula would add ``theta`` for each).

    Args:
        scores: Scores under quantization [S, ..., M, N]; queries M, keys N.
        target: Scores in floating point, same shape.
        theta: Margin, in units of the scores.
        reduction: ``"sum"`` over heads, queries and pairs, averaged over the samples S (the
            paper's), or ``"mean"`` over all ordered pairs.
        pairs: Key pairs [2, P]; default all.
    """
    return RankingLoss(target, theta, reduction, pairs)(scores)


class RankingLoss:
    """``ranking_loss`` against one target, for many scores.

    Args:
        target: Scores in floating point [S, ..., M, N].
        theta: Margin.
        reduction: As in ``ranking_loss``.
        pairs: Key pairs [2, P]; default all.
    """

    def __init__(
        self, target: Tensor, theta: float = 0.2, reduction: Reduction = "mean", pairs: Tensor | None = None
    ) -> None:
        self.theta = theta
        pairs = all_pairs(target.shape[-1]) if pairs is None else pairs
        self._pairs = pairs.to(target.device)
        # one sample at a time: with all pairs a whole batch would not fit
        self._signs = [_gaps(t, self._pairs).sign_().to(torch.int8) for t in target]
        ordered = sum(int(s.count_nonzero()) for s in self._signs)
        self._scale = 1 / max(1, ordered if reduction == "mean" else target.shape[0])

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the loss of ``scores`` [S, ..., M, N]."""
        total = scores.new_zeros((), dtype=torch.float64)
        for sample, sign in zip(scores, self._signs, strict=True):
            hinge = (self.theta - _gaps(sample, self._pairs) * sign).clamp_(min=0)
            total = total + (hinge * (sign != 0)).sum(dtype=torch.float64)
        return (total * self._scale).to(scores.dtype)

    def agreement(self, scores: Tensor) -> float:
        """Return Kendall's tau of ``scores`` in [-1, 1]: concordant minus discordant, over pairs the target orders."""
        good = sum(int((_gaps(x, self._pairs).sign() * s).sum()) for x, s in zip(scores, self._signs, strict=True))
        return good / max(1, sum(int(s.count_nonzero()) for s in self._signs))


@dataclass(frozen=True)
class ScoreView:
    """How the scores are read for the ranking loss.

    Attributes:
        on: One of ``RANK_ON``: ``Q K^T / sqrt(d)``, ``Q K^T`` (the paper's eq. 3), or the softmax.
        scale: The attention's score scale.
    """

    on: str
    scale: float

    def __call__(self, scaled: Tensor) -> Tensor:
        """Return the view of scaled scores [..., M, N]."""
        if self.on == "scores":
            return scaled / self.scale
        return scaled.softmax(-1) if self.on == "attention" else scaled


def projection_scores(
    outputs: Sequence[Tensor],
    heads: int,
    scale: float,
    norms: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
) -> Tensor:
    """Return the scaled scores [S, windows, heads, queries, tokens] of query and key projections.

    Args:
        outputs: Queries [S, windows, queries, C] and keys [S, windows, tokens, C].
        heads: Number of heads.
        scale: Score scale.
        norms: What the attention applies to queries and keys.
    """

    def by_head(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], heads, -1).transpose(-2, -3)

    q, k = norms[0](by_head(outputs[0])), norms[1](by_head(outputs[1]))
    return (q * scale) @ k.transpose(-2, -1)


def nuclear_norm(y: Tensor) -> Tensor:
    """Return the sum of singular values of each matrix [...] of ``y`` [..., M, N]."""
    return torch.linalg.svdvals(y.float()).sum(-1)


def sensitivity(target: Tensor, out: Tensor, *, relative: bool = False) -> float:
    """Return Omega, the nuclear norm of the output times its squared error (eq. 18).

    Both factors are averaged over the matrices (samples, windows, heads). The literal form does
    not normalise; ``relative`` divides the norm by the Frobenius norm and the error by its square.

    Args:
        target: Output in floating point [..., M, N].
        out: Output under quantization, same shape.
        relative: Use the scale-free form.
    """
    error = (out - target).double().square().sum((-2, -1)).mean()
    norm = nuclear_norm(target).double().mean()
    if relative:
        energy = target.double().square().sum((-2, -1)).mean().clamp_min(1e-20)
        return float(norm / energy.sqrt() * (error / energy))
    return float(norm * error)
