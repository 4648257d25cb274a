"""What a pruned model says of itself: widths kept, cost predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.cost.latency_table import LatencyTable
from gossamer.kits.structure.budget import Bounds
from gossamer.models.widths import ViTWidths

__all__ = ["describe_pruned", "pruned_report"]


def pruned_report(limits: Bounds, counts: Mapping[str, int], table: LatencyTable | None) -> dict[str, Any]:
    """Return as plain JSON what was pruned and what it is predicted to cost; part of an edit.

    Args:
        limits: The budget.
        counts: Units kept, by structure.
        table: The latency table in use.
    """
    costs = limits.costs
    return {
        "dense": costs.dense.to_json(),
        "pruned": costs.widths(counts).to_json(),
        "cost": {m: [costs.function(m)(counts), limits.dense[m]] for m in limits.limits},
        "table": None if table is None else [table.describe(), table.trusted],
    }


def describe_pruned(report: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Return the report's table and facts.

    Args:
        report: From ``pruned_report``, or empty before anything was pruned.
        **facts: Further facts.
    """
    if not report:
        return {}
    for metric, (value, dense) in report["cost"].items():
        facts |= {f"{metric}_predicted": value, f"{metric}_share_predicted": value / dense}
    if report["table"] is not None:
        facts |= {"latency_table": report["table"][0], "latency_points_trusted": report["table"][1]}
    dense, pruned = (ViTWidths.from_json(report[k]) for k in ("dense", "pruned"))
    rows = [
        [i, *(f"{p[k]} of {d[k]}" for k in ("heads", "qk", "v", "mlp"))]
        for i, (p, d) in enumerate(zip(pruned.points(), dense.points(), strict=True))
    ]
    title = f"Widths kept (embedding: {pruned.embed} of {dense.embed})"
    table = {"title": title, "columns": ["block", "heads", "query width", "value width", "MLP"], "rows": rows}
    return {"tables": [table], "facts": facts}
