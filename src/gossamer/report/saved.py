"""What a run truly saved, said in one sentence and a few figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.report.numbers import as_percent, as_ratio, as_share, is_number, runtime_name
from gossamer.report.scoring import as_score, as_step, metric_of, score_of

__all__ = ["Row", "dense_row", "figures", "finished_row", "sentence", "timings"]

Row = Mapping[str, Any]


def dense_row(table: Sequence[Row]) -> Row | None:
    """Return the row everything is compared to: the first whose stage is ``dense...``, else the first."""
    return next((r for r in table if str(r.get("stage", "")).lower().startswith("dense")), table[0] if table else None)


def finished_row(table: Sequence[Row]) -> Row | None:
    """Return the row that ships: the first marked ``chosen``, else the last with a latency."""
    chosen = [r for r in table if r.get("chosen")]
    if chosen:
        return chosen[0]
    found = [r for r in table if r.get("latency")] or list(table)
    return found[-1] if found else None


def timings(row: Row) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (batch, timing) of every measured batch, smallest first."""
    return sorted((row.get("latency") or {}).items(), key=lambda kv: float(kv[0]))


def _less(row: Row, dense: Row, key: str) -> float | None:
    a, b = row.get(key), dense.get(key)
    return 1 - a / b if is_number(a) and is_number(b) and b else None


def _at_batches(timed: Sequence[tuple[str, Mapping[str, Any]]], key: str) -> str:
    """Return ``1.41× (batch 1) and 1.38× (batch 8)``; '' where nothing was measured."""
    known: list[tuple[str, Any]] = [(b, t.get(key)) for b, t in timed]
    shown = [f"{as_ratio(r)} (batch {b})" for b, r in known if is_number(r)]
    return " and ".join(shown) if len(shown) < 3 else ", ".join(shown[:-1]) + " and " + shown[-1]


def _speed(row: Row) -> str:
    timed = timings(row)
    fp32, best = _at_batches(timed, "ratio_fp32"), _at_batches(timed, "ratio_best_dense")
    if not fp32:
        return ""
    runtime = runtime_name(row.get("runtime")) or "the runtime"
    text = f"In {runtime} it runs {fp32} as fast as the dense fp32 graph"
    if best:
        precision = next((str(t["best_dense"]) for _, t in timed if t.get("best_dense")), "")
        text += f", and {best} as fast as the dense model at its best precision{f' ({precision})' if precision else ''}"
    slower = [b for b, t in timed if is_number(t.get("ratio_best_dense")) and t["ratio_best_dense"] < 1.0]
    if slower:
        text += f"; at batch {' and '.join(slower)} the dense model in that precision is the faster choice"
    doubt = any(t.get("trusted") is False for _, t in timed)
    return text + ("; the meter does not trust every one of these figures." if doubt else ".")


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
    timed = timings(done)
    for ratio, name in (("ratio_fp32", "dense fp32 speed"), ("ratio_best_dense", "best dense precision")):
        known = [(b, t[ratio]) for b, t in timed if is_number(t.get(ratio))]
        if known:
            others = "".join(f"; {as_ratio(r)} at batch {b}" for b, r in known[:-1])
            found.append((as_ratio(known[-1][1]), name, f"batch {known[-1][0]}{others}"))
    for key, name in (("macs", "MACs left"), ("file_bytes", "file size left")):
        less = _less(done, dense, key)
        if less is not None and abs(less) > 0.005:
            found.append((as_percent(1 - less, 0), name, "of the dense model"))
    before, now, metric = score_of(dense), score_of(done), metric_of([done])
    if before is not None and now is not None:
        name = f"{'points' if metric['unit'] == '%' else metric['unit']} of {metric['name']}".removeprefix(" of ")
        found.append((as_step(now - before, metric), name, f"now {as_score(now, metric)}"))
    if is_number(done.get("agreement")):
        found.append((as_percent(as_share(done["agreement"])), "agreement", "same answer as the dense model"))
    return found
