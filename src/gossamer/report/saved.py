"""What a run truly saved, said in one sentence and a few figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.report.numbers import as_percent, as_ratio, as_share, is_number, runtime_name

__all__ = ["Row", "dense_row", "figures", "finished_row", "latency", "sentence"]

Row = Mapping[str, Any]


def dense_row(table: Sequence[Row]) -> Row | None:
    """Return the row everything is compared to: the first whose stage is ``dense...``, else the first."""
    return next((r for r in table if str(r.get("stage", "")).lower().startswith("dense")), table[0] if table else None)


def finished_row(table: Sequence[Row]) -> Row | None:
    """Return the row that ships: the one marked ``final``, else the last with a latency."""
    marked = [r for r in table if r.get("final")]
    found = marked or [r for r in table if r.get("latency")] or list(table)
    return found[-1] if found else None


def latency(row: Row) -> tuple[str, Mapping[str, Any]] | None:
    """Return (batch, timing) of a row's smallest measured batch."""
    timed = row.get("latency") or {}
    return min(timed.items(), key=lambda kv: float(kv[0])) if timed else None


def _less(row: Row, dense: Row, key: str) -> float | None:
    a, b = row.get(key), dense.get(key)
    return 1 - a / b if is_number(a) and is_number(b) and b else None


def _speed(row: Row) -> str:
    timed = latency(row)
    if timed is None:
        return ""
    batch, t = timed
    ratio: Any = t.get("ratio_fp32")
    if not is_number(ratio):
        return ""
    runtime = runtime_name(row.get("runtime")) or "the runtime"
    text = f"In {runtime} at batch {batch} it runs {as_ratio(ratio)} as fast as the dense fp32 graph"
    if ratio < 1.0:
        text = f"In {runtime} at batch {batch} it is slower than the dense fp32 graph ({as_ratio(ratio)})"
    best: Any = t.get("ratio_best_dense")
    if is_number(best):
        versus = "" if best >= 1.0 else ", so the dense model in that precision is the faster choice"
        text += f" and {as_ratio(best)} as fast as the best dense precision{versus}"
    return text + ("." if t.get("trusted", True) else "; the meter does not trust this figure.")


def sentence(table: Sequence[Row]) -> str:
    """Return the line under the title, or '' where the table cannot carry it."""
    dense, done = dense_row(table), finished_row(table)
    if dense is None or done is None or dense is done:
        return ""
    gone = [
        f"{as_percent(share, 0)} of the {name}"
        for key, name in (("macs", "multiply-accumulates"), ("params", "parameters"), ("file_bytes", "file"))
        if (share := _less(done, dense, key)) is not None and share > 0.005
    ]
    parts = []
    if gone:
        listed = gone[0] if len(gone) == 1 else ", ".join(gone[:-1]) + " and " + gone[-1]
        parts.append(f"{listed} are physically gone.")
    parts.append(_speed(done))
    return " ".join(p for p in parts if p)


def figures(table: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return the head-line figures as (value, name, remark)."""
    dense, done = dense_row(table), finished_row(table)
    if dense is None or done is None or dense is done:
        return []
    found: list[tuple[str, str, str]] = []
    timed = latency(done)
    if timed:
        batch, t = timed
        where = (f"batch {batch}, {runtime_name(done.get('runtime'))}", f"batch {batch}, same runtime")
        names = (("ratio_fp32", "dense fp32 speed"), ("ratio_best_dense", "best dense precision"))
        for (ratio, name), remark in zip(names, where, strict=True):
            if is_number(t.get(ratio)):
                found.append((as_ratio(t[ratio]), name, remark))
    for key, name in (("macs", "MACs left"), ("file_bytes", "file size left")):
        less = _less(done, dense, key)
        if less is not None and abs(less) > 0.005:
            found.append((as_percent(1 - less, 0), name, "of the dense model"))
    if is_number(done.get("top1")) and is_number(dense.get("top1")):
        drop = 100 * (as_share(done["top1"]) - as_share(dense["top1"]))
        sign = "+" if drop >= 0 else "\N{MINUS SIGN}"
        now = as_percent(as_share(done["top1"]))
        found.append((f"{sign}{abs(drop):.1f}", "points of top-1", f"now {now}"))
    if is_number(done.get("agreement")):
        found.append((as_percent(as_share(done["agreement"])), "agreement", "same answer as the dense model"))
    return found
