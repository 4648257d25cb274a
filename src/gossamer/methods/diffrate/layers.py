"""DiffRate's two block forms: with learnable rates (tokens masked) and with fixed counts (tokens gone)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.ops.attention import Attended
from gossamer.ops.token_blocks import TokenBlock
from gossamer.ops.token_merge import assignment, match_cosine, merge_mean, merge_size
from gossamer.ops.token_rates import keep_mask, keep_probability, kept_count, masked_softmax
from gossamer.ops.tokens import rank_tokens, take_tokens, token_importance

__all__ = ["Gate", "GatedBlock", "ReducedBlock", "Rules"]


@dataclass(frozen=True)
class Rules:
    """Which parts of the method are on.

    Attributes:
        similarity_sizes: Weigh the size of a merged token by its similarity.
        proportional: Add log(size) to the scores of the keys.
        clamp_sizes: Raise sizes to at least 1 before merging.
        importance: ``"attention"`` ranks tokens by attention, ``"order"`` by position (ablation).
    """

    similarity_sizes: bool = True
    proportional: bool = True
    clamp_sizes: bool = False
    importance: str = "attention"


class _RankingBlock(TokenBlock):
    """A token block that ranks tokens by importance."""

    def __init__(self, source: TokenBlock, rules: Rules) -> None:
        super().__init__(source, source.index, source.track, source.num_prefix, source.has_class)
        self.rules = rules
        self.proportional = rules.proportional

    def importance(self, parts: Attended, bias: Tensor | None) -> Tensor:
        """Return the importance of the patch tokens [B, N - num_prefix], without gradient."""
        if self.rules.importance == "order":
            count = parts.q.shape[-2] - self.num_prefix
            return torch.arange(count, 0, -1, device=parts.q.device, dtype=parts.q.dtype).expand(parts.q.shape[0], -1)
        with torch.no_grad():
            return token_importance(parts, self.attn.scale, bias, self.num_prefix, self.has_class)

    def merged(self, dst: Tensor, src: Tensor, sizes: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return merged tokens [B, M, C], their sizes [B, M] and the assignment [B, M, S].

        Args:
            dst: Tokens that stay [B, M, C].
            src: Tokens that join them [B, S, C].
            sizes: Their sizes [B, M] and [B, S], ``None`` while all are one.
        """
        with torch.no_grad():
            index, similarity = match_cosine(src, dst, self.num_prefix)
            groups = assignment(index, dst.shape[1], dst.dtype)
            dst_size, src_size = sizes if sizes is not None else (None, None)
            weight = similarity if self.rules.similarity_sizes else None
            if self.rules.clamp_sizes:
                if dst_size is not None and src_size is not None:
                    dst_size = dst_size.clamp(min=1)
                    src_size = (src_size if weight is None else src_size * weight).clamp(min=1)
                weight = None  # a similarity is at most 1, so sizes of 1 are raised back to 1
            size = merge_size(dst_size, src_size, groups, weight)
        return merge_mean(dst, src, groups), size, groups


