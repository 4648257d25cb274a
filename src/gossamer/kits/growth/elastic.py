"""Networks of several depths in one: sub-networks share blocks, and each can run or be taken out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from gossamer.core.errors import ModelError
from gossamer.kits.growth.depth import blocks_of, new_blocks, put_blocks
from gossamer.models.growing import Chain

__all__ = ["Elastic", "active_blocks"]


def active_blocks(least: int, most: int, depth: int) -> list[int]:
    """Return which of ``most`` blocks the sub-network of ``depth`` blocks has.

    The network was grown by interpolation from ``least`` blocks; of its new blocks the deepest come first,
    so that sub-networks are nested (2203.14509, section 3.3).

    Raises:
        ModelError: ``most`` is beyond twice ``least``, or ``depth`` out of range.
    """
    if not least <= depth <= most or most > 2 * least:
        raise ModelError(f"sub-network of {depth} blocks in {least}..{most}; expected that range, at most doubled")
    new = new_blocks(least, most)
    skipped = set(new[: len(new) - (depth - least)])
    return [i for i in range(most) if i not in skipped]


@dataclass(frozen=True)
class Elastic:
    """A supernet over depths. The blocks of a smaller sub-network are the only ones that run in it.

    Attributes:
        chains: The chains of blocks.
        least: Blocks of each chain in the smallest sub-network.
        most: Blocks of each chain in the supernet.
    """

    chains: tuple[Chain, ...]
    least: tuple[int, ...]
    most: tuple[int, ...]

    def blocks(self, model: nn.Module, counts: Sequence[int]) -> list[list[nn.Module]]:
        """Return the blocks of each chain that the sub-network with ``counts`` blocks has."""
        chosen = []
        for chain, least, most, count in zip(self.chains, self.least, self.most, counts, strict=True):
            there = blocks_of(model, chain)
            chosen.append([there[i] for i in active_blocks(least, most, count)])
        return chosen

    @contextmanager
    def running(self, model: nn.Module, counts: Sequence[int]) -> Iterator[None]:
        """Let ``model`` be the sub-network inside: the other blocks are absent, not masked."""
        whole = [blocks_of(model, c) for c in self.chains]
        self.extract(model, counts)
        try:
            yield
        finally:
            for chain, blocks in zip(self.chains, whole, strict=True):
                put_blocks(model, chain, blocks)

    def extract(self, model: nn.Module, counts: Sequence[int]) -> None:
        """Let ``model`` be the sub-network from now on."""
        for chain, blocks in zip(self.chains, self.blocks(model, counts), strict=True):
            put_blocks(model, chain, blocks)
