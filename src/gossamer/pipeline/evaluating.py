"""Accuracy of a model in torch or in a runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.data.sources import from_dataset, open_data, take
from gossamer.pipeline.graphs import graph_for, resolve
from gossamer.pipeline.measure import Prepared, runtime_accuracy
from gossamer.runtimes import get
from gossamer.runtimes.routed import RoutedSession
from gossamer.tasks.classification import Classification

__all__ = ["evaluate"]


def evaluate(
    model: nn.Module | str, data: Any, runtime: str, *, limit: int | None, batch: int, precision: str | None,
    threads: int,
) -> dict[str, Any]:  # fmt: skip
    """See ``gossamer.api.evaluate``."""
    engine = get(runtime)
    loaded, pre = resolve(model)
    images = open_data(data) if isinstance(data, str) else from_dataset(data)
    if limit is not None:
        images = take(images, range(min(limit, len(images))))
    task = Classification()
    if isinstance(loaded, nn.Module):
        task.check_classes(images, loaded)
    with tempfile.TemporaryDirectory() as scratch:
        graph = graph_for(loaded, runtime, batch, Path(scratch))
        session = engine.load(graph, precision=precision, threads=threads)
        fixed = (session.input_shape or (None,))[0] or batch
        result = runtime_accuracy(session, Prepared(images, pre, fixed), task, fixed)
    routed = isinstance(session, RoutedSession)
    return {
        "images": len(result.targets),
        "top1": result.top1,
        "top1_interval": list(result.interval),
        "top5": result.top5,
        "runtime": runtime,
        "precision": precision or "f32",
        **({"branches": dict(zip(session.names, session.taken, strict=True))} if routed else {}),
        "skipped": [{"image": name, "reason": reason} for name, reason in images.failed],
    }
