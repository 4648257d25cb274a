"""From scores to masks: units in groups, one global ranking, a threshold or a budget.

Source: NViT (arXiv 2110.04869, section 3.3; release ``pruning_engine_general``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.kits.structure.regions import Keep, Structure

__all__ = ["Group", "form_groups", "prune_below", "prune_until", "smallest"]


@dataclass(frozen=True)
class Group:
    """Units of one structure that go together.

    Attributes:
        structure: Name of the structure.
        units: Indices of its units.
        score: Sum (or mean) of the units' scores.
        last: Whether it is the one that must stay (the highest of its structure).
    """

    structure: str
    units: tuple[int, ...]
    score: float
    last: bool


def _cuts(units: int, size: int, *, odd_first: bool) -> list[int]:
    """Return where the sorted units are cut; the group with a remainder is the first or the last."""
    rest = units % size
    starts = [0, *range(rest or size, units, size)] if odd_first else [*range(0, units, size)]
    return [*starts, units]


def form_groups(
    scores: Mapping[str, Tensor], sizes: Mapping[str, int], *, odd_first: bool = False, mean: bool = False
) -> list[list[Group]]:
    """Return the groups of every structure, lowest first.

    Units are sorted by score and cut into runs of one size; a group's score is the sum of its units'.

    Args:
        scores: [units] by structure.
        sizes: Units a group, by structure.
        odd_first: Put the remainder into the lowest group, so that what is left is a multiple of the
            size; else into the highest (release).
        mean: Score a group by the mean of its units instead: for scores that do not add up to a loss.
    """
    found = []
    for name, values in scores.items():
        order = torch.argsort(values, stable=True)
        cuts = _cuts(len(values), sizes[name], odd_first=odd_first)
        runs = [order[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        found.append(
            [
                Group(name, tuple(run.tolist()), _total(values[run], mean), i == len(runs) - 1)
                for i, run in enumerate(runs)
            ]
        )
    return found


def _total(values: Tensor, mean: bool) -> float:
    return float(values.mean() if mean else values.sum())


def _ranked(groups: Sequence[Sequence[Group]]) -> list[Group]:
    return sorted((g for row in groups for g in row), key=lambda g: g.score)


def _without(keep: Keep, gone: Sequence[Group]) -> Keep:
    new = {name: mask.clone() for name, mask in keep.items()}
    for g in gone:
        new[g.structure][list(g.units)] = False
    return new


def prune_below(groups: Sequence[Sequence[Group]], keep: Keep, rank: int) -> Keep:
    """Return masks without all groups that score at most as much as the one of a rank (release).

    The highest group of every structure stays. Groups pruned before stay pruned.

    Args:
        groups: From ``form_groups``; pruned units score lowest.
        keep: The masks so far.
        rank: 0-based rank in the global order; larger ones are the last.
    """
    ranked = _ranked(groups)
    threshold = ranked[min(max(rank, 0), len(ranked) - 1)].score
    return _without(keep, [g for g in ranked if g.score <= threshold and not g.last])


def prune_until(groups: Sequence[Sequence[Group]], keep: Keep, fits: Callable[[Keep], bool]) -> Keep:
    """Return masks without the lowest groups, as few as it takes for the rest to fit.

    The highest group of every structure stays, so the result may still not fit.

    Args:
        groups: From ``form_groups``.
        keep: The masks so far.
        fits: Whether masks are within the budget; once true, it stays true when more is pruned.
    """
    gone = [g for g in _ranked(groups) if not g.last and bool(keep[g.structure][list(g.units)].any())]
    low, high = 0, len(gone)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(_without(keep, gone[:middle])) else (middle + 1, high)
    return _without(keep, gone[:low])


def smallest(structures: Sequence[Structure], sizes: Mapping[str, int], *, odd_first: bool = False) -> dict[str, int]:
    """Return the units left of every structure when all groups but the highest are gone.

    Args:
        structures: The structures.
        sizes: Units a group, by structure.
        odd_first: As in ``form_groups``.
    """

    def left(units: int, size: int) -> int:
        cuts = _cuts(units, size, odd_first=odd_first)
        return cuts[-1] - cuts[-2]

    return {s.name: left(s.units, min(sizes[s.name], s.units)) for s in structures}
