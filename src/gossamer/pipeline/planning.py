"""What a recipe will do, found without training."""

from __future__ import annotations

from typing import Any

from gossamer.cost.ledger import cost
from gossamer.engine.planning import describe_plan, estimate
from gossamer.pipeline.setup import set_up
from gossamer.recipe import Recipe

__all__ = ["describe"]


def describe(recipe: Recipe) -> dict[str, Any]:
    """Return phases, turns, groups, edits, dense cost, estimated seconds and bytes on disk.

    The time is an estimate: one timed step of every kind; what a method's own work takes is not known.
    """
    setup = set_up(recipe)
    dense = cost(setup.dense)
    model = setup.stack.prepare(setup.model)
    phases = describe_plan(model, setup.stack, setup.plan)
    loaders = {name: setup.stack.loader(name, loader) for name, loader in setup.loaders.items()}
    guess = estimate(model, setup.stack, setup.stack.phases(setup.plan), setup.task.loss, loaders)
    return {
        "name": recipe.name,
        "order": [type(m).__name__ for m in setup.stack.methods],
        "phases": phases,
        "edits": [{"method": type(setup.stack.methods[i]).__name__, "edit": e} for i, e in setup.stack.edits],
        "cost": {"macs": dense.macs, "bops": dense.bops, "params": dense.params, "weight_bytes": dense.weight_bytes},
        "estimated_seconds": guess["seconds"],
        "estimated_seconds_known": guess["seconds_known"],
        "estimated_disk_bytes": guess["disk_bytes"],
    }
