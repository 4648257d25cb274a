"""DiffRate: Differentiable Compression Rate for Efficient Vision Transformers (arXiv 2305.17997, ICCV 2023).

Finds how many tokens to prune and how many to merge after each block of a frozen, trained vision
transformer so that its MACs meet a budget. Reference: OpenGVLab/DiffRate at 91ae3e3 (no licence; used as an
oracle only). Ours: weights are frozen in the search (the release lets their gradients pile up), any
number of prefix tokens, the found schedule is moved onto the budget, and a device-aware form.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.core.errors import ModelError, PlanError, RecipeError
from gossamer.core.method import Edit, Method
from gossamer.core.schedule import Batch, Phase, Plan, Step, Terms, Turn
from gossamer.kits.token_reduction import (
    describe_tokens,
    install_blocks,
    parse_macs,
    reducible_view,
    swap_blocks,
    token_blocks,
    token_macs,
)
from gossamer.methods.diffrate.layers import Gate, GatedBlock, ReducedBlock, Rules
from gossamer.methods.diffrate.schedules import (
    Free,
    Schedule,
    fit_schedule,
    lowest_schedule,
    ramp_schedule,
    resolve_schedule,
)
from gossamer.models.contracts import TokenView
from gossamer.models.timm_adapter import token_view
from gossamer.ops.token_blocks import TokenBlock
from gossamer.ops.token_rates import ste_min
from gossamer.ops.tokens import find_track
from gossamer.tasks.classification import logits_of, predictor

__all__ = ["DiffRate"]

SEARCH = "diffrate.search"
GMACS = 1e9
DEIT_S_GMACS = 4.6
"""With ``budget_unit="relative"`` the dense model counts as this many GMACs, so that the published
``budget_weight`` is as stiff on every model as it is on DeiT-S."""

STAGES_AT = (2, 4, 7, 10, 12)
"""Where the device-aware form reduces tokens, in twelfths of the depth. Measured: three evenly spread blocks cost
twice the divergence from the dense model, every second block gains no more accuracy and some overhead."""


@dataclass
class DiffRate(Method):
    """Differentiable token pruning and merging rates.

    Attributes:
        macs: Budget: share of the dense model (``"60%"``) or amount (``"2.9G"``).
        schedule: Skip the search: name of a released list (``"deit_small/2.9"``) or
            ``{"prune": [...], "merge": [...]}``, tokens kept per block with the prefix.
        search_steps: Steps of the search.
        search_loader: Images of the search: ``"train"`` (published) or ``"search"`` (those that
            ``data.search_share`` holds out, as at evaluation).
        start: ``"ramp"`` (counts that fall evenly and meet the budget: works within tens of steps) or
            ``"uniform"`` (published: all candidates alike, about half the tokens everywhere; wants
            thousands of steps).
        granularity: Step between candidate counts.
        lr: Learning rate of the rates (AdamW without weight decay, cosine).
        min_lr_ratio: Final over first learning rate.
        targets: What the search must keep: ``"labels"`` (published: the task's loss) or ``"dense"`` (the
            dense model's own probabilities; needs no labels and one more forward pass a step, and
            is a far less noisy signal for short searches).
        budget_weight: Weight of the squared budget error.
        budget_unit: ``"gmacs"`` (published) or ``"relative"`` (same stiffness for models of any size).
        warmup: Leave the budget out for the first third of the search.
        protected_blocks: Blocks that keep their tokens; negative counts from the end.
        device_aware: Restrict the search to few blocks and to counts in tiles (the last block, after whose
            attention only an MLP follows, takes any count).
        blocks: Blocks that may reduce; ``None``: all, or if device-aware five (1, 3, 6, 9 and 11 of 12).
        tile: Token counts are multiples of this; ``None``: 1, or 16 if device-aware.
        prune: Whether to prune.
        merge: Whether to merge.
        similarity_sizes: Weigh sizes by similarity when merging.
        proportional: Proportional attention.
        importance: ``"attention"`` or ``"order"`` (ablation: no ranking).
        clamp_search: Sizes at least 1 in the search (release).
        clamp_final: Sizes at least 1 in the finished model (release: no).
        num_tokens: Tokens entering the blocks, for a model that does not tell.
        num_prefix: Leading non-patch tokens, likewise.
    """

    stage: ClassVar[str] = "tokens"
    touches: ClassVar[frozenset[str]] = frozenset({"tokens"})
    gives: ClassVar[frozenset[str]] = frozenset({"token_source"})

    macs: str | float = "60%"
    schedule: str | dict[str, list[int]] | None = None
    search_steps: int = 300
    search_loader: str = "train"
    start: str = "ramp"
    granularity: int = 1
    lr: float = 0.01
    min_lr_ratio: float = 0.1
    targets: str = "labels"
    budget_weight: float = 5.0
    budget_unit: str = "gmacs"
    warmup: bool = False
    protected_blocks: list[int] = field(default_factory=lambda: [0])
    device_aware: bool = False
    blocks: list[int] | None = None
    tile: int | None = None
    prune: bool = True
    merge: bool = True
    similarity_sizes: bool = True
    proportional: bool = True
    importance: str = "attention"
    clamp_search: bool = True
    clamp_final: bool = False
    num_tokens: int | None = None
    num_prefix: int | None = None

    # -- structure -------------------------------------------------------------------------------
    def prepare(self, model: nn.Module) -> Edit | None:
        """Check model, options and budget; apply the schedule if one is given.

        Raises:
            ModelError: The model is no plain vision transformer.
            RecipeError: An option is out of range, or no schedule can meet the budget.
        """
        self._check()
        view = reducible_view(model, "diffrate", self.num_tokens, self.num_prefix)
        if self.schedule is None:
            self._target(model, view)
            return None
        chosen = resolve_schedule(self.schedule, len(view.blocks), view.num_tokens, view.num_prefix)
        return {**_layout(view), "do": "reduce", "prune": list(chosen.prune), "merge": list(chosen.merge)}

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Put learnable rates into the blocks when the search starts."""
        if phase.name != SEARCH:
            return None
        view = reducible_view(model, "diffrate", self.num_tokens, self.num_prefix)
        edit = {**_layout(view), "do": "gate", "num_tokens": view.num_tokens, "units": self._units(len(view.blocks))}
        if self.start == "uniform":
            return {**edit, "start": None}
        cost, spare = token_macs(model, view), view.pool == "token" and view.has_class_token
        ramp = ramp_schedule(self._limits(view), cost, self._target(model, view), spare_last=spare)
        return {**edit, "start": [list(ramp.prune), list(ramp.merge)]}

    def leave(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Read the schedule from the rates, move it onto the budget and make it physical."""
        if phase.name != SEARCH:
            return None
        view = self._gated_view(model)
        found = self._searched(model)
        fitted = fit_schedule(found, self._free(model, view), token_macs(model, view), self._target(model, view))
        edit = {**_layout(view), "do": "reduce", "prune": list(fitted.prune), "merge": list(fitted.merge)}
        return {**edit, "searched": {"prune": list(found.prune), "merge": list(found.merge)}}

    def finish(self, model: nn.Module) -> None:
        """Check that the tokens are gone; there is nothing left to do.

        Raises:
            PlanError: The search was not run.
        """
        if not any(isinstance(b, ReducedBlock) for b in token_blocks(model)):
            raise PlanError(
                f"diffrate: all tokens are still there, because the phase {SEARCH!r} was not run; run the phases of "
                f"stack.phases(plan) before finish, or give a schedule"
            )

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Install learnable rates (``gate``) or fixed counts (``reduce``)."""
        if find_track(model) is None:
            install_blocks(model, edit["blocks"], edit["layout"])
        if edit["do"] == "gate":
            swap_blocks(model, lambda block: self._gated(block, edit))
        else:
            rules = self._rules(self.clamp_final)
            swap_blocks(
                model, lambda block: ReducedBlock(block, edit["prune"][block.index], edit["merge"][block.index], rules)
            )
        return model

    # -- search ----------------------------------------------------------------------------------
    def phases(self, plan: Plan) -> Plan:
        """Put the search before the recipe's own training (or at the end, where there is none)."""
        if self.schedule is not None:
            return plan
        turns = (Turn(trains=("arch",), loader=self.search_loader),)
        search = Phase(SEARCH, self.search_steps, turns, lr={"arch": self.lr}, min_lr_ratio=self.min_lr_ratio)
        return plan.before("fit", search) if any(p.name == "fit" for p in plan) else Plan((*plan, search))

    def groups(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Return the rates as group ``"arch"`` while they exist."""
        gates = [p for b in _gated_blocks(model) for p in (b.prune_logits, b.merge_logits) if p is not None]
        return {"arch": gates} if gates else {}

    def loss(self, model: nn.Module, batch: Batch, out: Any, step: Step) -> Terms:
        """Return the budget term of the search, weight x (MACs - target)^2, and its own task term if asked."""
        if step.phase != SEARCH or not _gated_blocks(model):
            return {}
        view = self._gated_view(model)
        cost = token_macs(model, view)
        unit = GMACS if self.budget_unit == "gmacs" else cost.dense / DEIT_S_GMACS
        error = (self.expected_macs(model) - self._target(model, view)) / unit
        weight = 0.0 if self.warmup and 3 * step.index < step.total else self.budget_weight
        terms = {"diffrate.budget": weight * error.square()}
        if self.targets == "dense":
            kept = logits_of(out).float().log_softmax(-1)
            terms["task"] = -(_dense_probabilities(model, batch["image"]) * kept).sum(-1).mean()
        return terms

    def expected_macs(self, model: nn.Module) -> Tensor:
        """Return the MACs of the rates as they stand, a scalar with gradient towards them (eq. 8)."""
        cost = token_macs(model, self._gated_view(model))
        counts: list[Tensor] = []
        for block in _gated_blocks(model):
            current = counts[-1] if counts else block.candidates.new_tensor(float(cost.num_tokens))
            new = [block.count(logits) for logits in (block.prune_logits, block.merge_logits) if logits is not None]
            counts.append(ste_min(current, *new) if new else current)
        return cost(counts)

    # -- report ----------------------------------------------------------------------------------
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return tokens kept per block and the MACs they stand for."""
        blocks = token_blocks(model)
        if not blocks or _gated_blocks(model):
            return {}
        view = token_view(model, self.num_tokens, self.num_prefix)
        counts, n = [], view.num_tokens
        for block in blocks:
            counts.append(block.counts(n))
            n = counts[-1][1]
        return describe_tokens(counts, view.num_tokens, token_macs(model, view))

    # -- details ---------------------------------------------------------------------------------
    def _check(self) -> None:
        allowed = {
            "budget_unit": ("gmacs", "relative"),
            "start": ("ramp", "uniform"),
            "targets": ("labels", "dense"),
            "importance": ("attention", "order"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise RecipeError(f"diffrate: {name}={getattr(self, name)!r}; allowed are {', '.join(values)}")
        if not (self.prune or self.merge):
            raise RecipeError("diffrate: prune and merge are both off; switch one of them on")
        for name, low in (("search_steps", 1), ("granularity", 1), ("tile", 1), ("lr", 0), ("budget_weight", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise RecipeError(f"diffrate: {name}={value}; expected {low} or more")

    def _rules(self, clamp: bool) -> Rules:
        return Rules(self.similarity_sizes, self.proportional, clamp, self.importance)

    def _units(self, depth: int) -> list[int]:
        """Return the unit of every block's count, 0 for a block that keeps its tokens."""
        tile = self.tile if self.tile is not None else (16 if self.device_aware else 1)
        few = sorted({max(0, round(depth * twelfth / 12) - 1) for twelfth in STAGES_AT})
        chosen = self.blocks if self.blocks is not None else (few if self.device_aware else range(depth))
        for name, numbers in (("blocks", chosen), ("protected_blocks", self.protected_blocks)):
            wrong = [b for b in numbers if not -depth <= b < depth]
            if wrong:
                raise RecipeError(f"diffrate: {name} names block {wrong[0]}; the model has blocks 0..{depth - 1}")
        free = {b % depth for b in chosen} - {b % depth for b in self.protected_blocks}
        if not free:
            raise RecipeError("diffrate: every block is protected; leave at least one to reduce")
        return [0 if i not in free else (1 if i == depth - 1 else tile) for i in range(depth)]

    def _gated(self, block: TokenBlock, edit: Edit) -> GatedBlock:
        unit = edit["units"][block.index]
        switches = (self.prune and unit > 0, self.merge and unit > 0)
        gate = Gate(self.granularity, max(unit, 1))
        new = GatedBlock(block, edit["num_tokens"], gate, self._rules(self.clamp_search), switches)
        if edit["start"] is not None:
            new.start(edit["start"][0][block.index], edit["start"][1][block.index])
        return new

    def _gated_view(self, model: nn.Module) -> TokenView:
        blocks = _gated_blocks(model)
        if not blocks:
            raise ModelError("diffrate: the model holds no learnable rates; enter the phase 'diffrate.search' first")
        return token_view(model, blocks[0].num_tokens, blocks[0].num_prefix)

    def _limits(self, view: TokenView) -> list[Free | None]:
        """Return what may change in each block, before anything is known of the probabilities."""
        lowest = [min(max(view.num_prefix + 1, u), view.num_tokens) for u in self._units(len(view.blocks))]
        switches = (self.prune, self.merge)
        units = self._units(len(view.blocks))
        return [Free((), (), u, low, switches) if u else None for u, low in zip(units, lowest, strict=True)]

    def _target(self, model: nn.Module, view: TokenView) -> int:
        """Return the budget in MACs after checking that some schedule meets it."""
        cost = token_macs(model, view)
        lowest = cost(lowest_schedule(self._limits(view), view.num_tokens).merge)
        return parse_macs(self.macs, cost.dense, lowest, "diffrate")

    def _searched(self, model: nn.Module) -> Schedule:
        blocks = _gated_blocks(model)
        prune = [int(b.count(b.prune_logits).detach()) for b in blocks]
        merge = [int(b.count(b.merge_logits).detach()) for b in blocks]
        return Schedule.monotone(prune, merge, blocks[0].num_tokens)

    def _free(self, model: nn.Module, view: TokenView) -> list[Free | None]:
        """Return what may change in each block, with the probabilities that the search found."""
        free: list[Free | None] = []
        for limit, block in zip(self._limits(view), _gated_blocks(model), strict=True):
            prune, merge = (block.probability(g).tolist() for g in (block.prune_logits, block.merge_logits))
            free.append(limit and replace(limit, prune=prune, merge=merge))
        return free


def _layout(view: TokenView) -> dict[str, Any]:
    """Return what ``install_blocks`` needs, as plain JSON."""
    blocks = [{"name": b.name, "attention": b.attention} for b in view.blocks]
    layout = {"num_prefix": view.num_prefix, "has_class": view.has_class_token, "pool": view.pool}
    return {"blocks": blocks, "layout": layout}


def _dense_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """Return the class probabilities [B, K] of the model with all its tokens."""
    blocks = _gated_blocks(model)
    try:
        for block in blocks:
            block.bypass = True
        return predictor(model)(images).softmax(-1).to(images.device)
    finally:
        for block in blocks:
            block.bypass = False


def _gated_blocks(model: nn.Module) -> list[GatedBlock]:
    return [b for b in token_blocks(model) if isinstance(b, GatedBlock)]
