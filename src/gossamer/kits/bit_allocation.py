"""Bit widths under a size budget: an exact solution of the additive knapsack.

Cost and size are sums over modules, so the set of non-dominated (size, cost) pairs, grown module
by module, holds the optimum for every budget; enumeration of all configurations is not needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from gossamer.core.errors import RecipeError

__all__ = ["allocate_bits", "budget_bits", "size_mb"]

_FORM = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*(bit|MB)\s*$")


def size_mb(num_weights: int, bits: float) -> float:
    """Return ``num_weights * bits / 8`` in decimal megabytes (arXiv 2106.14156, Table 1)."""
    return num_weights * bits / 8e6


def budget_bits(text: str, decided: int, fixed_bits: int) -> int:
    """Return the weight bits that the modules to decide may take together.

    Args:
        text: ``"6bit"`` (mean width over the modules to decide) or ``"16.5MB"`` (decimal, all
            quantized weights).
        decided: Weights in the modules to decide.
        fixed_bits: Weight bits of the quantized layers whose width is fixed.

    Raises:
        RecipeError: Another form.
    """
    match = _FORM.match(text)
    if match is None:
        raise RecipeError(f"mixed.budget={text!r}; allowed are a mean width like '6bit' or a size like '16.5MB'")
    number = float(match[1])
    total = number * decided if match[2] == "bit" else number * 8e6 - fixed_bits
    return math.floor(total + 1e-9)


def _add(front: list[tuple[int, float, tuple[int, ...]]], size: int, costs: Mapping[int, float], limit: int):
    """Return the non-dominated states after one more module; states are (size, cost, widths)."""
    grown = [(s + size * b, c + cost, (*w, b)) for s, c, w in front for b, cost in costs.items()]
    grown = sorted(g for g in grown if g[0] <= limit)
    kept: list[tuple[int, float, tuple[int, ...]]] = []
    best = math.inf
    for state in grown:
        if state[1] < best:
            kept.append(state)
            best = state[1]
    return kept


def allocate_bits(costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Return the widths of least total cost whose size keeps the budget (arXiv 2106.14156 eq. 18).

    Exact. Of equally good configurations the smallest is returned.

    Args:
        costs: Cost of each module at each candidate width.
        sizes: Number of weights of each module.
        budget: Weight bits for all modules together.

    Raises:
        RecipeError: Nothing fits; names the reachable range.
    """
    names = sorted(costs)
    least = {n: sizes[n] * min(costs[n]) for n in names}
    rest = sum(least.values())
    if rest > budget:
        count = sum(sizes[n] for n in names)
        raise RecipeError(
            f"mixed.budget: {budget / count:.2f} bits a weight; the candidate widths reach "
            f"{rest / count:.2f}..{sum(sizes[n] * max(costs[n]) for n in names) / count:.2f}. Raise the budget"
        )
    front: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for name in names:
        rest -= least[name]
        front = _add(front, sizes[name], costs[name], budget - rest)
    size, _, widths = min(front, key=lambda s: (s[1], s[0]))
    return dict(zip(names, widths, strict=True))
