"""The task's figure of a result row, whichever task it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.report.numbers import MINUS, as_share, is_number

__all__ = ["as_score", "as_step", "interval_of", "metric_of", "score_of"]

_TOP1 = {"key": "top1", "name": "Top-1", "unit": "%", "higher": True,
         "help": "Accuracy in this runtime, with its 95 % interval"}  # fmt: skip
_DIGITS = {"%": 1}


def metric_of(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return name, unit and direction of the rows' figure (``tasks.task.Metric``); rows that name none have top-1."""
    return next((r["metric"] for r in rows if r.get("metric")), _TOP1)


def score_of(row: Mapping[str, Any]) -> float | None:
    """Return a row's figure in its unit, where it has one."""
    if row.get("metric"):
        return row["score"] if is_number(row.get("score")) else None
    return 100 * as_share(row["top1"]) if is_number(row.get("top1")) else None


def interval_of(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the interval of ``score_of``, where it is known."""
    if row.get("metric"):
        span = row.get("score_interval")
        return (float(span[0]), float(span[1])) if span else None
    span = row.get("top1_interval")
    return (100 * as_share(span[0]), 100 * as_share(span[1])) if span else None


def as_score(value: float, metric: Mapping[str, Any], *, unit: bool = True) -> str:
    """Return a figure with its digits, and its unit if asked."""
    shown = f"{value:.{_DIGITS.get(metric['unit'], 2)}f}".replace("-", MINUS)
    return f"{shown}\N{NARROW NO-BREAK SPACE}{metric['unit']}" if unit and metric["unit"] else shown


def as_step(value: float, metric: Mapping[str, Any]) -> str:
    """Return a difference of two figures with its sign."""
    return f"{'+' if value >= 0 else MINUS}{as_score(abs(value), metric, unit=False)}"
