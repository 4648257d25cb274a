"""NViT: Global Vision Transformer Pruning with Hessian-Aware Saliency (arXiv 2110.04869, CVPR 2023).

Embedding, heads, query, value and MLP channels of all blocks are ranked together by what the loss would
lose with them, less what the clock would gain, and pruned in rounds while the model trains. Reference:
NVlabs/NViT at 48feca4 (NVIDIA Source Code License-NC; used as an oracle only). Ours: any ViT or DeiT, a
table measured on the user's device, budgets in latency, MACs or parameters, weights scored before their
update.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.core.errors import RecipeError, RunError, nearest
from gossamer.core.method import Edit, Evaluate, Grads, Method
from gossamer.core.schedule import Batch, Loader, Phase, Plan, Step, Terms, Turn
from gossamer.cost.latency_table import LatencyTable
from gossamer.kits.structure.budget import WidthCosts, bounds, parse_budgets
from gossamer.kits.structure.groups import check_sizes, sizes_of
from gossamer.kits.structure.measuring import MeterOptions
from gossamer.kits.structure.ranking import form_groups, prune_below, prune_until, smallest
from gossamer.kits.structure.regions import decode_keep, encode_keep, enforce, keep_all
from gossamer.kits.structure.report import describe_pruned, pruned_report
from gossamer.kits.structure.scoring import CRITERIA, gradient_scores, magnitude_scores, random_scores
from gossamer.kits.structure.tables import TableSource, grid_for
from gossamer.kits.structure.vit import EMBED, KINDS, counts_of, open_blocks, slice_vit, vit_structures
from gossamer.kits.teacher import SELF, FrozenTeacher
from gossamer.methods.nvit.maths import average, less_latency
from gossamer.methods.nvit.state import Opened
from gossamer.methods.nvit.teachers import Teachers
from gossamer.models.initialise import initialise
from gossamer.tasks.classification import Classification, logits_of

__all__ = ["NViT"]

MEASURE, PRUNE, FIT = "nvit.measure", "nvit.prune", "fit"


@dataclass
class NViT(Method):
    """Prune a vision transformer to a budget by one global ranking, then cut it to a dense model.

    Give one budget or several; all are met. A budget is a share of the dense model or an amount.

    Attributes:
        latency: ``"50%"`` or ``"12ms"`` a batch, by the latency table.
        macs: ``"60%"`` or ``"2.9G"``.
        params: ``"60%"`` or ``"8M"``.
        structures: What may be pruned, of ``emb``, ``head``, ``qk``, ``v``, ``mlp``.
        criterion: ``"fisher_group"`` (published), ``"taylor_elem"``, ``"magnitude"``, ``"random"`` (ablations).
        group_sizes: Units that go together: ``"tiles"`` (multiples of this device's tile, heads one by one),
            ``"released"`` (embedding 16, heads 2, query and value width 8, MLP 16), or sizes by structure.
        heads_first: Let query and value widths of a block shrink only once its heads are down to one group.
        rounds: Rounds in which the cost falls evenly to the budget; ``None``: as published, a fixed number of
            groups a round until the budget is met.
        groups_per_round: That number.
        interval: Steps a round.
        momentum: Share of the earlier rounds in a score, in [0, 1).
        reset_momentum: Set the average to 0 once, after the first round (release).
        eta: Weight of the latency term; the dense model counts as the released table's 0.97 s.
        lr: Learning rate while pruning (constant).
        teacher: Dense teacher: ``"self"``, a model, a timm name, ``name@weights``, a saved folder.
        kl_weight: Weight of the divergence from it while pruning (100 is the released 1e5, which averages over
            1000 classes too); it starts after the first round.
        kl_temperature: Its temperature while pruning.
        cnn_teacher: Network whose first choice is a label, or ``None``.
        cnn_weight: Its share, in [0, 1]; the labels get the rest.
        distil_fit: Let both teachers help in the recipe's own training afterwards.
        fit_kl_weight: Weight of the divergence then, of each head separately.
        fit_kl_temperature: Temperature then.
        student_eval: Prune in evaluation mode (no dropout, no drop path) after the first round (release).
        scratch: Train the found widths from fresh random weights of this seed (ablation); ``None``: keep weights.
        table: Latency table: path of a JSON file (written if it is not there) or its content; ``None``: measure.
        remeasure: Measure again although the file is there.
        runtime: Runtime in which latency is measured.
        precision: Its dense precision; ``None``: the best here.
        threads: Its threads.
        batch: Images a batch.
    """

    stage: ClassVar[str] = "structure"
    touches: ClassVar[frozenset[str]] = frozenset({"structure", "weights", "loss", "gradients"})

    latency: str | float | None = None
    macs: str | float | None = None
    params: str | float | None = None
    structures: list[str] = field(default_factory=lambda: list(KINDS))
    criterion: str = "fisher_group"
    group_sizes: str | dict[str, int] = "tiles"
    heads_first: bool = True
    rounds: int | None = None
    groups_per_round: int = 2
    interval: int = 100
    momentum: float = 0.9
    reset_momentum: bool = True
    eta: float = 5e-4
    lr: float = 1e-4
    teacher: str | nn.Module = SELF
    kl_weight: float = 100.0
    kl_temperature: float = 3.0
    cnn_teacher: str | nn.Module | None = None
    cnn_weight: float = 0.5
    distil_fit: bool = True
    fit_kl_weight: float = 100.0
    fit_kl_temperature: float = 20.0
    student_eval: bool = True
    scratch: int | None = None
    table: str | dict[str, Any] | None = None
    remeasure: bool = False
    runtime: str = "openvino"
    precision: str | None = None
    threads: int = 2
    batch: int = 8

    _teachers: Teachers | None = field(default=None, init=False, repr=False, compare=False)
    _source: TableSource | None = field(default=None, init=False, repr=False, compare=False)
    _plan: Edit = field(default_factory=dict, init=False, repr=False, compare=False)
    _table: LatencyTable | None = field(default=None, init=False, repr=False, compare=False)
    _open: Opened | None = field(default=None, init=False, repr=False, compare=False)
    _report: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def bind(self, dense: nn.Module) -> None:
        """Take ``dense`` as the teacher that ``"self"`` stands for."""
        self._teachers = Teachers(FrozenTeacher(dense), self.cnn_teacher)

    # -- structure -------------------------------------------------------------------------------
    def prepare(self, model: nn.Module) -> Edit | None:
        """Check options, model and budget; plan rounds and measurements. Budgets of 100% change nothing.

        Raises:
            ModelError: The model is no plain vision transformer, or a layer ties widths together.
            RecipeError: An option is out of range, or a budget out of reach.
        """
        self._check()
        budgets = parse_budgets(self._budgets(), "nvit")
        if all(b.relative and b.value == 1 for b in budgets.values()):
            return None
        trial = copy.deepcopy(model)
        open_blocks(trial)
        structures = vit_structures(trial, self.structures)
        sizes = sizes_of(structures, self.group_sizes)
        table, points = None, 0
        if "latency" in budgets:
            table = self._tables.known(trial)
            axes = grid_for(trial, structures, sizes, odd_first=self._odd_first)
            points = 0 if table is not None else self._tables.num_points(trial, axes)
        lowest = smallest(structures, sizes, odd_first=self._odd_first)
        costs = WidthCosts(trial, structures, table)
        bounds(costs, {k: b for k, b in budgets.items() if k != "latency" or table}, lowest, "nvit")
        groups = sum(math.ceil(s.units / sizes[s.name]) for s in structures)
        return {
            "do": "plan", "points": points, "table": table.to_json() if table else None,
            "rounds": self.rounds or math.ceil(groups / self.groups_per_round) + 1,
        }  # fmt: skip

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Open the model when pruning starts: structures, sizes of groups."""
        if phase.name != PRUNE:
            return None
        trial = copy.deepcopy(model)
        open_blocks(trial)
        sizes = sizes_of(vit_structures(trial, self.structures), self.group_sizes)
        table = self._table.to_json() if self._table is not None else None
        edit = {
            "do": "open", "kinds": list(self.structures), "sizes": sizes, "odd_first": self._odd_first, "table": table,
        }  # fmt: skip
        self._opened(trial, edit)  # refuses a budget out of reach
        return edit

    def leave(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Keep the measured table; cut what was pruned.

        Raises:
            RunError: The rounds ended before the budget was met.
        """
        if phase.name == MEASURE:
            return {"do": "table", "table": self._tables.measured(model, self._axes(model)).to_json()}
        if phase.name != PRUNE or self._open is None:
            return None
        state, counts = self._open, counts_of(self._open.keep)
        reached = {m: state.bounds.costs.function(m)(counts) for m in state.bounds.limits}
        if not state.bounds.met(counts):
            raise RunError(
                f"nvit: after {state.round} rounds the budget is not met: {reached} of {state.bounds.limits}; "
                f"give rounds, or more groups_per_round"
            )
        report = {**pruned_report(state.bounds, counts, self._table), "rounds": state.round}
        kinds = list(self.structures)
        return {"do": "cut", "kinds": kinds, "keep": encode_keep(state.keep), "scratch": self.scratch, "report": report}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Note the plan or the table, open the blocks, or cut the pruned units out."""
        if edit["do"] != "cut":
            self._table = LatencyTable.from_json(edit["table"]) if edit["table"] else None
            self._plan = edit if edit["do"] == "plan" else self._plan
        if edit["do"] == "open":
            open_blocks(model)
            self._open = self._opened(model, edit)
        elif edit["do"] == "cut":
            structures = vit_structures(model, edit["kinds"])
            slice_vit(model, structures, decode_keep(edit["keep"], structures))
            if edit["scratch"] is not None:
                initialise(model, edit["scratch"])
            self._open, self._report = None, edit["report"]
        return model

    def _opened(self, model: nn.Module, edit: Edit) -> Opened:
        structures = vit_structures(model, edit["kinds"])
        costs = WidthCosts(model, structures, self._table)
        budgets = parse_budgets(self._budgets(), "nvit")
        limits = bounds(costs, budgets, smallest(structures, edit["sizes"], odd_first=edit["odd_first"]), "nvit")
        return Opened(structures, edit["sizes"], edit["odd_first"], limits, keep_all(structures))

    # -- schedule --------------------------------------------------------------------------------
    def phases(self, plan: Plan) -> Plan:
        """Put measuring and pruning before the recipe's own training (or at the end, where there is none)."""
        if not self._plan:
            return plan
        steps = self._plan["rounds"] * self.interval
        turns = (Turn(objective=self.prune_objective),)
        new = [Phase(PRUNE, steps, turns, until=self._met, lr={"weights": self.lr}, schedule="constant")]
        if self._plan["points"]:
            new.insert(0, Phase(MEASURE, self._plan["points"], work=self._measure))
        return plan.before(FIT, *new) if any(p.name == FIT for p in plan) else Plan((*plan, *new))

    def _met(self, model: nn.Module) -> bool:
        return self._open is not None and self._open.bounds.fits(self._open.keep)

    def _measure(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        return self._tables.measure(model, self._axes(model), step.index, step.total)

    def _axes(self, model: nn.Module) -> dict[str, list[int]]:
        trial = copy.deepcopy(model)
        open_blocks(trial)
        structures = vit_structures(trial, self.structures)
        return grid_for(trial, structures, sizes_of(structures, self.group_sizes), odd_first=self._odd_first)

    # -- step ------------------------------------------------------------------------------------
    def prune_objective(self, model: nn.Module, batch: Batch, step: Step) -> Terms:
        """Return the terms of a pruning step; after the first round the student runs in evaluation mode (release)."""
        started = self._open is not None and self._open.round > 0
        if started and self.student_eval:
            model.eval()
        with self._both.watching(model):
            out = model(batch["image"])
            heads = self._both.heads(out)
        base = Classification().cross_entropy(logits_of(list(heads)), batch["target"])
        terms = {"task": base, **self._label_terms(model, batch, heads, base)}
        if started and self.kl_weight > 0:
            kl = self._both.dense_term(model, batch["image"], heads, self.kl_temperature, each=False)
            terms["nvit.kl"] = self.kl_weight * kl
        return terms

    def wrap_grads(self, grads: Grads, evaluate: Evaluate) -> Grads:
        """Watch both heads of a distilled model in the recipe's own training."""

        def watched(model: nn.Module, batch: Batch, step: Step, params: list[nn.Parameter]) -> dict[str, Any]:
            with self._both.watching(model) if self._helps(step) else nullcontext():
                return grads(model, batch, step, params)

        return watched

    def loss(self, model: nn.Module, batch: Batch, out: Any, step: Step) -> Terms:
        """Return the terms of both teachers in the recipe's own training, each head by itself."""
        if not self._helps(step):
            return {}
        heads = self._both.heads(out)
        terms: Terms = {}
        if self.cnn_teacher is not None:
            base = Classification().cross_entropy(logits_of(list(heads)), batch["target"])
            terms = self._label_terms(model, batch, heads, base)
        if self.fit_kl_weight > 0:
            kl = self._both.dense_term(model, batch["image"], heads, self.fit_kl_temperature, each=True)
            terms["nvit.kl"] = self.fit_kl_weight * kl
        return terms

    def _label_terms(self, model: nn.Module, batch: Batch, heads: tuple[Tensor, Tensor], base: Tensor) -> Terms:
        """Return the labels' and the labelling teacher's terms, if there is such a teacher."""
        if self.cnn_teacher is None or self.cnn_weight == 0:
            return {}
        labels = self._both.label_term(model, batch["image"], heads[1])
        return {"task": (1 - self.cnn_weight) * base, "nvit.cnn": self.cnn_weight * labels}

    def _helps(self, step: Step) -> bool:
        return bool(self._plan) and self.distil_fit and step.phase.partition(".")[0] == FIT

    def before_step(self, model: nn.Module, step: Step) -> None:
        """Add what this batch says about every unit."""
        if step.phase == PRUNE and self._open is not None and self.criterion in CRITERIA[:2]:
            weights = dict(model.named_parameters())
            grads = {n: p.grad for n, p in weights.items() if p.grad is not None}
            self._open.add(gradient_scores(weights, grads, self._open.structures, self.criterion))

    def after_step(self, model: nn.Module, step: Step) -> None:
        """Keep pruned units at zero; at the end of a round prune more."""
        if step.phase != PRUNE or self._open is None:
            return
        if (step.index + 1) % self.interval == 0:
            self._round(model, step)
        enforce(dict(model.named_parameters()), self._open.structures, self._open.keep)

    def _round(self, model: nn.Module, step: Step) -> None:
        state = self._open
        assert state is not None  # noqa: S101 - called while the model is open
        if self.criterion == "magnitude":
            fresh = magnitude_scores(dict(model.named_parameters()), state.structures)
        elif self.criterion == "random":
            fresh = random_scores(state.structures, step.generator("nvit.scores"))
        else:
            fresh = {k: v / state.batches for k, v in state.sums.items()}
        state.average = average(state.average, fresh, self.momentum)
        scores = less_latency(state.average, state.keep, self._gains(state), self.eta)
        free = {k: s for k, s in scores.items() if not self._waits(k)}
        mean = self.criterion not in CRITERIA[:2]  # a sum would make small groups the least of all
        groups = form_groups(free, state.sizes, odd_first=state.odd_first, mean=mean)
        if self.rounds is None:
            state.keep = prune_below(groups, state.keep, state.round * self.groups_per_round - 1)
        else:
            progress = min(1.0, (state.round + 1) / self.rounds)
            state.keep = prune_until(groups, state.keep, lambda k: state.bounds.fits(k, progress))
        if state.round == 0 and self.reset_momentum:
            state.average = {k: v * 0.0 for k, v in state.average.items()}
        state.round, state.batches, state.sums = state.round + 1, 0, {}

    def _gains(self, state: Opened) -> dict[str, float]:
        if self.eta == 0:
            return {}
        floors = {**state.sizes, EMBED: 1}
        return state.bounds.costs.gains(state.bounds.metric, counts_of(state.keep), floors)

    def _waits(self, name: str) -> bool:
        """Whether a width has to wait until the heads of its block are down to one group."""
        block, _, kind = name.rpartition(".")
        state = self._open
        if not self.heads_first or kind not in ("qk", "v") or state is None or f"{block}.head" not in state.keep:
            return False
        return int(state.keep[f"{block}.head"].sum()) > state.sizes[f"{block}.head"]

    # -- report, state ---------------------------------------------------------------------------
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return the widths kept and what they cost."""
        return describe_pruned(self._report, rounds=self._report.get("rounds"))

    def state_dict(self) -> dict[str, Any]:
        """Return masks, sums and averages of scores, and measured points."""
        state = self._open.state() if self._open is not None else {}
        return {"open": state, "points": list(self._source.records) if self._source is not None else []}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        if state["points"]:
            self._tables.records = [dict(r) for r in state["points"]]
        if self._open is not None and state["open"]:
            self._open.restore(state["open"])

    # -- details ---------------------------------------------------------------------------------
    @property
    def _odd_first(self) -> bool:
        return self.group_sizes != "released"

    @property
    def _both(self) -> Teachers:
        if self._teachers is None:
            self._teachers = Teachers(self.teacher, self.cnn_teacher)
        return self._teachers

    @property
    def _tables(self) -> TableSource:
        if self._source is None:
            options = MeterOptions(self.runtime, self.precision, self.threads, self.batch)
            self._source = TableSource(self.table, self.remeasure, options)
        return self._source

    def _budgets(self) -> dict[str, str | float | None]:
        return {"latency": self.latency, "macs": self.macs, "params": self.params}

    def _check(self) -> None:
        check_sizes(self.group_sizes, "nvit")
        if self.criterion not in CRITERIA:
            hint = nearest(self.criterion, CRITERIA)
            raise RecipeError(f"nvit: criterion={self.criterion!r}; allowed are {', '.join(CRITERIA)}{hint}")
        if not self.structures:
            raise RecipeError(f"nvit: structures is empty; name some of {', '.join(KINDS)}")
        lows = {"groups_per_round": 1, "interval": 1, "eta": 0, "kl_weight": 0, "fit_kl_weight": 0}
        for name, low in (lows if self.rounds is None else {**lows, "rounds": 1}).items():
            if getattr(self, name) < low:
                raise RecipeError(f"nvit: {name}={getattr(self, name)}; expected {low} or more")
        for name, top in (("momentum", 0.999999), ("cnn_weight", 1)):
            if not 0 <= getattr(self, name) <= top:
                raise RecipeError(f"nvit: {name}={getattr(self, name)}; expected 0 to {'below ' if top < 1 else ''}1")
        for name in ("kl_temperature", "fit_kl_temperature", "lr"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"nvit: {name}={getattr(self, name)}; expected more than 0")
