"""What a set of widths costs, and whether it is within a budget of latency, MACs or parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from gossamer.core.errors import RecipeError
from gossamer.cost.budget import Budget
from gossamer.cost.latency_table import LatencyTable
from gossamer.kits.structure.regions import Keep, Structure, count_elements
from gossamer.kits.structure.vit import counts_of, mlp_matrices, widths_from
from gossamer.models.timm_adapter import token_view
from gossamer.models.widths import ViTWidths, widths_of

__all__ = ["BUDGETS", "Bounds", "WidthCosts", "bounds", "parse_budgets"]

BUDGETS = ("latency", "macs", "params")
"""Metrics that can be bounded, in the order in which the first given one steers the ranking."""
_UNITS = {"latency": (1.0, "ms"), "macs": (1e9, "G"), "params": (1e6, "M")}
Counts = Mapping[str, int]
"""Units kept, by structure name."""


class WidthCosts:
    """Costs of a vision transformer as functions of the units its structures keep.

    Args:
        model: The opened model with its dense (or masked) tensors.
        structures: Its structures.
        table: Latency table, where latency is asked for.
    """

    def __init__(self, model: nn.Module, structures: Sequence[Structure], table: LatencyTable | None = None) -> None:
        self.view, self.dense = token_view(model), widths_of(model)
        self.structures, self.table = structures, table
        self._shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        self._matrices = [mlp_matrices(model, b) for b in self.view.blocks]
        self.full = {s.name: s.units for s in structures}

    def widths(self, counts: Counts) -> ViTWidths:
        """Return the widths of a model that keeps ``counts``."""
        return widths_from(self.view, self.dense, counts)

    def macs(self, counts: Counts) -> float:
        """Return the MACs of an image, as the ledger counts them."""
        w, n = self.widths(counts), self.view.num_tokens
        fixed = (self.view.patch_macs + self.view.head_macs) * w.embed / self.dense.embed
        rows = zip(w.heads, w.qk, w.v, w.mlp, self._matrices, strict=True)
        return fixed + sum(n * w.embed * (2 * h * (q + v) + k * m) + n * n * h * (q + v) for h, q, v, m, k in rows)

    def params(self, counts: Counts) -> float:
        """Return the parameters."""
        return float(count_elements(self._shapes, self.structures, {**self.full, **counts}))

    def latency(self, counts: Counts) -> float:
        """Return the predicted milliseconds a batch.

        Raises:
            RecipeError: There is no table.
        """
        if self.table is None:
            raise RecipeError("latency: no table; measure one first")
        return self.table.model(self.widths(counts).points())

    def function(self, metric: str) -> Callable[[Counts], float]:
        """Return the cost function of a metric of ``BUDGETS``."""
        return {"latency": self.latency, "macs": self.macs, "params": self.params}[metric]

    def gains(self, metric: str, counts: Counts, floors: Counts) -> dict[str, float]:
        """Return what one unit less of each structure would save, as a share of the dense cost.

        Args:
            metric: The cost.
            counts: Where we are.
            floors: Structures with at most so many units gain nothing (their last group stays).
        """
        cost = self.function(metric)
        here, dense = cost(counts), cost(self.full)
        return {
            name: (here - cost({**counts, name: n - 1})) / dense if n > floors[name] else 0.0
            for name, n in counts.items()
        }


@dataclass(frozen=True)
class Bounds:
    """Budgets on a model's widths; all must hold.

    Attributes:
        costs: The cost functions.
        limits: Upper bound by metric, the first of them steers.
        dense: Dense cost by metric.
    """

    costs: WidthCosts
    limits: dict[str, float]
    dense: dict[str, float]

    @property
    def metric(self) -> str:
        """The metric that steers the ranking."""
        return next(iter(self.limits))

    def met(self, counts: Counts, progress: float = 1.0) -> bool:
        """Return whether every cost is at or below its limit, or so far down from dense to it.

        Args:
            counts: Units kept.
            progress: 1 for the limits, 0 for the dense costs, in between linearly.
        """
        return all(
            self.costs.function(m)(counts) <= self.dense[m] + (limit - self.dense[m]) * progress
            for m, limit in self.limits.items()
        )

    def fits(self, keep: Keep, progress: float = 1.0) -> bool:
        """Return ``met`` for masks."""
        return self.met(counts_of(keep), progress)


def parse_budgets(given: Mapping[str, str | float | None], where: str) -> dict[str, Budget]:
    """Return the budgets that are given, by metric.

    Raises:
        RecipeError: None is given, or one is no budget.
    """
    found = {m: Budget.parse(m, text) for m in BUDGETS if (text := given.get(m)) is not None}
    if not found:
        raise RecipeError(f"{where}: no budget; give latency='50%' (or '12ms'), macs='60%' or params='8M'")
    return found


def bounds(costs: WidthCosts, budgets: Mapping[str, Budget], lowest: Counts, where: str) -> Bounds:
    """Return the limits that budgets stand for.

    Args:
        costs: The cost functions.
        budgets: From ``parse_budgets``.
        lowest: The fewest units the method can reach.
        where: Name for messages.

    Raises:
        RecipeError: A budget is out of reach; names the reachable range.
    """
    limits, dense = {}, {}
    for metric, budget in budgets.items():
        cost = costs.function(metric)
        dense[metric], low = cost(costs.full), cost({**costs.full, **lowest})
        limits[metric] = budget.resolve(dense[metric])
        unit, sign = _UNITS[metric]
        if not low <= limits[metric] <= dense[metric]:
            raise RecipeError(
                f"{where}: {metric}={budget.text!r} is {limits[metric] / unit:.4g} {sign}; no widths can meet it. "
                f"Reachable are {low / unit:.4g} {sign} to {dense[metric] / unit:.4g} {sign} "
                f"({100 * low / dense[metric]:.1f}% to 100% of the dense model)"
            )
    return Bounds(costs, limits, dense)
