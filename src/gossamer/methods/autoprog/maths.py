"""Formulas of AutoProg (2203.14509): growth schedules, candidates, the choice of a sub-network."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gossamer.models.growing import Layout

__all__ = [
    "boundaries", "candidates", "choose", "make_divisible", "momentum", "planned", "power_law", "schedule", "shares",
    "split_depth",
]  # fmt: skip

TIE = 1e-7
"""Relative difference of scores that the fit's own rounding can make."""


def make_divisible(value: float, divisor: int) -> int:
    """Return ``value`` rounded to a multiple of ``divisor``, at least one, never below 0.9 of it."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def shares(start: float, stages: int) -> list[float]:
    """Return the share of the maximum at each stage, linear from ``start`` to 1."""
    return [1.0] if stages == 1 else [start + k / (stages - 1) * (1 - start) for k in range(stages)]


def schedule(start: float, stages: int, most: int, step: int = 1) -> list[int]:
    """Return a size by stage: ``most`` times its share, in multiples of ``step``, ``most`` at the end."""
    grown = [min(most, make_divisible(s * most, step)) for s in shares(start, stages)]
    return [*grown[:-1], most]


def boundaries(steps: int, stages: int) -> list[int]:
    """Return the first step of every stage, and the number of steps."""
    return [steps * k // stages for k in range(stages + 1)]


def split_depth(depth: int, layout: Layout) -> list[int]:
    """Return the blocks of each chain in a network of ``depth`` blocks.

    Every chain but the last has its share of the full model's blocks, in pairs where the full chain has an
    even number; at least one block a chain.
    """
    if len(layout.chains) == 1:
        return [depth]
    if depth == layout.depth:
        return [c.depth for c in layout.chains]
    counts = []
    for chain in layout.chains[:-1]:
        unit = 2 if chain.depth % 2 == 0 and depth > len(layout.chains) else 1
        share = depth * chain.depth / layout.depth if depth > len(layout.chains) else 1
        counts.append(min(chain.depth, make_divisible(share, unit)))
    return [*counts, depth - sum(counts)]


def candidates(values: Sequence[int], now: int | None, *, stay: bool, most: int) -> list[int]:
    """Return what one dimension may become at a search, smallest first.

    Args:
        values: The schedule of the dimension.
        now: Its present value; ``None`` at the first search, which looks at first, middle and last.
        stay: Whether the present value is among them.
        most: How many there are at most.
    """
    known = sorted(set(values))
    if now is None:
        return sorted({known[0], known[len(known) // 2], known[-1]})
    later = [v for v in known if v > now]
    return ([now, *later] if stay or not later else later)[:most]


def power_law(costs: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """Return (a1, a2) of the least-squares fit ``loss = a2 cost^a1``.

    For a given exponent the factor is known in closed form, which leaves a search over one number: a grid,
    refined until its step is below 1e-10. Costs that are all equal give exponent 0.
    """
    mean = sum(costs) / len(costs)
    logs = [math.log(c / mean) for c in costs]
    if max(logs) - min(logs) < 1e-12:
        return 0.0, sum(losses) / len(losses)

    def factor(a: float) -> float:
        powers = [math.exp(a * x) for x in logs]
        return sum(p * y for p, y in zip(powers, losses, strict=True)) / sum(p * p for p in powers)

    def error(a: float) -> float:
        scale = factor(a)
        return sum((y - scale * math.exp(a * x)) ** 2 for x, y in zip(logs, losses, strict=True))

    best, step = 0.0, 4.0
    while step > 1e-10:
        best = min((best + step * n / 10 for n in range(-20, 21)), key=error)
        step /= 10
    return best, factor(best) * mean**-best


def momentum(search: float) -> float:
    """Return the decay whose memory 1 / (1 - m) is a fifth of a search of ``search`` steps, 0.998 (published) at most.

    0.998 remembers 500 steps, a fifth of the published searches (two epochs of ImageNet in batches of 1024). In a
    search of 50 steps it would still score the network from before the growth.
    """
    return min(0.998, max(0.0, 1 - 5 / search)) if search > 0 else 0.0


def planned(values: Sequence[int], wanted: int) -> int:
    """Return the candidate that keeps to the schedule: the least that reaches ``wanted``, or the largest."""
    return min((v for v in values if v >= wanted), default=max(values))


def choose(costs: Sequence[float], losses: Sequence[float], plan: int = 0) -> tuple[int, float, list[float]]:
    """Return the chosen candidate, the weight w of cost, and every score ``loss cost^w`` (the least wins).

    w = max(-a1, 0) of the power law through all candidates: where a loss falls with cost as all do, candidates
    tie, and what wins is what lies below the law. Without a fall (w = 0) the least loss wins.

    Args:
        costs: Cost of each candidate.
        losses: Its mean loss, on the same batches for all.
        plan: The candidate that the schedule names: it wins ties. A law passes through any two points, so that two
            candidates of which the dearer has the lower loss always tie.
    """
    weight = max(-power_law(costs, losses)[0], 0.0)
    scores = [loss * cost**weight for cost, loss in zip(costs, losses, strict=True)]
    best = min(range(len(costs)), key=lambda i: (scores[i], costs[i]))
    return (plan if math.isclose(scores[plan], scores[best], rel_tol=TIE) else best), weight, scores
