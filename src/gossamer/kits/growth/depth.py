"""Growth in depth: where each block of a deeper network comes from, and what a new one holds.

One interface for all operators: ``grow(blocks, depth, operator, ...)``. The first block that comes from a
source *is* that source (the same module, so that optimiser states and averages stay with it); further ones
are copies, filled by the operator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, nearest
from gossamer.models.growing import Chain, Layout, branch_outputs, set_drop_rate

__all__ = [
    "OPERATORS", "Operator", "blocks_of", "grow", "grow_model", "interpolation", "new_blocks", "put_blocks",
    "set_drop_rates", "stacking",
]  # fmt: skip

NOISE = 0.01
"""Standard deviation that the noise operator adds (changlin31/AutoProg, prog/helpers.py)."""
INIT = 0.02
"""Standard deviation of fresh matrices, as timm initialises vision transformers."""


def interpolation(old: int, new: int) -> list[int]:
    """Return the source of each of ``new`` blocks: the last ones are doubled in place first.

    2203.14509, section 3.2 (interpolation growth); for ``new`` beyond twice ``old`` as the release's new_idx.
    """
    whole, rest = new // old * old, new % old
    front = old - rest
    return [i * old // whole if i * old // whole < front else (i + front) * old // (whole + old) for i in range(new)]


def stacking(old: int, new: int) -> list[int]:
    """Return the source of each of ``new`` blocks: the whole network again on top."""
    return [i % old for i in range(new)]


def new_blocks(old: int, new: int) -> list[int]:
    """Return which of ``new`` blocks are new under interpolation: those with the source of the one before."""
    source = interpolation(old, new)
    return [i for i in range(1, new) if source[i] == source[i - 1]]


Fill = Callable[[nn.Module, Mapping[str, Tensor] | None, torch.Generator | None], None]


def _keep(block: nn.Module, average: Mapping[str, Tensor] | None, generator: torch.Generator | None) -> None:
    """A new block is a copy of its source."""


def _silence(block: nn.Module, average: Mapping[str, Tensor] | None, generator: torch.Generator | None) -> None:
    for layer in branch_outputs(block):
        for p in layer.parameters(recurse=False):
            p.zero_()


def _redraw(block: nn.Module, average: Mapping[str, Tensor] | None, generator: torch.Generator | None) -> None:
    for module in block.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.ndim > 1:
                p.copy_(torch.empty(p.shape).normal_(0, INIT, generator=generator).clamp_(-2 * INIT, 2 * INIT))
            elif name == "bias":
                p.zero_()
            elif "Norm" in type(module).__name__:
                p.fill_(1.0)  # other vectors (layer scale) keep the source's value


def _disturb(block: nn.Module, average: Mapping[str, Tensor] | None, generator: torch.Generator | None) -> None:
    for p in block.parameters():
        p.add_(torch.empty(p.shape).normal_(0, NOISE, generator=generator).to(p.device))


def _remember(block: nn.Module, average: Mapping[str, Tensor] | None, generator: torch.Generator | None) -> None:
    if average is None:
        raise ModelError("growth by momentum needs the moving average of every block; give grow(..., averages=...)")
    for name, value in block.state_dict(keep_vars=True).items():
        if name in average:
            value.copy_(average[name])


@dataclass(frozen=True)
class Operator:
    """One way to grow.

    Attributes:
        source: ``source(old, new)``: index of the block that each new one comes from.
        fill: Changes a fresh copy of the source, given the source's moving average and a generator.
        averaged: Whether it needs moving averages.
        drawn: Whether it draws random numbers.
    """

    source: Callable[[int, int], list[int]]
    fill: Fill
    averaged: bool = False
    drawn: bool = False


OPERATORS: Mapping[str, Operator] = {
    "interpolate": Operator(interpolation, _keep),
    "stack": Operator(stacking, _keep),
    "identity": Operator(interpolation, _silence),
    "random": Operator(interpolation, _redraw, drawn=True),
    "noise": Operator(interpolation, _disturb, drawn=True),
    "mogrow": Operator(interpolation, _remember, averaged=True),
}
"""Copy in place; copy on top; a copy that adds nothing yet; fresh weights; copy with noise; copy of the source's
moving average (MoGrow, 2203.14509 section 3.2)."""


@torch.no_grad()
def grow(
    blocks: Sequence[nn.Module],
    depth: int,
    operator: str = "interpolate",
    *,
    averages: Sequence[Mapping[str, Tensor]] | None = None,
    generator: torch.Generator | None = None,
) -> list[nn.Module]:
    """Return ``depth`` blocks grown from ``blocks``.

    Args:
        blocks: The blocks that are there; all of them stay.
        depth: How many are wanted, at least as many.
        operator: Name in ``OPERATORS``.
        averages: Moving average of each block's state dict, for operators that need it.
        generator: Source of random numbers, for operators that draw.

    Raises:
        ModelError: Fewer blocks wanted than there are, or an unknown operator.
    """
    if operator not in OPERATORS:
        known = ", ".join(OPERATORS)
        raise ModelError(f"growth {operator!r} is unknown; known are {known}{nearest(operator, OPERATORS)}")
    if depth < len(blocks) or not blocks:
        raise ModelError(f"growth from {len(blocks)} to {depth} blocks; expected at least as many as there are")
    chosen = OPERATORS[operator]
    grown: list[nn.Module] = []
    taken: set[int] = set()
    for index in chosen.source(len(blocks), depth):
        if index not in taken:
            taken.add(index)
            grown.append(blocks[index])
            continue
        block = copy.deepcopy(blocks[index])
        for module in block.modules():  # a copy must not report to whoever listens to its source
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        chosen.fill(block, None if averages is None else averages[index], generator)
        grown.append(block)
    return grown


def blocks_of(model: nn.Module, chain: Chain) -> list[nn.Module]:
    """Return the blocks that the chain holds now."""
    return [b for name in chain.containers for b in model.get_submodule(name).children()]


def put_blocks(model: nn.Module, chain: Chain, blocks: Sequence[nn.Module]) -> None:
    """Let the chain hold ``blocks``; containers are filled in order up to their full number, the last has the rest."""
    start = 0
    for name, room in zip(chain.containers, (*chain.full[:-1], len(blocks)), strict=True):
        container, mine = model.get_submodule(name), blocks[start : start + room]
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            raise ModelError(f"{name!r} is {type(container).__name__}; expected nn.Sequential or nn.ModuleList")
        if list(container.children()) != list(mine):
            del container[:]
            for block in mine:
                container.append(block)
        start += room


def grow_model(
    model: nn.Module,
    chains: Sequence[Chain],
    counts: Sequence[int],
    operator: str = "interpolate",
    *,
    average: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Grow every chain of ``model`` in place to its number of blocks.

    Args:
        model: The model.
        chains: Its chains.
        counts: Blocks wanted of each chain, at least as many as it has.
        operator: Name in ``OPERATORS``.
        average: Moving average of the model's state dict, for operators that need it.
        generator: Source of random numbers, for operators that draw.
    """
    names = {m: n for n, m in model.named_modules()}
    for chain, count in zip(chains, counts, strict=True):
        blocks = blocks_of(model, chain)
        averages = None
        if average is not None:
            starts = [f"{names[b]}." for b in blocks]
            averages = [{k.removeprefix(s): v for k, v in average.items() if k.startswith(s)} for s in starts]
        put_blocks(model, chain, grow(blocks, count, operator, averages=averages, generator=generator))


def set_drop_rates(model: nn.Module, layout: Layout, share: float) -> None:
    """Give the blocks that are there stochastic depth, rising linearly to ``share`` of the full model's rate."""
    if not layout.drop_path:
        return
    dropped = [(b, c.dropped) for c in layout.chains for b in blocks_of(model, c)]
    for index, (block, applies) in enumerate(dropped):
        rate = layout.drop_path * share * index / max(1, len(dropped) - 1)
        set_drop_rate(block, rate if applies else 0.0)
