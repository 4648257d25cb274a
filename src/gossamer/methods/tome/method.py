"""ToMe: Token Merging: Your ViT But Faster (arXiv 2210.09461, ICLR 2023), the training-free baseline.

Written from the paper's formulas. Reference: facebookresearch/ToMe at af95e4b (CC-BY-NC 4.0; used as an
oracle only). Ours: a matching that protects any number of prefix tokens, a budget option, sums by a small
product instead of scatters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from gossamer.core.errors import RecipeError
from gossamer.core.method import Edit, Method
from gossamer.kits.token_reduction import (
    describe_tokens,
    install_blocks,
    parse_macs,
    reducible_view,
    swap_blocks,
    token_blocks,
    token_macs,
)
from gossamer.methods.tome.layers import MergingBlock
from gossamer.models.contracts import TokenView
from gossamer.models.timm_adapter import token_view
from gossamer.ops.token_rates import TokenMacs

__all__ = ["ToMe", "merge_schedule"]


def merge_schedule(depth: int, r: int | list[int], inflection: float = 0.0) -> list[int]:
    """Return the tokens to merge in each block (release ``parse_r``).

    Args:
        depth: Blocks.
        r: Tokens per block, or a list (missing blocks merge none).
        inflection: -1 falls linearly from 2r to 0 ("decreasing"), 0 is constant, 1 rises; each is truncated.

    Raises:
        RecipeError: A list longer than the model, a negative count, or an inflection outside [-1, 1].
    """
    if not -1 <= inflection <= 1:
        raise RecipeError(f"tome: inflection={inflection}; expected a value in [-1, 1]")
    counts = r if isinstance(r, list) else [r]
    if len(counts) > depth or any(c < 0 for c in counts):
        raise RecipeError(f"tome: r={r}; expected 0 or more tokens for each of at most {depth} blocks")
    if isinstance(r, list):
        return r + [0] * (depth - len(r))
    first = int(r * (1 - inflection))
    step = (2 * r - 2 * first) / max(depth - 1, 1)
    return [int(first + step * i) for i in range(depth)]


def _remaining(merges: list[int], num_tokens: int, num_prefix: int) -> list[int]:
    """Return the tokens left after each block; at most half of the patches go at a time."""
    counts, n = [], num_tokens
    for r in merges:
        n -= min(r, (n - num_prefix) // 2)
        counts.append(n)
    return counts


@dataclass
class ToMe(Method):
    """Token merging by bipartite soft matching.

    Attributes:
        r: Tokens merged per block: one number, or a list.
        macs: Choose the merges that meet this budget instead: ``"60%"`` or ``"2.9G"``: the smallest ``r``
            that does, then single tokens are given back, late blocks first, as long as they fit.
        inflection: -1 (decreasing) .. 0 (constant) .. 1 (increasing).
        prop_attn: Proportional attention (off for MAE models off the shelf).
        num_tokens: Tokens entering the blocks, for a model that does not tell.
        num_prefix: Leading non-patch tokens, likewise.
    """

    stage: ClassVar[str] = "tokens"
    touches: ClassVar[frozenset[str]] = frozenset({"tokens"})
    gives: ClassVar[frozenset[str]] = frozenset({"token_source"})

    r: int | list[int] = 8
    macs: str | float | None = None
    inflection: float = 0.0
    prop_attn: bool = True
    num_tokens: int | None = None
    num_prefix: int | None = None

    def prepare(self, model: nn.Module) -> Edit | None:
        """Choose how many tokens to merge in each block.

        Raises:
            ModelError: The model is no plain vision transformer.
            RecipeError: An option is out of range, or no number of merges meets the budget.
        """
        view = reducible_view(model, "tome", self.num_tokens, self.num_prefix)
        merges = merge_schedule(len(view.blocks), self.r, self.inflection)
        if self.macs is not None:
            merges = self._within(view, token_macs(model, view))
        blocks = [{"name": b.name, "attention": b.attention} for b in view.blocks]
        layout = {"num_prefix": view.num_prefix, "has_class": view.has_class_token, "pool": view.pool}
        return {"blocks": blocks, "layout": layout, "merges": merges}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Put merging blocks in place."""
        install_blocks(model, edit["blocks"], edit["layout"])
        swap_blocks(model, lambda block: MergingBlock(block, edit["merges"][block.index], self.prop_attn))
        return model

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return tokens kept per block and the MACs they stand for."""
        blocks = token_blocks(model)
        if not blocks:
            return {}
        view = token_view(model, self.num_tokens, self.num_prefix)
        counts, n = [], view.num_tokens
        for block in blocks:
            counts.append(block.counts(n))
            n = counts[-1][1]
        return describe_tokens(counts, view.num_tokens, token_macs(model, view))

    def _within(self, view: TokenView, cost: TokenMacs) -> list[int]:
        """Return merges whose MACs meet the budget as closely as whole tokens allow."""
        depth = len(view.blocks)

        def spent(merges: list[int]) -> int:
            return cost(_remaining(merges, view.num_tokens, view.num_prefix))

        top = view.num_tokens
        lowest = min(spent(merge_schedule(depth, r, self.inflection)) for r in range(top))
        target = parse_macs(self.macs or "", cost.dense, lowest, "tome")
        r = next(r for r in range(top) if spent(merge_schedule(depth, r, self.inflection)) <= target)
        merges = merge_schedule(depth, r, self.inflection)
        for block in [*range(depth)][::-1] * 2:  # give back single tokens where they fit, late blocks first
            less = [m - (i == block and m > 0) for i, m in enumerate(merges)]
            merges = less if spent(less) <= target else merges
        return merges
