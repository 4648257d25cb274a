"""Look at a run before it runs: checks, a table of its phases, an estimate of time and disk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gossamer.core.errors import PlanError, nearest
from gossamer.core.schedule import Loader, Phase, Plan, Step
from gossamer.core.stack import Stack, TaskLoss
from gossamer.recipe import TrainSettings

__all__ = ["check_plan", "describe_plan", "estimate"]


def check_plan(stack: Stack, plan: Sequence[Phase], loaders: Mapping[str, Loader], settings: TrainSettings) -> None:
    """Refuse what cannot run, before anything runs.

    Raises:
        PlanError: Two phases share a name, a turn lacks its loader, or fp16 meets a method that
            evaluates several passes (one loss scale cannot serve them).
    """
    names = [p.name for p in plan]
    for name in names:
        if names.count(name) > 1:
            raise PlanError(f"phase {name!r} occurs {names.count(name)} times; names must differ, they seed the run")
    for phase in plan:
        turns = [t.name for t in phase.turns]
        if len(set(turns)) < len(turns):
            raise PlanError(f"phase {phase.name!r}: turns {turns}; turn names must differ")
        for turn in phase.turns if phase.work is None else ():
            if turn.loader not in loaders:
                hint = nearest(turn.loader, loaders)
                raise PlanError(
                    f"phase {phase.name!r}, turn {turn.name!r}: loader {turn.loader!r}; "
                    f"given are {sorted(loaders)}{hint}"
                )
            wrappers = [type(m).__name__ for m in stack.wrappers(turn)]
            if settings.precision == "fp16" and wrappers:
                raise PlanError(
                    f"train.precision='fp16' with {', '.join(wrappers)}: a method that evaluates several passes needs "
                    f"unscaled gradients; use precision bf16 or no"
                )


def describe_plan(model: nn.Module, stack: Stack, plan: Sequence[Phase]) -> list[dict[str, Any]]:
    """Return the phases of a run as plain data, without training.

    Args:
        model: A throw-away dense model; it is prepared here unless the stack has been already.
        stack: The methods.
        plan: The recipe's own phases, before the methods add theirs.

    Returns:
        One dict a phase: ``phase, steps, kind ("turns" or "work"), schedule, warmup, ends_early, turns``;
        a turn has ``name, every, loader, own_objective, trains, wrapped_by``, and each trained group
        ``group, parameters (None while it does not exist yet), lr (None: the recipe's)``.
    """
    if not stack.edits:
        model = stack.prepare(model)
    sizes = {name: sum(p.numel() for p in ps) for name, ps in stack.groups(model).items()}
    rows = []
    for phase in stack.phases(Plan(plan)):
        turns = [
            {
                "name": t.name,
                "every": t.every,
                "loader": t.loader,
                "own_objective": t.objective is not None,
                "trains": [{"group": g, "parameters": sizes.get(g), "lr": (phase.lr or {}).get(g)} for g in t.trains],
                "wrapped_by": [type(m).__name__ for m in stack.wrappers(t)],
            }
            for t in (phase.turns if phase.work is None else ())
        ]
        rows.append(
            {
                "phase": phase.name,
                "steps": phase.steps,
                "kind": "turns" if phase.work is None else "work",
                "schedule": phase.schedule,
                "warmup": phase.warmup,
                "ends_early": phase.until is not None,
                "turns": turns,
            }
        )
    return rows


def estimate(
    model: nn.Module, stack: Stack, plan: Sequence[Phase], task_loss: TaskLoss, loaders: Mapping[str, Loader]
) -> dict[str, Any]:
    """Estimate time and disk by timing one gradient evaluation of every kind of turn.

    Args:
        model: A throw-away model, prepared with ``stack``.
        stack: The methods.
        plan: The full plan (``stack.phases`` applied).
        task_loss: As in ``Stack.grads``.
        loaders: Loaders by name, as the methods wrap them.

    Returns:
        ``seconds`` by phase (None where a method's own work cannot be timed beforehand),
        ``seconds_known`` (their sum) and ``disk_bytes`` (two checkpoints and the finished model).
    """
    groups = stack.groups(model)
    timed: dict[Any, float] = {}
    seconds: dict[str, float | None] = {}
    model.train()
    for phase in plan:
        if phase.work is not None or any(g not in groups for t in phase.turns for g in t.trains):
            seconds[phase.name] = None
            continue
        total = 0.0
        for turn in phase.turns:
            key = (turn.trains, turn.objective, turn.loader)
            if key not in timed:
                step = Step(phase.name, turn.name, 0, phase.steps)
                params = [p for g in turn.trains for p in groups[g]]
                grads = stack.grads(task_loss, turn)
                for _ in range(2):  # the first warms up
                    start = time.perf_counter()
                    grads(model, loaders[turn.loader](phase.drawn(step)), step, params)
                    timed[key] = time.perf_counter() - start
                for p in params:
                    p.grad = None
            total += timed[key] * phase.steps / turn.every
        seconds[phase.name] = total
    known = [s for s in seconds.values() if s is not None]
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, torch.Tensor))
    trained = {g for phase in plan if phase.work is None for t in phase.turns for g in t.trains}
    moments = sum(8 * p.numel() for g in trained for p in groups.get(g, ()))
    return {"seconds": seconds, "seconds_known": sum(known), "disk_bytes": 2 * (weights + moments) + weights}
