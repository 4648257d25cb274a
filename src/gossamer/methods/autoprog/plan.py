"""The phases of a training that grows: supernet, scoring and stage, in turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from gossamer.core.errors import PlanError
from gossamer.core.schedule import Loader, Phase, Step
from gossamer.methods.autoprog.maths import boundaries

__all__ = ["Place", "place", "split"]

Score = Callable[[int, nn.Module, Mapping[str, Loader], Step], dict[str, float]]
MOST_SIZES = 3
"""Of the candidates of a search."""


@dataclass(frozen=True)
class Place:
    """What a phase is in a growing training: ``"super"``, ``"score"`` or ``"stage"``, of which stage, and number."""

    kind: str
    stage: int
    number: int


def place(phase: Phase, whole: str) -> Place | None:
    """Return what ``phase`` is in the growing training ``whole``, ``None`` if no part of it."""
    found = re.fullmatch(re.escape(whole) + r"\.(super|score|stage)(\d+)(?:\.(\d+))?", phase.name)
    return None if found is None else Place(found[1], int(found[2]), int(found[3] or 0))


def _search(length: int, records: int) -> list[int]:
    """Return the steps of the supernet before each record: half before the first, the rest spread evenly."""
    first = length if records == 1 else length - length // 2
    rest = boundaries(length - first, max(1, records - 1))
    return [first, *(b - a for a, b in zip(rest, rest[1:], strict=False))][:records]


def split(  # noqa: PLR0913 - a search has as many parts as the paper gives it
    phase: Phase,
    *,
    stages: int,
    search: float | None,
    first: bool,
    records: int,
    score: Score,
    done: Callable[[int], bool],
    fresh: bool,
) -> list[Phase]:
    """Return the parts of ``phase``: together they have its steps, its learning rates and its batches.

    Args:
        phase: The training that is to grow.
        stages: Number of stages; all but the last can begin with a search.
        search: Share of a stage that the supernet trains; ``None``: no search.
        first: Whether the first stage has one.
        records: How often the candidates are scored in a search.
        score: Scores the candidates of one size; one unit of work.
        done: Whether all candidates have the record of that number.
        fresh: Whether optimisers start anew where the network changes.

    Raises:
        PlanError: The training is too short.
    """
    edges = boundaries(phase.steps, stages)
    shortest = min(b - a for a, b in zip(edges, edges[1:], strict=False))
    lengths = [0 if search is None else max(1, round(search * (b - a))) for a, b in zip(edges, edges[1:], strict=False)]
    if shortest < 1 or (search is not None and stages > 1 and shortest < 2):
        need = stages * (1 if search is None or stages == 1 else 2)
        raise PlanError(
            f"autoprog: a growth schedule of {stages} stages in phase {phase.name!r}, which has {phase.steps} steps; "
            f"expected at least {need} steps. Lower stages, or train longer"
        )
    parts: list[Phase] = []
    for k, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        at = start
        if search is not None and (first or k > 0) and k < stages - 1:
            for j, steps in enumerate(_search(min(lengths[k], end - start - 1), records)):
                if not steps:
                    continue
                part = phase.part(f"{phase.name}.super{k}.{j}", at, steps)
                parts.append(replace(part, fresh=fresh and j == 0, growing=True))
                parts.append(_scoring(f"{phase.name}.score{k}.{j}", j, score, done))
                at += steps
        stage = phase.part(f"{phase.name}.stage{k}", at, end - at)
        parts.append(replace(stage, fresh=fresh, growing=k < stages - 1))
    return parts


def _scoring(name: str, record: int, score: Score, done: Callable[[int], bool]) -> Phase:
    return Phase(
        name,
        MOST_SIZES,
        turns=(),
        growing=True,
        until=lambda model: done(record),
        work=lambda model, loaders, step: score(record, model, loaders, step),
    )
