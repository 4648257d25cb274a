"""What a recipe will do, found without training."""

from __future__ import annotations

import time
from typing import Any

import torch

from gossamer.cost.ledger import cost
from gossamer.engine.planning import describe_plan
from gossamer.pipeline.setup import set_up
from gossamer.recipe import Recipe

__all__ = ["describe"]


def describe(recipe: Recipe) -> dict[str, Any]:
    """Return phases, turns, groups, edits, dense cost, estimated seconds and bytes on disk.

    The time is an estimate: one timed forward pass of a batch, three times that per training step.
    """
    setup = set_up(recipe)
    dense = cost(setup.dense)
    x = torch.zeros(recipe.train.batch_size, *setup.preprocessing.size)
    with torch.inference_mode():
        setup.dense(x)
        start = time.perf_counter()
        setup.dense(x)
        forward = time.perf_counter() - start
    model = setup.stack.prepare(setup.model)
    plan = setup.stack.phases(setup.plan)
    steps = sum(p.steps for p in plan if p.work is None)
    images = 0 if setup.evaluation is None else len(setup.evaluation)
    rows = 2 + 2 * len(setup.stack.methods)
    weights = 4 * dense.params
    return {
        "name": recipe.name,
        "order": [type(m).__name__ for m in setup.stack.methods],
        "phases": describe_plan(model, setup.stack, plan),
        "edits": [
            {"method": type(setup.stack.methods[i]).__name__, "edit": e} for i, e in setup.stack.edits
        ],
        "cost": {"macs": dense.macs, "bops": dense.bops, "params": dense.params, "weight_bytes": dense.weight_bytes},
        "estimated_seconds": round(steps * 3 * forward + rows * images * forward / recipe.train.batch_size, 1),
        "estimated_disk_bytes": weights * (2 + 3 * 2 + rows),
    }  # fmt: skip
