"""Models side by side in one interleaved run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gossamer.core.errors import ModelError
from gossamer.cost.latency import Timing, ratio
from gossamer.cost.latency import bench as time_sessions
from gossamer.pipeline.graphs import graph_for, resolve
from gossamer.runtimes import as_recorded, get

__all__ = ["bench"]


def _names(models: Sequence[nn.Module | str]) -> list[str]:
    """Return what to call the models; modules of one class are numbered."""
    names = [m if isinstance(m, str) else type(m).__name__ for m in models]
    return [f"{n} {names[: i + 1].count(n)}" if names.count(n) > 1 else n for i, n in enumerate(names)]


def bench(
    models: Sequence[nn.Module | str], *, batch: Sequence[int], threads: int, runtimes: Sequence[str],
    precision: str | None, rounds: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """See ``gossamer.api.bench``."""
    engines = [get(name) for name in runtimes]
    loaded = [resolve(m) for m in models]
    sizes = {pre.size for _, pre in loaded}
    if len(sizes) > 1:
        raise ModelError(f"bench: the models take inputs of different sizes {sorted(sizes)}; give models of one size")
    size, names = sizes.pop(), _names(models)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for engine, runtime in zip(engines, runtimes, strict=True):
            for b in batch:
                x = np.random.default_rng(0).standard_normal((b, *size), dtype=np.float32)
                keys, sessions = [], []
                for i, (model, _) in enumerate(loaded):
                    graph = graph_for(model, runtime, b, Path(scratch) / f"m{i}")
                    for p in (precision,) if precision else engine.precisions():
                        keys.append((i, p))
                        sessions.append(as_recorded(engine.load(graph, precision=p, threads=threads)))
                timings = time_sessions(sessions, x, rounds=rounds)
                found = _rows(keys, timings, runtime, b)
                rows += [{"model": names[i], **row} for (i, _), row in zip(keys, found, strict=True)]
    return rows


def _rows(keys: Sequence[tuple[int, str]], timings: Sequence[Timing], runtime: str, batch: int) -> list[dict[str, Any]]:
    """Return the figures of every (model's index, precision)."""
    best = min((i for i, (model, _) in enumerate(keys) if model == 0), key=lambda i: timings[i].median_ms)
    return [
        {
            "runtime": runtime,
            "precision": precision,
            "batch": batch,
            "median_ms": timings[i].median_ms,
            "iqr_ms": timings[i].iqr_ms,
            "ratio": timings[i].ratio,
            "ratio_best_dense": ratio(timings[best], timings[i])[1],
            "best_dense": keys[best][1],
            "trusted": timings[i].trusted,
            "reason": timings[i].reason,
        }
        for i, (_, precision) in enumerate(keys)
    ]
