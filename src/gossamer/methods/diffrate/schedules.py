"""Integer schedules: released lists, checks, and fitting a searched schedule to its budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from gossamer.core.errors import RecipeError, nearest
from gossamer.ops.token_rates import TokenMacs

__all__ = ["Free", "Schedule", "fit_schedule", "lowest_schedule", "ramp_schedule", "released", "resolve_schedule"]


@dataclass(frozen=True)
class Schedule:
    """Tokens left after pruning and after merging in each block, prefix included.

    Attributes:
        prune: Per block.
        merge: Per block; never above ``prune``, and neither rises from block to block.
    """

    prune: tuple[int, ...]
    merge: tuple[int, ...]

    @staticmethod
    def monotone(prune: Sequence[int], merge: Sequence[int], num_tokens: int) -> Schedule:
        """Return the effective schedule: a count above what is there changes nothing."""
        pruned, merged, n = [], [], num_tokens
        for p, m in zip(prune, merge, strict=True):
            pruned.append(min(p, n))
            merged.append(min(m, pruned[-1]))
            n = merged[-1]
        return Schedule(tuple(pruned), tuple(merged))


@dataclass(frozen=True)
class Free:
    """What a search may choose in one block.

    Attributes:
        prune: Keep-probability of every rank under pruning.
        merge: The same under merging.
        unit: Counts are multiples of this (or all tokens).
        lowest: Fewest tokens that may stay.
        switches: Whether pruning and merging are on.
    """

    prune: Sequence[float]
    merge: Sequence[float]
    unit: int
    lowest: int
    switches: tuple[bool, bool] = (True, True)

    def mass(self, low: int, high: int) -> tuple[float, float, float]:
        """Return the keep-probability of ranks low..high-1 under both, under pruning, under merging."""
        p, m = self.prune[low:high], self.merge[low:high]
        return sum(a * b for a, b in zip(p, m, strict=True)), sum(p), sum(m)


@cache
def _released() -> dict[str, Any]:
    text = resources.files("gossamer.methods.diffrate").joinpath("schedules.json").read_text(encoding="utf-8")
    return json.loads(text)


def released() -> tuple[str, ...]:
    """Return the names of the released lists: ``"deit_small/2.9"`` is DeiT-S at 2.9 GMACs."""
    return tuple(_released())


def resolve_schedule(schedule: str | dict[str, list[int]], depth: int, num_tokens: int, num_prefix: int) -> Schedule:
    """Return the effective schedule that an option names or spells out.

    Args:
        schedule: Name of a released list, or ``{"prune": [...], "merge": [...]}`` (either may be absent).
        depth: Blocks of the model.
        num_tokens: Tokens entering them.
        num_prefix: Leading tokens that always stay.

    Raises:
        RecipeError: Unknown name, wrong length, or a count out of range.
    """
    if isinstance(schedule, str):
        if schedule not in _released():
            raise RecipeError(
                f"diffrate: schedule {schedule!r} is unknown; released are {', '.join(released())}"
                f"{nearest(schedule, released())}"
            )
        entry = _released()[schedule]
        if entry["num_tokens"] != num_tokens or len(entry["prune"]) != depth:
            raise RecipeError(
                f"diffrate: schedule {schedule!r} is for {len(entry['prune'])} blocks of {entry['num_tokens']} tokens; "
                f"the model has {depth} blocks of {num_tokens}. Search one for this model (schedule=null)"
            )
        return Schedule.monotone(entry["prune"], entry["merge"], num_tokens)
    unknown = set(schedule) - {"prune", "merge"}
    if unknown or not schedule:
        raise RecipeError(f"diffrate: schedule has keys {sorted(schedule)}; allowed are 'prune' and 'merge'")
    for name, counts in schedule.items():
        if len(counts) != depth:
            raise RecipeError(f"diffrate: schedule {name!r} has {len(counts)} counts; the model has {depth} blocks")
        wrong = [c for c in counts if not num_prefix < c <= num_tokens]
        if wrong:
            raise RecipeError(
                f"diffrate: schedule {name!r} keeps {wrong[0]} tokens; allowed are {num_prefix + 1}..{num_tokens}"
            )
    full = [num_tokens] * depth
    return Schedule.monotone(schedule.get("prune", full), schedule.get("merge", full), num_tokens)


def lowest_schedule(free: Sequence[Free | None], num_tokens: int) -> Schedule:
    """Return the smallest schedule the search may choose."""
    counts = [num_tokens if f is None else f.lowest for f in free]
    return Schedule.monotone(counts, counts, num_tokens)


def ramp_schedule(free: Sequence[Free | None], macs: TokenMacs, target: int, *, spare_last: bool) -> Schedule:
    """Return counts that fall evenly from block to block and meet a budget: a start for short searches.

    Half of what leaves a block is pruned, half merged (all of it by the one that is on). A block that
    stands for several (the next free one is further down) takes the count at their middle.

    Args:
        free: What may change, per block; ``None`` for a block that keeps its tokens.
        macs: Cost of a schedule.
        target: Budget in MACs.
        spare_last: Start the last block, if it is free, at its fewest tokens: nothing reads the patch
            tokens after the last attention of a class-token model.
    """
    depth, top = len(free), macs.num_tokens
    chosen = [b for b, f in enumerate(free) if f is not None]
    middle = {b: (b + nxt - 1) / 2 for b, nxt in zip(chosen, [*chosen[1:], depth], strict=True)}

    def at(slope: float) -> Schedule:
        prune, merge, n = [], [], top
        for block, choice in enumerate(free):
            if choice is None:
                prune.append(n)
                merge.append(n)
                continue
            last = spare_last and block == depth - 1
            new = choice.lowest if last else max(choice.lowest, round(top - slope * (middle[block] - chosen[0] + 1)))
            new = min(n, new)
            half = {(True, False): new, (False, True): n}.get(choice.switches, (n + new) // 2)
            prune.append(half)
            merge.append(new)
            n = new
        return Schedule(tuple(prune), tuple(merge))

    steps = [top * k / 512 for k in range(513)]
    return next((s for s in map(at, steps) if macs(s.merge) <= target), at(steps[-1]))


def _lowered(
    schedule: Schedule, free: Sequence[Free | None], num_tokens: int, block: int
) -> tuple[Schedule, float] | None:
    """Return the schedule with one unit less in a block and the probability mass that costs."""
    choice, n = free[block], schedule.merge[block]
    if choice is None:
        return None
    new = (n - 1) // choice.unit * choice.unit
    if new < choice.lowest:
        return None
    both, by_prune, by_merge = choice.mass(new, n)
    prune, merge = list(schedule.prune), list(schedule.merge)
    merge[block] = new
    if choice.switches == (True, False) or (choice.switches[0] and by_prune <= by_merge):
        prune[block] = new
    return Schedule.monotone(prune, merge, num_tokens), both


def _raised(
    schedule: Schedule, free: Sequence[Free | None], num_tokens: int, block: int
) -> tuple[Schedule, float] | None:
    """Return the schedule with one unit more in a block and the probability mass that gains."""
    choice, n = free[block], schedule.merge[block]
    above = schedule.merge[block - 1] if block else num_tokens
    if choice is None or n >= above:
        return None
    new = min((n // choice.unit + 1) * choice.unit, above)
    prune, merge = list(schedule.prune), list(schedule.merge)
    merge[block], prune[block] = new, max(new, prune[block])
    return Schedule.monotone(prune, merge, num_tokens), choice.mass(n, new)[0]


def fit_schedule(schedule: Schedule, free: Sequence[Free | None], macs: TokenMacs, target: int) -> Schedule:
    """Return the schedule moved to the budget: MACs at most ``target``, and no unit more would fit.

    The search ends near its budget, not on it. Units are taken where they lose the least keep-probability per
    MAC until the budget is met, then given back where they gain the most, as long as they fit.

    Args:
        schedule: What the search found.
        free: What may change, per block; ``None`` for a block that keeps its tokens.
        macs: Cost of a schedule.
        target: Budget in MACs, at least that of ``lowest_schedule``.
    """

    def options(step: Any) -> list[tuple[float, int, Schedule]]:
        found, cost = [], macs(schedule.merge)
        for block in range(len(free)):
            moved = step(schedule, free, macs.num_tokens, block)
            if moved is not None and (change := macs(moved[0].merge) - cost) != 0:
                found.append((moved[1] / abs(change), block, moved[0]))
        return found

    while macs(schedule.merge) > target:
        schedule = min(options(_lowered), key=lambda o: o[:2])[2]
    while fitting := [o for o in options(_raised) if macs(o[2].merge) <= target]:
        schedule = max(fitting, key=lambda o: o[:2])[2]
    return schedule
