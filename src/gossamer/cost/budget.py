"""Budgets: "60%" of the dense model, or an absolute "2.9G", "8M", "12ms", "22MB"."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gossamer.core.errors import RecipeError, nearest

__all__ = ["METRICS", "Budget", "Target"]

_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BYTES = {
    "B": 1.0,
    **{f"{k}B": v for k, v in _COUNTS.items() if k},
    **{f"{k}iB": 1024.0**i for i, k in enumerate("KMGT", 1)},
}
_TIMES = {"ms": 1.0, "us": 1e-3, "s": 1e3}
METRICS: dict[str, dict[str, float]] = {
    "macs": _COUNTS,
    "bops": _COUNTS,
    "params": _COUNTS,
    "size": _BYTES,
    "memory": _BYTES,
    "latency": _TIMES,
}
"""Units by metric; resolved values are counts, bytes, or milliseconds per batch."""
_EXAMPLE = {"macs": "2.9G", "bops": "300G", "params": "8M", "size": "22MB", "memory": "64MiB", "latency": "12ms"}
_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)")


@dataclass(frozen=True)
class Budget:
    """An upper bound on one metric.

    Attributes:
        metric: One of ``METRICS``.
        text: As given.
        value: Share of the dense value in (0, 1] if ``relative``, else in the metric's base unit
            (count, bytes, milliseconds).
        relative: Whether ``value`` is a share.
    """

    metric: str
    text: str
    value: float
    relative: bool

    @classmethod
    def parse(cls, metric: str, text: str | float) -> Budget:
        """Read a budget.

        Args:
            metric: ``"macs"``, ``"bops"``, ``"params"``, ``"size"``, ``"memory"`` or ``"latency"``.
            text: Share in percent ("60%") or a number with a unit of the metric ("2.9G", "8M",
                "12ms", "22MB"); K, M, G are powers of 1000, KiB, MiB, GiB of 1024. A bare number
                is in the base unit (only for counts: sizes and times need theirs).

        Raises:
            RecipeError: Unknown metric or unit, or a value out of range.
        """
        if metric not in METRICS:
            raise RecipeError(f"budget for {metric!r}; allowed are {', '.join(METRICS)}{nearest(metric, METRICS)}")
        units, shown = METRICS[metric], str(text).strip()
        match = None if isinstance(text, bool) else _NUMBER.fullmatch(shown)
        allowed = f"a share like '60%' or an amount like {_EXAMPLE[metric]!r}"
        if match is None:
            raise RecipeError(f"{metric}={text!r} is no budget; allowed are {allowed}")
        number, unit = float(match[1]), match[2]
        if unit == "%":
            if not 0 < number <= 100:
                raise RecipeError(f"{metric}={text!r}; a share lies above 0% and at most at 100%")
            return cls(metric, shown, number / 100, True)
        exact = _unit(unit, units)
        if exact is None:
            known = ", ".join(u for u in units if u)
            raise RecipeError(f"{metric}={text!r}: unit {unit or 'missing'!r}; allowed are {known} and %")
        value = number * units[exact]
        if not (math.isfinite(value) and value > 0):
            raise RecipeError(f"{metric}={text!r}; a budget is above 0: {allowed}")
        return cls(metric, shown, value, False)

    def resolve(self, dense_value: float) -> float:
        """Return the bound in the metric's base unit, given the dense model's value in it.

        Raises:
            RecipeError: The dense value is not above 0.
        """
        if not dense_value > 0:
            raise RecipeError(
                f"{self.metric}={self.text}: the dense model's {self.metric} is {dense_value:g}, not above 0"
            )
        return self.value * dense_value if self.relative else self.value

    def share(self, dense_value: float) -> float:
        """Return the bound as a share of the dense value (above 1 where the dense model is already within it)."""
        return self.resolve(dense_value) / dense_value


def _unit(unit: str, units: Mapping[str, float]) -> str | None:
    """Return the unit as spelled in ``units``; lower case is accepted where it is not another unit."""
    by_lower = {u.lower(): u for u in units}
    return unit if unit in units else by_lower.get(unit.lower())


@dataclass(frozen=True)
class Target:
    """What a finished model has to meet.

    Attributes:
        budgets: Bounds by metric.
        max_drop: Largest loss of the task's metric in its unit (accuracy: points), ``None`` for no bound.
    """

    budgets: dict[str, Budget] = field(default_factory=dict)
    max_drop: float | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Target:
        """Read ``{"macs": "60%", "max_drop": 0.5}``.

        Raises:
            RecipeError: Unknown key, or a value out of range.
        """
        known = (*METRICS, "max_drop")
        for key in options:
            if key not in known:
                raise RecipeError(f"target: {key!r} is unknown; allowed are {', '.join(known)}{nearest(key, known)}")
        drop = options.get("max_drop")
        is_number = isinstance(drop, int | float) and not isinstance(drop, bool)
        if drop is not None and not (is_number and 0 <= drop <= 100):
            raise RecipeError(f"target: max_drop={drop!r}; allowed are 0..100 points, e.g. 0.5")
        budgets = {key: Budget.parse(key, value) for key, value in options.items() if key != "max_drop"}
        return cls(budgets, None if drop is None else float(drop))

    def missed(self, dense: Mapping[str, float], finished: Mapping[str, float], *, slack: float = 0.005) -> list[str]:
        """Return one sentence for every bound that is missed.

        Args:
            dense: The dense model's metrics.
            finished: The finished model's, with ``"drop"`` for ``max_drop``: by how much the task's metric got worse.
            slack: Share by which a bound may be passed.
        """
        sentences = []
        for metric, budget in self.budgets.items():
            bound = budget.resolve(dense[metric])
            if finished[metric] > bound * (1 + slack):
                sentences.append(f"{metric}: {finished[metric]:.4g}, the target {budget.text} is {bound:.4g}")
        if self.max_drop is not None and finished["drop"] > self.max_drop:
            sentences.append(f"max_drop: the metric got worse by {finished['drop']:.2f}, {self.max_drop:g} are allowed")
        return sentences
