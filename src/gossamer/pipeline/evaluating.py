"""Accuracy of a model in torch or in a runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.data.sources import from_dataset, take
from gossamer.pipeline.graphs import graph_for, resolve
from gossamer.pipeline.measure import Prepared, runtime_score
from gossamer.runtimes import get
from gossamer.runtimes.routed import RoutedSession
from gossamer.tasks.registry import task_for

__all__ = ["evaluate"]


def evaluate(
    model: nn.Module | str, data: Any, runtime: str, *, limit: int | None, batch: int, precision: str | None,
    threads: int, asked: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """See ``gossamer.api.evaluate``."""
    engine = get(runtime)
    loaded, pre = resolve(model)
    task = task_for(pre, asked)
    images = task.open(data) if isinstance(data, str) else from_dataset(data)
    if limit is not None:
        images = take(images, range(min(limit, len(images))))
    if isinstance(loaded, nn.Module):
        task.check(images, loaded)
    with tempfile.TemporaryDirectory() as scratch:
        graph = graph_for(loaded, runtime, batch, Path(scratch))
        session = engine.load(graph, precision=precision, threads=threads)
        fixed = (session.input_shape or (None,))[0] or batch
        result = runtime_score(session, Prepared(images, pre, fixed, task), task, fixed)
    taken = dict(zip(session.names, session.taken, strict=True)) if isinstance(session, RoutedSession) else None
    return {
        **result.to_json(),
        "runtime": runtime,
        "precision": precision or "f32",
        **({} if taken is None else {"branches": taken}),
        "skipped": [{"image": name, "reason": reason} for name, reason in images.failed],
    }
