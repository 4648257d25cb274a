"""Where the time goes inside the runtimes, operator by operator, for the dense model and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gossamer.pipeline.measure import Measured
from gossamer.runtimes import OpTime, as_recorded, get, int8_share

__all__ = ["PROFILE", "by_operator", "profiles", "profiled_rows"]

PROFILE = "profile.json"
"""Name of the file in the run folder."""
RUNS = 4
"""Recorded runs of every graph; the first warms up and is left out."""


def by_operator(ops: Sequence[OpTime]) -> list[dict[str, Any]]:
    """Return one row per type, kernel and precision: type, kernel, precision, product, ms, count; slowest first."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for op in ops:
        row = rows.setdefault(
            (op.type, op.kernel, op.precision),
            {"type": op.type, "kernel": op.kernel, "precision": op.precision, "product": op.product, "ms": 0.0,
             "count": 0},
        )  # fmt: skip
        row["ms"] += op.ms
        row["count"] += 1
        row["product"] = row["product"] or op.product
    return sorted(rows.values(), key=lambda row: -row["ms"])


def profiled_rows(rows: Sequence[Measured]) -> list[Measured]:
    """Return the rows worth a profile: every dense one, and the last of each other graph (training moves weights)."""

    def graph(row: Measured) -> tuple[Any, ...]:
        return (row.runtime, row.precision, row.int8, row.cost.macs, row.cost.params)

    dense = [r for r in rows if r.stage.name == "dense"]
    last = {graph(r): r for r in rows if r.stage.name != "dense"}
    wanted = [*dense, *(r for key, r in last.items() if key not in {graph(d) for d in dense})]
    return [r for r in rows if any(r is w for w in wanted)]


def profiles(rows: Sequence[Measured], batch: int, threads: int, size: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Profile measured rows at one batch size.

    Args:
        rows: Rows with their graphs.
        batch: Batch size of the graphs to run.
        threads: Threads.
        size: C, H, W of one image.

    Returns:
        One dictionary per row of ``profiled_rows``: stage, runtime, precision, batch, ms (all operators),
        int8_share (of the time of products and convolutions), ops (see ``by_operator``).
    """
    x = np.random.default_rng(0).standard_normal((batch, *size), dtype=np.float32)
    found = []
    for row in profiled_rows(rows):
        session = as_recorded(
            get(row.runtime).load(row.files[batch], precision=row.precision, threads=threads, profile=True)
        )
        for _ in range(RUNS):
            session.run(x)
        ops = session.profile()
        found.append(
            {
                "stage": row.stage.title,
                "runtime": row.runtime,
                "precision": row.row()["precision"],
                "batch": batch,
                "ms": sum(op.ms for op in ops),
                "int8_share": int8_share(ops),
                "ops": by_operator(ops),
            }
        )
    return found