class ReducedBlock(_RankingBlock):
    """Keeps ``prune`` tokens by importance, then merges them into ``merge`` (inference and fine-tuning).

    Args:
        source: A token block.
        prune: Tokens left after pruning.
        merge: Tokens left after merging.
        rules: Parts of the method that are on.
    """

    def __init__(self, source: TokenBlock, prune: int, merge: int, rules: Rules) -> None:
        super().__init__(source, rules)
        self.prune, self.merge = prune, min(merge, prune)

    def counts(self, n: int) -> tuple[int, int]:
        """Return how many of ``n`` tokens are left after pruning and after merging."""
        return min(self.prune, n), min(self.merge, n)

    def reduce(
        self, x: Tensor, size: Tensor | None, parts: Attended, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the kept tokens [B, merge, C] and their sizes."""
        prune, merge = self.counts(x.shape[1])
        if merge == x.shape[1]:
            return x, size
        order = rank_tokens(self.importance(parts, bias), prune, self.num_prefix, ordered=merge < prune)
        source = self.track.source[self.index + 1]
        if merge == prune:
            size = None if size is None else take_tokens(size, order)
            if source is not None:
                self.track.source[self.index + 1] = take_tokens(source, order)
            return take_tokens(x, order), size
        dst, src = order[:, :merge], order[:, merge:]
        sizes = None if size is None else (take_tokens(size, dst), take_tokens(size, src))
        x, size, groups = self.merged(take_tokens(x, dst), take_tokens(x, src), sizes)
        if source is not None:
            joined = groups.to(source.dtype) @ take_tokens(source, src)
            self.track.source[self.index + 1] = take_tokens(source, dst) + joined
        return x, size

    def extra_repr(self) -> str:
        return f"prune={self.prune}, merge={self.merge}"


@dataclass(frozen=True)
class Gate:
    """Candidates of one learnable count.

    Attributes:
        granularity: Step between the candidate patch counts.
        multiple: Tile to which the kept count is rounded up.
    """

    granularity: int = 1
    multiple: int = 1


class GatedBlock(_RankingBlock):
    """Learns how many tokens to prune and to merge; all tokens stay, those gone are masked.

    Its parameters ``prune_logits`` and ``merge_logits`` (absent where switched off) exist during the
    search only. With ``bypass`` set it keeps all tokens, as the dense model's block.

    Args:
        source: A token block.
        num_tokens: Tokens entering the model, prefix included.
        gate: Candidates.
        rules: Parts of the method that are on.
        switches: Whether to prune, whether to merge.
    """

    candidates: Tensor
    prune_logits: nn.Parameter | None
    merge_logits: nn.Parameter | None

    def __init__(
        self, source: TokenBlock, num_tokens: int, gate: Gate, rules: Rules, switches: tuple[bool, bool] = (True, True)
    ) -> None:
        super().__init__(source, rules)
        self.num_tokens = num_tokens
        self.gate = gate
        self.bypass = False
        device = next(self.attn.parameters()).device
        counts = torch.arange(num_tokens - self.num_prefix, 0, -gate.granularity, device=device)
        self.register_buffer("candidates", counts.float(), persistent=False)
        for name, on in zip(("prune_logits", "merge_logits"), switches, strict=True):
            self.register_parameter(name, nn.Parameter(torch.zeros_like(self.candidates)) if on else None)

    def start(self, prune: int, merge: int) -> None:
        """Let both counts start near a number: bell-shaped probabilities a twelfth of the patches wide."""
        width = max(1.0, len(self.candidates) * self.gate.granularity / 12)
        for logits, kept in ((self.prune_logits, prune), (self.merge_logits, merge)):
            if logits is not None:
                centre = min(kept, self.num_tokens) - self.num_prefix
                logits.data = -0.5 * ((self.candidates - centre) / width).square()

    def count(self, logits: Tensor | None) -> Tensor:
        """Return the count that ``logits`` stand for, a scalar with gradient; all tokens without logits."""
        if logits is None:
            return self.candidates.new_tensor(float(self.num_tokens))
        return kept_count(logits.float(), self.candidates, self.num_prefix, self.gate.multiple)

    def probability(self, logits: Tensor | None) -> Tensor:
        """Return each rank's probability of being kept [num_tokens]."""
        if logits is None:
            return self.candidates.new_ones(self.num_tokens)
        return keep_probability(logits.float(), self.candidates, self.num_prefix, self.num_tokens)

    def attend(self, x: Tensor, bias: Tensor | None) -> Attended:
        """Attend to the tokens that are still there."""
        mask = self.track.mask[self.index]
        if mask is None:
            return self.attn.attend(x, bias)
        return self.attn.attend(x, bias, lambda scores: masked_softmax(scores, mask))

    def reduce(
        self, x: Tensor, size: Tensor | None, parts: Attended, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return all tokens in descending order of importance; updates the track's mask."""
        if self.bypass or (self.prune_logits is None and self.merge_logits is None):
            return x, size
        i, track, n = self.index + 1, self.track, x.shape[1]
        order = rank_tokens(self.importance(parts, bias), n, self.num_prefix)
        x = take_tokens(x, order)
        size = None if size is None else size.gather(1, order)
        mask, source = track.mask[i], track.source[i]
        mask = x.new_ones(x.shape[:2], dtype=torch.float32) if mask is None else mask.gather(1, order)
        if source is not None:
            track.source[i] = take_tokens(source, order)
        pruned = int(self.count(self.prune_logits).detach())
        if pruned < track.alive[i]:
            mask = mask * keep_mask(self.probability(self.prune_logits), pruned, track.alive[i])
            track.alive[i] = pruned
        merged = int(self.count(self.merge_logits).detach())
        if merged < track.alive[i]:
            x, size = self._merge(x, size, merged, track.alive[i])
            mask = mask * keep_mask(self.probability(self.merge_logits), merged, track.alive[i])
            track.alive[i] = merged
        track.mask[i] = mask
        source = track.source[i]
        if source is not None:
            track.source[i] = source * (torch.arange(n, device=x.device) < track.alive[i]).unsqueeze(-1)
        return x, size

    def _merge(self, x: Tensor, size: Tensor | None, merged: int, alive: int) -> tuple[Tensor, Tensor]:
        """Write the group means over the destinations; the sources stay where they are."""
        sizes = None if size is None else (size[:, :merged], size[:, merged:alive])
        dst, dst_size, groups = self.merged(x[:, :merged], x[:, merged:alive], sizes)
        rest = torch.ones_like(x[:, merged:, 0]) if size is None else size[:, merged:]
        source = self.track.source[self.index + 1]
        if source is not None:
            joined = source[:, :merged] + groups.to(source.dtype) @ source[:, merged:alive]
            self.track.source[self.index + 1] = torch.cat((joined, source[:, merged:]), dim=1)
        return torch.cat((dst, x[:, merged:]), dim=1), torch.cat((dst_size, rest), dim=1)

    def extra_repr(self) -> str:
        return f"candidates={len(self.candidates)}, multiple={self.gate.multiple}"
