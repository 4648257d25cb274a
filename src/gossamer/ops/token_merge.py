"""Merging tokens: who joins whom, and what the group's value and size become.

Two rules. DiffRate (arXiv 2305.17997, eq. 4 and release ``merge.py``): the less important tokens join
the most similar of the more important ones, plain mean. ToMe (arXiv 2210.09461, section 3): bipartite
matching of even and odd tokens on keys, size-weighted mean. Group members are summed by a product
with a small 0/1 matrix instead of a scatter: exact, deterministic, and fast in graph runtimes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.ops.tokens import take_tokens

__all__ = ["Bipartite", "assignment", "gather_groups", "match_bipartite", "match_cosine", "merge_mean", "merge_size"]


def match_cosine(src: Tensor, dst: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Return for every source its most similar destination and that cosine similarity, both [B, S].

    Args:
        src: Features of the tokens to merge away [B, S, C].
        dst: Features of the tokens that stay [B, M, C], M > num_prefix.
        num_prefix: Leading destinations that take no sources.
    """
    src, dst = src.detach(), dst.detach()
    scores = src @ dst.transpose(-2, -1) * dst.square().sum(-1).rsqrt().unsqueeze(1)
    blocked = torch.zeros(dst.shape[1], dtype=dst.dtype, device=dst.device)
    blocked[:num_prefix] = float("-inf")
    best, index = (scores + blocked).max(-1)
    return index, best * src.square().sum(-1).rsqrt()


def assignment(index: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """Return the 0/1 matrix [B, M, S] with a one where source s belongs to group m.

    Args:
        index: Group of every source [B, S].
        num_groups: M.
        dtype: Type of the matrix.
    """
    groups = torch.arange(num_groups, device=index.device)
    return (groups.unsqueeze(-1) == index.unsqueeze(1)).to(dtype)


def merge_mean(dst: Tensor, src: Tensor, groups: Tensor) -> Tensor:
    """Return the plain mean of every destination and its sources [B, M, C] (DiffRate).

    Args:
        dst: [B, M, C].
        src: [B, S, C].
        groups: ``assignment`` [B, M, S].
    """
    share = (1 + groups.sum(-1, keepdim=True)).reciprocal()
    return (dst + groups @ src) * share


def merge_size(dst: Tensor | None, src: Tensor | None, groups: Tensor, similarity: Tensor | None) -> Tensor:
    """Return the sizes of the merged tokens [B, M].

    DiffRate weighs a source's size by its similarity; ``None`` gives ToMe's plain sum.

    Args:
        dst: [B, M], ``None`` for ones.
        src: [B, S], ``None`` for ones.
        groups: ``assignment`` [B, M, S].
        similarity: [B, S] or ``None``.
    """
    weights = [w for w in (src, similarity) if w is not None]
    for w in weights:
        groups = groups * w.unsqueeze(1)
    joined = groups.sum(-1)
    return joined + (1 if dst is None else dst)


class Bipartite(NamedTuple):
    """A ToMe matching; positions are those of the tokens that enter.

    Attributes:
        keep: Tokens that pass unchanged, prefix first [B, K].
        dst: Tokens that may take sources [B, D].
        src: Tokens that are merged away [B, r].
        groups: ``assignment`` of sources to destinations [B, D, r].
    """

    keep: Tensor
    dst: Tensor
    src: Tensor
    groups: Tensor


def match_bipartite(metric: Tensor, r: int, num_prefix: int, *, ordered: bool) -> Bipartite:
    """Return ToMe's bipartite soft matching: the ``r`` best edges from even to odd tokens.

    Prefix tokens take no part. For zero, one or two of them this is the release's matching; more
    (registers) are treated alike.

    Args:
        metric: What similarity is measured on [B, N, D]: keys averaged over heads.
        r: Tokens to merge away, 1..(N - num_prefix) // 2.
        num_prefix: Leading protected tokens.
        ordered: Keep the unmerged tokens in their order (the release does so with a class token).
    """
    b, n, _ = metric.shape
    metric = metric.detach()
    metric = metric * metric.square().sum(-1, keepdim=True).rsqrt()
    first_a, first_b = num_prefix + num_prefix % 2, num_prefix + (num_prefix + 1) % 2
    scores = metric[:, first_a::2] @ metric[:, first_b::2].transpose(-2, -1)
    best, index = scores.max(-1)
    edges = best.argsort(-1, descending=True)
    src, rest = edges[:, :r], edges[:, r:]
    if ordered:
        rest = rest.sort(-1).values
    num_dst = scores.shape[-1]
    groups = assignment(index.gather(1, src), num_dst, metric.dtype)
    prefix = torch.arange(num_prefix, device=metric.device).expand(b, -1)
    keep = torch.cat((prefix, first_a + 2 * rest), dim=1)
    dst = (first_b + 2 * torch.arange(num_dst, device=metric.device)).expand(b, -1)
    return Bipartite(keep, dst, first_a + 2 * src, groups)


def gather_groups(x: Tensor, match: Bipartite) -> Tensor:
    """Return the sums of groups, in the order of the merged tokens [B, K + D, C].

    Applied to ``x * size``, to ``size`` and to the source matrix it gives ToMe's merge.

    Args:
        x: [B, N, C].
        match: A matching of the N tokens.
    """
    merged = take_tokens(x, match.dst) + match.groups.to(x.dtype) @ take_tokens(x, match.src)
    return torch.cat((take_tokens(x, match.keep), merged), dim=1)
