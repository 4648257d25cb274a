"""Where a pruning method gets its latency table from: a file, an option, or a measurement in steps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.cost.latency_table import LatencyTable
from gossamer.kits.structure.measuring import Axes, BlockMeter, MeterOptions, default_axes
from gossamer.kits.structure.ranking import smallest
from gossamer.kits.structure.regions import Structure
from gossamer.kits.structure.vit import EMBED
from gossamer.models.timm_adapter import token_view
from gossamer.models.widths import widths_of

__all__ = ["TableSource", "grid_for"]

_AXES = {"head": "heads", "qk": "qk", "v": "v", "mlp": "mlp"}


def grid_for(
    model: nn.Module, structures: Sequence[Structure], sizes: Mapping[str, int], *, odd_first: bool = False
) -> Axes:
    """Return the grid to measure: from the smallest reachable to the dense width, the dense one alone where none is.

    Args:
        model: The model.
        structures: What can be removed.
        sizes: Units a group, by structure.
        odd_first: As in ``ranking.form_groups``.
    """
    widths = widths_of(model)
    top = {"embed": widths.embed, **{k: max(getattr(widths, k)) for k in _AXES.values()}}
    floors, lowest = dict(top), smallest(structures, sizes, odd_first=odd_first)
    for s in structures:
        axis = "embed" if s.name == EMBED else _AXES[s.kind]
        floors[axis] = min(floors[axis], lowest[s.name])
    return default_axes(top, floors)


@dataclass
class TableSource:
    """A latency table that is given, read from a file, or measured point by point.

    Attributes:
        given: Path of a JSON file, the JSON itself, or ``None``. A file that is not there is written.
        remeasure: Measure again although there is a file.
        options: How to measure.
        records: What has been measured so far (plain JSON, to be kept over a resume).
    """

    given: str | Mapping[str, Any] | None
    remeasure: bool
    options: MeterOptions
    records: list[dict[str, Any]] = field(default_factory=list)
    _meter: BlockMeter | None = field(default=None, init=False, repr=False)

    def known(self, model: nn.Module) -> LatencyTable | None:
        """Return the table if there is one, with a warning if it was measured elsewhere or otherwise."""
        if self.given is None or (self.remeasure and isinstance(self.given, str)):
            return None
        if not isinstance(self.given, str):
            return LatencyTable.from_json(self.given)
        if not Path(self.given).exists():
            return None
        table, odd = LatencyTable.here(self.given, self.options.setting(token_view(model).num_tokens))
        if odd:
            warnings.warn(f"{odd} with remeasure=true", UserWarning, stacklevel=2)
        return table

    def num_points(self, model: nn.Module, axes: Axes) -> int:
        """Return how many points a measurement takes, after checking that it can be done here."""
        return len(BlockMeter(model, axes, self.options).points)

    def measure(self, model: nn.Module, axes: Axes, index: int, total: int) -> dict[str, float]:
        """Measure the next point (at the last of ``total`` calls all that are left); returns numbers to log."""
        if self._meter is None:
            self._meter = BlockMeter(model, axes, self.options)
        last = len(self._meter.points) if index >= total - 1 else len(self.records) + 1
        while len(self.records) < min(last, len(self._meter.points)):
            self.records.append(self._meter.measure(len(self.records)))
        return {"relative_latency": float(self.records[-1]["relative"])}

    def measured(self, model: nn.Module, axes: Axes) -> LatencyTable:
        """Return the table of what was measured; keep it in the file if one was named."""
        meter = self._meter or BlockMeter(model, axes, self.options)
        table = meter.table(self.records)
        self._meter = None
        if isinstance(self.given, str):
            table.save(self.given)
        return table
