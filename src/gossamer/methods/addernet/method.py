"""AdderNet: Do We Really Need Multiplications in Deep Learning? (1912.13200), Universal Adder Networks (2105.14202).

Written from the papers' formulas. Reference: huawei-noah/AdderNet at 2fb8aad (BSD-3-Clause; an oracle only).
Ours: the adaptive rate acts on complete gradients before the optimiser steps, batch norms' statistics can be taken
anew at p = 1, and adder layers end as bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, PlanError, RecipeError
from gossamer.core.method import Edit, Evaluate, Grads, Method
from gossamer.core.schedule import Batch, Loader, Phase, Plan, Step
from gossamer.cost.energy import operation_table
from gossamer.cost.ledger import cost
from gossamer.kits.norm_statistics import reestimate_norms
from gossamer.methods.addernet.layers import choose, convert, quantize_adder
from gossamer.methods.addernet.maths import PNormSchedule, adder_layers, scale_gradient
from gossamer.ops.adder import rules_of
from gossamer.ops.adder_layers import AdderConv2d, SharedGrid, shared_grid
from gossamer.ops.modes import evaluating
from gossamer.recipe import PRETRAIN

__all__ = ["AdderNet"]

NORMS, RANGES = "addernet.norms", "addernet.ranges"
_SAMPLE = 1 << 16


@dataclass
class AdderNet(Method):
    """Trains a CNN whose convolutions are l1 distances, from scratch.

    Attributes:
        skip: Patterns of module paths that stay; the first convolution and the classifier stay anyway.
        gradient: ``"full"`` (x - w, the input's clamped), ``"lp"`` (derivatives of the annealed power), ``"sign"``.
        clip: Clamp the derivatives of inputs to [-1, 1] (HardTanh).
        adaptive: Scale each layer's gradient to the root mean square ``eta``.
        eta: That root mean square.
        p_start: First exponent of the training; null: 2 for ``"lp"``, else 1 throughout.
        p_until: Share of the steps after which the exponent is 1.
        p_shape: ``"linear"`` or ``"cosine"``.
        norm_logits: Give the classifier a batch norm on its logits, as the release does.
        fresh: Draw filters from N(0, 1); else start from the model's weights.
        seed: Of the filters.
        phase: The training at whose beginning layers change: ``"fit"`` of a recipe that pretrains, so that the
            products are trained first (a teacher, or with ``fresh=False`` a start); null: before everything.
        norm_batches: Batches from which the norms' statistics are taken anew after the training, at p = 1;
            null: 32 where the exponent was annealed, else none.
        bits: Width of the finished adder layers: 32 (float) or 8 (bytes, one grid for input and filters).
    """

    stage: ClassVar[str] = "structure"
    touches: ClassVar[frozenset[str]] = frozenset({"structure", "weights", "gradients"})

    skip: list[str] = field(default_factory=list)
    gradient: str = "full"
    clip: bool = True
    adaptive: bool = True
    eta: float = 0.2
    p_start: float | None = None
    p_until: float = 0.75
    p_shape: str = "linear"
    norm_logits: bool = True
    fresh: bool = True
    seed: int = 0
    phase: str | None = None
    norm_batches: int | None = None
    bits: int = 32
    _grids: dict[str, SharedGrid] = field(default_factory=dict, init=False, repr=False, compare=False)
    _left: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    # -- structure -------------------------------------------------------------------------------
    def prepare(self, model: nn.Module) -> Edit | None:
        """Choose the layers; where a later phase changes them, only see that there are some.

        Raises:
            RecipeError: An option out of range.
            ModelError: No layer can become an adder layer.
        """
        rules_of(self.gradient, self.clip)
        self._schedule()
        if self.bits not in (8, 32) or self.eta <= 0 or (self.norm_batches or 0) < 0:
            raise RecipeError(
                f"addernet: bits={self.bits}, eta={self.eta}, norm_batches={self.norm_batches}; allowed are 8 and 32, "
                f"above 0, 0 or more"
            )
        edit = self._convert(model)
        return edit if self.phase is None else None

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Choose the layers where the phase is the first part of the one that changes them."""
        first = phase.window is None or phase.window.offset == 0
        return self._convert(model) if phase.whole == self.phase and first else None

    def _convert(self, model: nn.Module) -> Edit:
        found = choose(model, self.skip, self.norm_logits)
        return {
            "do": "convert", "layers": found.layers, "logits": found.logits, "left": found.left,
            "gradient": self.gradient, "clip": self.clip, "seed": self.seed if self.fresh else None,
        }  # fmt: skip

    def finish(self, model: nn.Module) -> Edit | None:
        """Decide the grids of bytes; in float the trained layers are the finished ones."""
        if self.bits == 32:
            return None
        if not self._grids:
            raise ModelError(f"addernet: no grid was measured; run the phase {RANGES!r} before finish")
        return {"do": "bytes", "grids": {name: list(grid) for name, grid in self._grids.items()}}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Put adder layers in place, or bytes in theirs."""
        if edit["do"] == "convert":
            self._left = dict(edit["left"])
            return convert(model, edit)
        return quantize_adder(model, {name: SharedGrid(*grid) for name, grid in edit["grids"].items()})

    # -- phases ----------------------------------------------------------------------------------
    def phases(self, plan: Plan) -> Plan:
        """After the training take the norms' statistics anew and measure the ranges of bytes.

        Raises:
            PlanError: Layers would change before a pretraining, or at a phase that is not there.
        """
        trainings = list(dict.fromkeys(p.whole for p in plan if p.work is None))
        if self.phase is None and PRETRAIN in trainings:
            raise PlanError(
                "addernet: train.pretrain would train the adder layers as if they were the dense model; set "
                "phase: fit (products are pretrained, adders trained then), or leave train.pretrain out"
            )
        if self.phase is not None and self.phase not in trainings:
            raise PlanError(f"addernet: phase={self.phase!r}; allowed are null and {', '.join(trainings)}")
        last = []
        if self._norm_batches():
            last.append(Phase(NORMS, 1, turns=(), work=self._take_statistics))
        if self.bits == 8:
            last.append(Phase(RANGES, 1, turns=(), work=self._measure))
        return Plan((*plan, *last))

    def _norm_batches(self) -> int:
        if self.norm_batches is not None:
            return self.norm_batches
        return 32 if self._schedule().start > 1 else 0

    def _schedule(self) -> PNormSchedule:
        start = self.p_start if self.p_start is not None else 2.0 if self.gradient == "lp" else 1.0
        return PNormSchedule(start, 1.0, self.p_until, self.p_shape)

    def _take_statistics(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        count = self._norm_batches()
        draws = (loaders["train"](replace(step, index=k, total=count))["image"] for k in range(count))
        return {"norms": float(reestimate_norms(model, draws))}

    def _measure(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        loader = loaders.get("calibration") or loaders["train"]
        self._grids = measure_grids(model, loader(step)["image"])
        return {}

    # -- step ------------------------------------------------------------------------------------
    def wrap_grads(self, grads: Grads, evaluate: Evaluate) -> Grads:
        """Set the exponent of the step."""
        schedule = self._schedule()

        def powered(model: nn.Module, batch: Batch, step: Step, params: list[nn.Parameter]) -> dict[str, Any]:
            p = schedule(step.index / max(1, step.total))
            for layer in adder_layers(model).values():
                layer.p = p
            return grads(model, batch, step, params)

        return powered

    def before_step(self, model: nn.Module, step: Step) -> None:
        """Scale the complete gradients of adder filters (adaptive learning rate)."""
        if not self.adaptive:
            return
        for layer in adder_layers(model).values():
            if layer.weight.grad is not None:
                layer.weight.grad = scale_gradient(layer.weight.grad, self.eta)

    # -- report and state ------------------------------------------------------------------------
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return operations and energy beside those of the same network with products, and what stayed."""
        facts: dict[str, Any] = {f"stays a product: {n}": why for n, why in self._left.items()}
        try:
            found = cost(model, saved=False)
        except ModelError:  # a model that does not state its input size
            return {"facts": facts}
        pairs = (found.additions - found.macs) // 2
        dense = replace(found, macs=found.macs + pairs, additions=found.macs + pairs)
        rows = operation_table([("products", dense), ("differences", found)])
        return {"facts": facts, "tables": [{"title": "Operations and estimated energy an image", "rows": rows}]}

    def state_dict(self) -> dict[str, Any]:
        """Return the measured grids."""
        return {"grids": {name: list(grid) for name, grid in self._grids.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._grids = {name: SharedGrid(*grid) for name, grid in state["grids"].items()}


@torch.no_grad()
def measure_grids(model: nn.Module, images: Tensor) -> dict[str, SharedGrid]:
    """Return the grid of every adder convolution, from what it sees of ``images`` [B, C, H, W] in evaluation."""
    grids: dict[str, SharedGrid] = {}
    handles = []
    for name, layer in adder_layers(model).items():
        if isinstance(layer, AdderConv2d):

            def look(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                seen = args[0].flatten()
                sample = seen[:: max(1, seen.numel() // _SAMPLE)]
                grids[name] = shared_grid(sample, module.weight)  # type: ignore[arg-type]

            handles.append(layer.register_forward_pre_hook(look))
    try:
        with evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return grids
