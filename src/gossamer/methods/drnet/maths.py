"""Sizes, costs and the budget term of DRNet (arXiv 2106.02898)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import ModelError, RecipeError
from gossamer.cost.ledger import cost

__all__ = ["budget_shift", "budget_term", "credit_term", "default_sizes", "predictor_side", "probe", "temperature"]

SHARES = (1.0, 0.75, 0.5)
"""Published sizes over the network's own: 224, 168 and 112 of 224."""


def default_sizes(base: int) -> list[int]:
    """Return the published candidates for a network whose own input is ``base`` pixels: all, 3/4 and 1/2 of it."""
    return [round(base * share) for share in SHARES]


def predictor_side(base: int, share: float, step: int = 8) -> int:
    """Return the predictor's input size: ``share`` of ``base`` pixels, rounded down to ``step`` (at least one)."""
    return max(step, int(base * share) // step * step)


def temperature(start: float, end: float | None, index: int, total: int) -> float:
    """Return the temperature of a step: from ``start`` to ``end`` by equal factors; ``None``: constant (released)."""
    if end is None or total < 2:
        return start
    return start * (end / start) ** (index / (total - 1))


def budget_term(choice: Tensor, macs: Sequence[float], target: float) -> Tensor:
    """Return how far a batch's mean cost lies above the target, 0 below it and at most 1 (section 3.3, equation 13).

    ``max(0, (mean_i sum_j C_j h_ij - target) / (C_max - C_min))``. The choice itself enters, not its probabilities: a
    mean over probabilities could be met by indecision.

    Args:
        choice: One-hot rows [B, m] with the gradient of the straight-through choice.
        macs: Cost C_j of every candidate, the predictor left out.
        target: Bound of the mean, in the same unit.
    """
    costs = choice.new_tensor([c / max(macs) for c in macs])
    span = float(costs.max() - costs.min()) or 1.0
    return torch.relu((choice @ costs).mean() - target / max(macs)) / span


def credit_term(odds: Tensor, said: Tensor, target: Tensor) -> Tensor:
    """Return 0 with the gradient of the loss expected under the odds, which a draw's gradient has in the mean.

    ``mean_i sum_j odds_ij CE(said_ij, target_i)`` without its value: unlike the straight-through gradient it compares
    the losses themselves, and no draw enters. Not of the paper.

    Args:
        odds: Probabilities [B, m] of the sizes, with their gradient.
        said: Logits [B, m, K] of every size.
        target: [B] class indices, or [B, K] class probabilities.
    """
    each = [F.cross_entropy(logits, target, reduction="none") for logits in said.unbind(1)]
    return ((odds - odds.detach()) * torch.stack(each, 1)).sum(1).mean()


def budget_shift(scores: Tensor, macs: Sequence[float], target: float) -> list[float]:
    """Return what to add to the scores so that the largest costs ``target`` or less in the mean.

    Every score pays one price for its cost, ``-price * C_j / C_max``: the least that suffices, 0 where the scores alone
    do. Not of the paper.

    Args:
        scores: [N, m], float32.
        macs: Cost C_j of every candidate.
        target: Bound of the mean, in the same unit; at least the smallest cost.
    """
    costs = [c / max(macs) for c in macs]
    gap = min((abs(a - b) for a in costs for b in costs if a != b), default=1.0)

    def shift(paid: float) -> list[float]:
        return [-paid * c for c in costs]

    high = (float(scores.max() - scores.min()) + 1) / gap
    low, paid = 0.0, 0.0
    for _ in range(60):
        taken = (scores + torch.tensor(shift(paid))).argmax(1)
        fits = float(torch.tensor(costs)[taken].double().mean()) <= target / max(macs)
        low, high = (low, paid) if fits else (paid, high)
        paid = (low + high) / 2
    return shift(high)


@contextmanager
def _seen_sides(model: nn.Module) -> Iterator[list[int]]:
    """Record the smaller side of every map that a batch norm is given."""
    sides: list[int] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].dim() == 4:
            sides.append(min(args[0].shape[2:]))

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        yield sides
    finally:
        for handle in handles:
            handle.remove()


def probe(model: nn.Module, sizes: Sequence[int], base: tuple[int, int, int]) -> list[int]:
    """Return the MACs of one image at every size.

    Args:
        model: The classifier.
        sizes: Candidate sides in pixels.
        base: (C, H, W) of the network's own input.

    Raises:
        ModelError: The network does not run at its own size.
        RecipeError: It cannot take one of the candidates; says which it can.
    """
    with _seen_sides(model) as sides:
        cost(model, base, saved=False)
    stride = base[1] // min(sides) if sides else 1
    found = []
    for size in sizes:
        if size < stride:
            raise RecipeError(
                f"drnet: sizes={list(sizes)}: {type(model).__name__} divides its input by {stride}, so an image of "
                f"{size} pixels leaves no position of its last map; allowed are {stride} to {base[1]} pixels"
            )
        try:
            found.append(cost(model, (base[0], size, size), saved=False).macs)
        except ModelError as err:
            raise RecipeError(
                f"drnet: sizes={list(sizes)}: {type(model).__name__} does not run at {size} pixels: {err}. It must end "
                f"in a global pooling, and its strides ({stride} in all) must fit the size; take multiples of {stride}"
            ) from err
    return found
