"""Export with proof: parity, and accuracy and speed bounds where asked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.core import registry
from gossamer.core.errors import ModelError, RecipeError, RunError
from gossamer.core.method import Method
from gossamer.core.schedule import Phase, Plan
from gossamer.core.stack import Stack
from gossamer.data.loading import StepLoader
from gossamer.data.sources import ImageSource, from_dataset
from gossamer.engine.loop import Loop
from gossamer.export.exporting import export as export_graph
from gossamer.models.preprocessing import preprocessing
from gossamer.models.source import inherit
from gossamer.ops.routing import Routed, deployed
from gossamer.pipeline.benching import bench
from gossamer.pipeline.measure import FORMATS, Prepared, runtime_score
from gossamer.runtimes import get
from gossamer.tasks.registry import task_for
from gossamer.tasks.task import Evaluation

__all__ = ["export", "to_int8"]

CALIBRATION_IMAGES = 32


def to_int8(model: nn.Module, images: ImageSource) -> nn.Module:
    """Return ``model`` in 8 bits by the first registered method that offers itself for it and takes the model.

    Baselines come last. Of a routed model every branch is quantized on its own, since each sees other values; the
    router stays exact.

    Raises:
        RecipeError: No registered method does.
        ModelError: None can handle the model.
    """
    form = deployed(model)
    if isinstance(form, Routed):
        branches = [to_int8(inherit(branch, model), images) for branch in form.branches]
        return inherit(Routed(form.router, branches, form.names, form.shares), model).eval()
    offers = [m for m in registry.methods().values() if "int8" in m.default_for]
    if not offers:
        raise RecipeError("export: no registered method offers int8; its card would state default_for: {int8: {}}")
    refusals = []
    for offer in sorted(offers, key=lambda m: m.status == "baseline"):
        try:
            return _by_method(registry.build(offer.name, offer.default_for["int8"]), model, images)
        except ModelError as err:
            refusals.append(f"{offer.name}: {err}")
    raise ModelError(f"export: no method makes {type(model).__name__} int8; {'; '.join(refusals)}")


def _by_method(method: Method, model: nn.Module, images: ImageSource) -> nn.Module:
    stack, pre = Stack([method]), preprocessing(model)
    task = task_for(pre)
    loader = StepLoader(images, task.still_view(pre), min(CALIBRATION_IMAGES, len(images)), seed=0, shuffle=True)
    plan = Plan([Phase("fit", 0)])
    loop = Loop(stack, task, {"train": loader, "calibration": loader}, plan)
    return loop.run(copy.deepcopy(model)).eval().cpu()


def _score(graph: Path, runtime: str, images: ImageSource, module: nn.Module, batch: int) -> Evaluation:
    session, pre = get(runtime).load(graph, precision=get(runtime).precisions()[-1]), preprocessing(module)
    task = task_for(pre)
    return runtime_score(session, Prepared(images, pre, batch, task), task, batch)


def export(
    model: nn.Module, out: Path, formats: Sequence[str], *, int8: bool, data: Any, max_drop: float | None,
    min_speedup: float | None, batch: int | str,
) -> dict[str, Any]:  # fmt: skip
    """See ``gossamer.api.export``."""
    runtimes = {f: r for r, f in FORMATS.items()}
    for name in formats:
        if name not in runtimes:
            raise RecipeError(f"export: format {name!r} is unknown; formats are {', '.join(runtimes)}")
    task = task_for(preprocessing(model))
    images = None if data is None else (task.open(data) if isinstance(data, str) else from_dataset(data))
    final = to_int8(model, images) if int8 and images is not None else model
    result: dict[str, Any] = {"artefacts": [], "unmet": []}
    if notes := {str(m.export_note) for m in final.modules() if hasattr(m, "export_note")}:
        result["notes"] = "; ".join(sorted(notes))
    fixed = batch if isinstance(batch, int) else 8
    for name in formats:
        artefact = export_graph(final, out / name, format=name, batch=batch)
        entry: dict[str, Any] = {"format": name, "graph": str(artefact.graph), "parity": artefact.parity}
        if max_drop is not None and images is not None:
            dense = export_graph(model, out / f"{name}-given", format=name, batch=batch)
            before = _score(dense.graph, runtimes[name], images, model, fixed).score
            after = _score(artefact.graph, runtimes[name], images, final, fixed).score
            metric = task.metric
            entry |= {f"{metric.key}_before": before, metric.key: after}
            if (drop := metric.drop(before, after)) > max_drop:
                allowed = f"{max_drop} are allowed"
                result["unmet"].append(f"{name}: {metric.name} got worse by {drop:.2f} {metric.unit}, {allowed}")
        if min_speedup is not None:
            rows = bench([model, final], batch=[fixed], threads=2, runtimes=[runtimes[name]], precision=None, rounds=7)
            speed = max(r["ratio_best_dense"] for r in rows[len(rows) // 2 :])
            entry["speedup_over_best_dense"] = speed
            if speed < min_speedup:
                result["unmet"].append(f"{name}: {speed:.2f}x the best dense precision, {min_speedup} were asked for")
        result["artefacts"].append(entry)
    if result["unmet"]:
        raise RunError(f"export: {'; '.join(result['unmet'])}; the artefacts in {out} are kept")
    return result
