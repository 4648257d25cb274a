"""Structured magnitude pruning, the baseline: in one shot, before any training.

Small weights go first (arXiv 1608.08710 for filters), ranked over all layers together or the same share of
each layer; or random ones. Same structures, groups, budgets and slicing as the methods that ask the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from gossamer.core.errors import RecipeError
from gossamer.core.method import Edit, Method
from gossamer.core.schedule import Loader, Phase, Plan, Step
from gossamer.cost.latency_table import LatencyTable
from gossamer.kits.structure.budget import Bounds, WidthCosts, bounds, parse_budgets
from gossamer.kits.structure.groups import check_sizes, sizes_of
from gossamer.kits.structure.measuring import MeterOptions
from gossamer.kits.structure.ranking import Group, form_groups, prune_until, smallest
from gossamer.kits.structure.regions import Keep, Structure, decode_keep, encode_keep, keep_all
from gossamer.kits.structure.report import describe_pruned, pruned_report
from gossamer.kits.structure.scoring import magnitude_scores, random_scores
from gossamer.kits.structure.tables import TableSource, grid_for
from gossamer.kits.structure.vit import KINDS, counts_of, open_blocks, slice_vit, vit_structures

__all__ = ["MagnitudePruning"]

NAME = "magnitude_pruning"
MEASURE = f"{NAME}.measure"
CHOICES = {"scores": ("magnitude", "random"), "scope": ("global", "uniform")}


@dataclass
class MagnitudePruning(Method):
    """Prune a vision transformer to a budget by the size of its weights, in one shot.

    Give one budget or several; all are met. A budget is a share of the dense model or an amount.

    Attributes:
        latency: ``"50%"`` or ``"12ms"`` a batch, by the latency table.
        macs: ``"60%"`` or ``"2.9G"``.
        params: ``"60%"`` or ``"8M"``.
        structures: What may be pruned, of ``emb``, ``head``, ``qk``, ``v``, ``mlp``.
        scores: ``"magnitude"`` (mean square of a unit's weights) or ``"random"``.
        scope: ``"global"`` (one ranking over all layers) or ``"uniform"`` (the same share of every layer).
        group_sizes: Units that go together: ``"tiles"`` (multiples of this device's tile, heads one by one),
            ``"released"`` (as NViT's release), or sizes by structure.
        seed: Seed of random scores.
        table: Latency table: path of a JSON file (written if it is not there) or its content; ``None``: measure.
        remeasure: Measure again although the file is there.
        runtime: Runtime in which latency is measured.
        precision: Its dense precision; ``None``: the best here.
        threads: Its threads.
        batch: Images a batch.
    """

    stage: ClassVar[str] = "structure"
    touches: ClassVar[frozenset[str]] = frozenset({"structure", "weights"})

    latency: str | float | None = None
    macs: str | float | None = None
    params: str | float | None = None
    structures: list[str] = field(default_factory=lambda: list(KINDS))
    scores: str = "magnitude"
    scope: str = "global"
    group_sizes: str | dict[str, int] = "tiles"
    seed: int = 0
    table: str | dict[str, Any] | None = None
    remeasure: bool = False
    runtime: str = "openvino"
    precision: str | None = None
    threads: int = 2
    batch: int = 8

    _source: TableSource | None = field(default=None, init=False, repr=False, compare=False)
    _points: int = field(default=0, init=False, repr=False, compare=False)
    _report: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    # -- structure -------------------------------------------------------------------------------
    def prepare(self, model: nn.Module) -> Edit | None:
        """Prune at once, or plan to measure first. Budgets of 100% change nothing.

        Raises:
            ModelError: The model is no plain vision transformer, or a layer ties widths together.
            RecipeError: An option is out of range, or a budget out of reach.
        """
        self._check()
        budgets = parse_budgets(self._budgets(), NAME)
        if all(b.relative and b.value == 1 for b in budgets.values()):
            return None
        trial, structures, sizes = self._opened(model)
        table = None
        if "latency" in budgets:
            table = self._tables.known(trial)
            if table is None:
                axes = grid_for(trial, structures, sizes, odd_first=self._odd_first)
                return {"do": "measure", "points": self._tables.num_points(trial, axes)}
        return self._cut(trial, structures, sizes, table)

    def leave(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Prune by the table just measured."""
        if phase.name != MEASURE:
            return None
        trial, structures, sizes = self._opened(model)
        axes = grid_for(trial, structures, sizes, odd_first=self._odd_first)
        return self._cut(trial, structures, sizes, self._tables.measured(trial, axes))

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Note the plan, or cut the pruned units out."""
        if edit["do"] == "measure":
            self._points = edit["points"]
            return model
        open_blocks(model)
        structures = vit_structures(model, edit["kinds"])
        self._report = edit["report"]
        return slice_vit(model, structures, decode_keep(edit["keep"], structures))

    def phases(self, plan: Plan) -> Plan:
        """Put the measurement first, where there is one."""
        if not self._points:
            return plan
        return Plan((Phase(MEASURE, self._points, work=self._measure), *plan))

    def _measure(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        trial, structures, sizes = self._opened(model)
        axes = grid_for(trial, structures, sizes, odd_first=self._odd_first)
        return self._tables.measure(trial, axes, step.index, step.total)

    # -- report, state ---------------------------------------------------------------------------
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return the widths kept and what they cost."""
        return describe_pruned(self._report)

    def state_dict(self) -> dict[str, Any]:
        """Return measured points."""
        return {"points": list(self._source.records) if self._source is not None else []}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        if state["points"]:
            self._tables.records = [dict(r) for r in state["points"]]

    # -- details ---------------------------------------------------------------------------------
    @property
    def _odd_first(self) -> bool:
        return self.group_sizes != "released"

    @property
    def _tables(self) -> TableSource:
        if self._source is None:
            options = MeterOptions(self.runtime, self.precision, self.threads, self.batch)
            self._source = TableSource(self.table, self.remeasure, options)
        return self._source

    def _budgets(self) -> dict[str, str | float | None]:
        return {"latency": self.latency, "macs": self.macs, "params": self.params}

    def _opened(self, model: nn.Module) -> tuple[nn.Module, list[Structure], dict[str, int]]:
        trial = copy.deepcopy(model)
        open_blocks(trial)
        structures = vit_structures(trial, self.structures)
        return trial, structures, sizes_of(structures, self.group_sizes)

    def _cut(
        self, model: nn.Module, structures: Sequence[Structure], sizes: Mapping[str, int], table: LatencyTable | None
    ) -> Edit:
        lowest = smallest(structures, sizes, odd_first=self._odd_first)
        limits = bounds(WidthCosts(model, structures, table), parse_budgets(self._budgets(), NAME), lowest, NAME)
        if self.scores == "random":
            found = random_scores(structures, torch.Generator().manual_seed(self.seed))
        else:
            found = magnitude_scores(dict(model.named_parameters()), structures)
        keep = self._choose(form_groups(found, sizes, odd_first=self._odd_first, mean=True), limits)
        report = pruned_report(limits, counts_of(keep), table)
        return {"do": "cut", "kinds": list(self.structures), "keep": encode_keep(keep), "report": report}

    def _choose(self, groups: list[list[Group]], limits: Bounds) -> Keep:
        """Return masks within the limits, lowest groups pruned first."""
        if self.scope == "uniform":
            groups = [_by_share(row) for row in groups]
        return prune_until(groups, keep_all(limits.costs.structures), limits.fits)

    def _check(self) -> None:
        check_sizes(self.group_sizes, NAME)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise RecipeError(f"{NAME}: {name}={getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        if not self.structures:
            raise RecipeError(f"{NAME}: structures is empty; name some of {', '.join(KINDS)}")


def _by_share(row: Sequence[Group]) -> list[Group]:
    """Return a layer's groups ranked by the share of the layer that is gone with them: all layers shrink alike."""
    total = sum(len(g.units) for g in row)
    gone, ranked = 0, []
    for g in row:
        gone += len(g.units)
        ranked.append(Group(g.structure, g.units, gone / total, g.last))
    return ranked
