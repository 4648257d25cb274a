"""ToMe's block: merges a fixed number of tokens by bipartite matching of the keys."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.ops.attention import Attended
from gossamer.ops.token_blocks import TokenBlock
from gossamer.ops.token_merge import gather_groups, match_bipartite

__all__ = ["MergingBlock"]


class MergingBlock(TokenBlock):
    """Merges ``r`` tokens between attention and MLP.

    Args:
        source: A token block.
        r: Tokens to merge away; at most half of the patch tokens go.
        proportional: Add log(size) to the scores of the keys.
    """

    def __init__(self, source: TokenBlock, r: int, proportional: bool) -> None:
        super().__init__(source, source.index, source.track, source.num_prefix, source.has_class)
        self.r = r
        self.proportional = proportional

    def counts(self, n: int) -> tuple[int, int]:
        """Return ``(n, n - r)`` with r at most half of the patch tokens."""
        return n, n - min(self.r, (n - self.num_prefix) // 2)

    def reduce(
        self, x: Tensor, size: Tensor | None, parts: Attended, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the merged tokens and their sizes; sizes keep their sum."""
        r = x.shape[1] - self.counts(x.shape[1])[1]
        if r == 0:
            return x, size
        with torch.no_grad():
            match = match_bipartite(parts.k.mean(1), r, self.num_prefix, ordered=self.has_class)
        column = (torch.ones_like(x[..., 0]) if size is None else size).unsqueeze(-1)
        total = gather_groups(column, match)
        weighted = gather_groups(x if size is None else x * column, match)
        source = self.track.source[self.index + 1]
        if source is not None:
            self.track.source[self.index + 1] = gather_groups(source, match)
        return weighted / total, total.squeeze(-1)

    def extra_repr(self) -> str:
        return f"r={self.r}"
