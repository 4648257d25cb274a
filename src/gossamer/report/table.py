"""Lays out the result table and the points of the accuracy-against-latency picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.report.numbers import as_bytes, as_count, as_ms, as_percent, as_ratio, as_share, is_number, runtime_name
from gossamer.report.saved import Row, dense_row
from gossamer.report.scatter import Point
from gossamer.report.scoring import as_score, interval_of, metric_of, score_of

__all__ = ["Cell", "Column", "batches", "columns", "points", "rows"]


@dataclass(frozen=True)
class Cell:
    """One cell: what is shown, a second smaller line, what it sorts by, a style class, a tooltip."""

    shown: str = ""
    small: str = ""
    sort: str = ""
    cls: str = ""
    title: str = ""


@dataclass(frozen=True)
class Column:
    """One column head; ``help`` is its tooltip."""

    key: str
    name: str
    small: str = ""
    help: str = ""
    numeric: bool = True


RATIOS = {"fp32": "ratio_fp32", "best": "ratio_best_dense"}
PLAIN = (
    Column("run", "Run", numeric=False),
    Column("stage", "Stage", numeric=False),
    Column("runtime", "Runtime", numeric=False),
    Column("precision", "Precision", numeric=False),
    Column("macs", "MACs", help="Executed multiply-accumulates for one image; the speed they predict"),
    Column("params", "Params", help="Parameters"),
    Column("file_bytes", "File", help="Size of the exported model on disk"),
    Column("score", ""),
    Column("agreement", "Agreement", help="Images with the same answer as the dense model"),
)


def batches(table: Sequence[Row]) -> list[str]:
    """Return the measured batch sizes, smallest first."""
    return sorted({str(b) for r in table for b in (r.get("latency") or {})}, key=float)


def columns(table: Sequence[Row]) -> list[Column]:
    """Return the columns that have data."""
    metric = metric_of(table)
    score = Column("score", metric["name"], "interval", metric["help"])
    found = [
        score if c.key == "score" else c
        for c in PLAIN
        if any((score_of(r) if c.key == "score" else r.get(c.key)) not in (None, "") for r in table)
    ]
    for b in batches(table):
        timed = [t for r in table if (t := (r.get("latency") or {}).get(b))]
        tip = "Median of one batch, with half its inter-quartile range"
        found.append(Column(f"ms/{b}", "Latency", f"batch {b}, ms", tip))
        if any(is_number(t.get("ratio_fp32")) for t in timed):
            tip = "Dense fp32 latency / this latency, above 1 is faster: in this runtime, and below in PyTorch"
            found.append(Column(f"fp32/{b}", "vs fp32", f"batch {b}", tip))
        if any(is_number(t.get("ratio_best_dense")) for t in timed):
            tip = "Latency of the dense model in this runtime's best precision / this latency; above 1 is faster"
            found.append(Column(f"best/{b}", "vs best", f"batch {b}", tip))
    return found


def _ratio(value: Any, in_torch: Any = None) -> Cell:
    if not is_number(value):
        return Cell()
    below = f"torch {as_ratio(in_torch)}" if is_number(in_torch) else ""
    return Cell(as_ratio(value), below, str(value), "gain" if value > 1.02 else "loss" if value < 0.98 else "")


def _timing(timed: Mapping[str, Any] | None) -> Cell:
    if not timed or not is_number(timed.get("median_ms")):
        return Cell()
    doubt = timed.get("trusted") is False
    spread = f"± {as_ms(timed['iqr_ms'] / 2)}" if is_number(timed.get("iqr_ms")) else ""
    shown = as_ms(timed["median_ms"]) + (" ?" if doubt else "")
    why = f"not trusted: {timed['reason']}" if doubt and timed.get("reason") else ""
    return Cell(shown, spread, str(timed["median_ms"]), "doubt" if doubt else "", why)


def _plain(row: Row, key: str, dense: Row | None) -> Cell:
    value = score_of(row) if key == "score" else row.get(key)
    if key == "stage":
        return Cell(str(value or ""), str(row.get("note") or ""), cls="stage")
    if value in (None, ""):
        return Cell()
    if key == "runtime":
        return Cell(runtime_name(value), sort=str(value))
    if not is_number(value):
        return Cell(str(value), sort=str(value))
    if key == "score":
        metric = metric_of([row])
        small = " to ".join(as_score(v, metric, unit=False) for v in interval_of(row) or ())
        return Cell(as_score(value, metric), small, str(value))
    if key == "agreement":
        p_value = (row.get("paired") or {}).get("p_value")
        small = f"McNemar p {p_value:.2g}" if is_number(p_value) else ""
        return Cell(as_percent(as_share(value)), small, str(value))
    if key == "macs" and dense is not None and is_number(dense.get("macs")) and value and value != dense["macs"]:
        return Cell(as_count(value), f"predict {as_ratio(dense['macs'] / value)}", str(value))
    return Cell(as_bytes(value) if key == "file_bytes" else as_count(value), sort=str(value))


def rows(table: Sequence[Row], heads: Sequence[Column], prefix: str) -> list[tuple[str, list[Cell]]]:
    """Return ``(row id, cells)`` for every table row."""
    out, dense = [], dense_row(table)
    for i, row in enumerate(table):
        timings = row.get("latency") or {}
        cells = []
        for head in heads:
            what, _, batch = head.key.partition("/")
            if not batch:
                cells.append(_plain(row, head.key, dense))
            elif what == "ms":
                cells.append(_timing(timings.get(batch)))
            else:
                timed = timings.get(batch) or {}
                cells.append(_ratio(timed.get(RATIOS[what]), timed.get("ratio_torch") if what == "fp32" else None))
        out.append((f"{prefix}-row-{i}", cells))
    return out


def points(table: Sequence[Row], batch: str, prefix: str) -> tuple[list[Point], list[str]]:
    """Return the points of one batch size and the names of their series.

    Series are the runs where rows name several, else the runtimes.
    """
    runs = list(dict.fromkeys(str(r.get("run", "")) for r in table))
    key = "run" if len(runs) > 1 else "runtime"
    names = list(dict.fromkeys(runtime_name(r.get(key)) for r in table))
    found = []
    for i, row in enumerate(table):
        timed = (row.get("latency") or {}).get(batch) or {}
        score = score_of(row)
        if not is_number(timed.get("median_ms")) or score is None:
            continue
        name = runtime_name(row.get(key))
        parts = [str(row[k]) for k in ("stage", "precision") if row.get(k)]
        if key == "run" and row.get("runtime"):
            parts.append(runtime_name(row["runtime"]))
        label = " ".join(dict.fromkeys(parts))
        trusted, metric = timed.get("trusted") is not False, metric_of([row])
        found.append(
            Point(
                f"{prefix}-row-{i}",
                label,
                names.index(name),
                name,
                timed["median_ms"],
                score,
                interval_of(row),
                trusted,
                metric,
            )  # fmt: skip
        )
    return found, names
