"""DRNet: dynamic resolution network (arXiv 2106.02898, NeurIPS 2021).

A small predictor chooses, for every image, the smallest resolution at which one classifier with norms of its own for
each resolution should still be right. Reference: mindspore-ai/models at eab643f, research/cv/DRNet (Apache-2.0,
evaluation only; an oracle only). Changed: inference takes the largest score and runs one resolution (the release draws
noise and runs all of them); norms on shortcuts are private too, as the paper says (``shared_shortcut_bn``: as
released); the target may count the predictor; see the card.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, PlanError, RecipeError, StateError
from gossamer.core.method import Edit, Evaluate, Grads, Method
from gossamer.core.schedule import Batch, Loader, Phase, Plan, Step, Terms
from gossamer.cost.budget import Budget
from gossamer.cost.ledger import cost
from gossamer.methods.drnet.layers import CREDITS, DynamicResolution, give_norms, norm_paths
from gossamer.methods.drnet.maths import (
    budget_shift,
    budget_term,
    credit_term,
    default_sizes,
    predictor_side,
    probe,
    temperature,
)
from gossamer.methods.drnet.predictors import build_predictor, kind_of, reset
from gossamer.models.preprocessing import preprocessing
from gossamer.ops.modes import evaluating
from gossamer.ops.routing import Resized

__all__ = ["DRNet"]

MULTIRES, PREDICTOR, COUNT = "drnet.multires", "drnet.predictor", "drnet.count"
MULTIRES_SHARE = 0.7
"""Published: 70 epochs at all resolutions, then 100 of joint training."""


@dataclass
class DRNet(Method):
    """Per-image resolution for a convolutional classifier.

    Attributes:
        sizes: Candidate sides in pixels, largest first; null: all, 3/4 and 1/2 of the network's own input (published:
            224, 168, 112). One size, the network's own, switches the method off.
        predictor: ``"resnet10"`` (published, for ResNets), ``"inverted"`` (for MobileNetV2), ``"small"`` (three
            convolutions, for small images), or a timm model's name.
        predictor_size: Its input in pixels; null: as published for its kind (128 or 64 of 224; ``small``: half).
        macs: Bound on the mean MACs of an image: a share of the network's at its own size or an amount; null: no
            budget term.
        count_predictor: Whether the predictor counts within ``macs`` (published: it does not).
        eta: Weight of the budget term.
        tau: Temperature of the straight-through gradient.
        tau_end: Temperature at the end of the training, reached by equal factors; null: constant, as released.
        credit: What the predictor learns from: ``"chosen"``, the output of the size drawn (published); ``"dense"``,
            those of all sizes, through the choice; ``"expected"``, all sizes' losses, weighed by the odds of drawing
            them (ours: no noise of the draw). The last two cost a forward pass at every size; in short trainings the
            predictor otherwise tends to settle on one size for all images.
        calibrate: In the end lower the scores by cost until the largest one meets ``macs`` on the images that the
            shares are counted on (ours; published: what is drawn meets it in training, the largest score need not).
        resolution_norm: Private copies of the norms for every size; off: shared ones (ablation).
        shared_shortcut_bn: Norms on shortcuts common to all sizes, as in the released code.
        multires_steps: Steps of the training at all resolutions that comes first; null: 0.7 of the recipe's own.
        predictor_lr: Learning rate of the predictor; null: the recipe's (published: a tenth of it).
        joint_lr: Learning rate of the network in the joint training; null: the recipe's (published). A high one makes
            the network specialise on whichever size most images take just then, and that size win all of them.
        predictor_decay: Weight decay of the predictor.
        smallest_part: Parts of a batch with fewer images leave the norms' statistics alone.
        count_batches: Batches of the calibration loader on which the shares of the sizes are counted in the end.
    """

    stage: ClassVar[str] = "structure"
    touches: ClassVar[frozenset[str]] = frozenset({"structure", "weights", "loss", "gradients"})
    # what others find in the network before it is wrapped is elsewhere, and there m times, afterwards
    needs: ClassVar[Mapping[str, str]] = {"precision": "per_branch_precision", "structure": "per_branch_structure"}

    sizes: list[int] | None = None
    predictor: str = "resnet10"
    predictor_size: int | None = None
    macs: str | float | None = None
    count_predictor: bool = True
    eta: float = 0.2
    tau: float = 1.0
    tau_end: float | None = None
    credit: str = "chosen"
    calibrate: bool = False
    resolution_norm: bool = True
    shared_shortcut_bn: bool = False
    multires_steps: int | None = None
    predictor_lr: float | None = None
    joint_lr: float | None = None
    predictor_decay: float = 1e-4
    smallest_part: int = 2
    count_batches: int = 8

    _plan: Edit = field(default_factory=dict, init=False, repr=False, compare=False)
    _scores: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    # -- options ---------------------------------------------------------------------------------
    def check(self) -> None:
        """Check the options' values.

        Raises:
            RecipeError: A value is out of range; says which is allowed.
        """
        least = {"eta": 0, "predictor_decay": 0, "smallest_part": 1, "count_batches": 1, "multires_steps": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise RecipeError(f"drnet: {name}={value}; expected {low} or more")
        for name in ("tau", "tau_end", "predictor_lr", "joint_lr", "predictor_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RecipeError(f"drnet: {name}={value}; expected a number above 0")
        if self.credit not in CREDITS:
            raise RecipeError(f"drnet: credit={self.credit!r}; expected one of {', '.join(CREDITS)}")
        if self.calibrate and self.macs is None:
            raise RecipeError("drnet: calibrate=True without macs; say in macs which mean cost to meet")
        kind_of(self.predictor)

    @property
    def _off(self) -> bool:
        return self.sizes is not None and len(self.sizes) == 1

    def _sizes(self, base: int) -> list[int]:
        sizes = default_sizes(base) if self.sizes is None else list(self.sizes)
        if not sizes or sizes != sorted(set(sizes), reverse=True):
            raise RecipeError(f"drnet: sizes={sizes}; expected different numbers of pixels, largest first")
        if sizes[0] > base or (self._off and sizes[0] != base):
            raise RecipeError(
                f"drnet: sizes={sizes}: the network's own input is {base} pixels; expected sizes up to that"
                + (f", and two or more to choose from (one alone: {base}, which changes nothing)" if self._off else "")
            )
        return sizes

    def _decide(self, model: nn.Module) -> Edit:
        """Return what the network is wrapped into."""
        channels, height, width = preprocessing(model).size
        if height != width:
            raise ModelError(f"drnet: the network's own input is {height} x {width}; expected a square one")
        sizes = self._sizes(height)
        if self.resolution_norm:
            norm_paths(model)
        macs = probe(model, sizes, (channels, height, width))
        side = self.predictor_size or predictor_side(height, kind_of(self.predictor).share)
        edit: Edit = {
            "do": "wrap", "sizes": sizes, "base": height, "channels": channels, "choices": len(sizes), "macs": macs,
            "predictor": self.predictor, "predictor_size": side, "own_norms": self.resolution_norm,
            "shared_shortcuts": self.shared_shortcut_bn, "least": self.smallest_part, "credit": self.credit,
        }  # fmt: skip
        edit["predictor_macs"] = cost(_router(edit), (channels, height, width), saved=False).macs
        return {**edit, "target": self._target(edit)}

    def _target(self, edit: Edit) -> float | None:
        """Return the bound on the classifier's mean MACs."""
        if self.macs is None:
            return None
        spent = edit["predictor_macs"] if self.count_predictor else 0
        most, least = max(edit["macs"]), min(edit["macs"])
        bound = Budget.parse("macs", self.macs).resolve(most)
        if bound - spent < least:
            raise RecipeError(
                f"drnet: macs={self.macs} is {bound / 1e6:.1f} M; sizes {edit['sizes']} reach "
                f"{(least + spent) / 1e6:.1f} M to {(most + spent) / 1e6:.1f} M. Raise it, or add a smaller size"
            )
        return bound - spent

    # -- structure -------------------------------------------------------------------------------
    def prepare(self, model: nn.Module) -> Edit | None:
        """Check options and model; the network is wrapped by the method's first phase.

        Raises:
            RecipeError: An option is out of range, or the network cannot take one of the sizes.
            ModelError: No convolutional classifier with batch norms and global pooling.
        """
        self.check()
        if self._off:
            self._sizes(preprocessing(model).size[1])
            return None
        self._decide(model)
        return None

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Wrap the network, and later let the predictor choose."""
        if phase.name == MULTIRES:
            return self._decide(model)
        return {"do": "route"} if phase.name == PREDICTOR else None

    def finish(self, model: nn.Module) -> Edit | None:
        """Decide the routed form."""
        if self._off:
            return None
        if not isinstance(model, DynamicResolution) or not self._scores:
            raise StateError(f"drnet: no shares were counted; run all phases, {COUNT!r} last, before finish")
        return {"do": "finish", "shares": self._shares(), "shift": self._shift()}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Wrap the network, put the predictor to use, or give the model its routed form."""
        if edit["do"] == "wrap":
            self._plan = edit
            if edit["own_norms"]:
                give_norms(model, edit["sizes"], shared_shortcuts=edit["shared_shortcuts"])
            wrapped = DynamicResolution(model, _router(edit), edit["sizes"], edit["base"], edit["least"])
            wrapped.credit = edit["credit"]
            return wrapped.train(model.training)
        assert isinstance(model, DynamicResolution)  # noqa: S101 - made so by the edit before
        if edit["do"] == "route":
            model.fixed = None
            return model
        model.shares, model.shift = tuple(edit["shares"]), edit["shift"]
        return model.deployed()

    # -- schedule --------------------------------------------------------------------------------
    def phases(self, plan: Plan) -> Plan:
        """Lay training at all resolutions before the recipe's own, which trains the predictor too.

        Raises:
            PlanError: The plan has no training called ``"fit"``.
        """
        if self._off:
            return plan
        fit = next((p for p in plan if p.name.split(".")[0] == "fit"), None)
        if fit is None:
            raise PlanError(f"drnet: phases {[p.name for p in plan]}; expected 'fit', which trains the predictor")
        steps = round(MULTIRES_SHARE * fit.steps) if self.multires_steps is None else self.multires_steps
        first = replace(fit, name=MULTIRES, steps=steps, window=None)
        plan = plan.before("fit", first, Phase(PREDICTOR, 1, turns=(), work=self._reset))
        plan = plan.swap("fit", lambda p: [self._joint(p)])
        return plan.after("fit", Phase(COUNT, self.count_batches, turns=(), work=self._count))

    def _joint(self, fit: Phase) -> Phase:
        rates = {"predictor": self.predictor_lr, "weights": self.joint_lr}
        lr = {group: rate for group, rate in rates.items() if rate is not None}
        own = {"predictor": {"weight_decay": self.predictor_decay}}
        (joined,) = Plan((fit,)).join("predictor", "weights")
        return replace(joined, lr={**(fit.lr or {}), **lr}, optimizer={**(fit.optimizer or {}), **own}, fresh=True)

    def groups(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Return the predictor's parameters as group ``"predictor"``."""
        return {"predictor": list(model.router.parameters())} if isinstance(model, DynamicResolution) else {}

    def _reset(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        assert isinstance(model, DynamicResolution)  # noqa: S101 - the phase before has wrapped it
        reset(model.router, step.generator("drnet.predictor"))
        return {}

    @torch.no_grad()
    def _count(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        """Count which sizes the images of one batch take."""
        assert isinstance(model, DynamicResolution)  # noqa: S101 - wrapped since the first phase
        loader = loaders.get("calibration") or loaders["train"]
        with evaluating(model):
            self._scores.append(model.router(loader(step)["image"]).float().cpu())
        return {f"share_{s}": share for s, share in zip(model.sizes, self._shares(), strict=True)}

    def _shift(self) -> list[float] | None:
        """Return what is added to the scores in the end."""
        target, macs = self._plan["target"], self._plan["macs"]
        if not self.calibrate or target is None:
            return None
        shift = budget_shift(torch.cat(self._scores), macs, target)
        return shift if any(shift) else None

    def _shares(self) -> list[float]:
        """Return the shares of the sizes among the images counted so far."""
        scores = torch.cat(self._scores) + torch.tensor(self._shift() or 0.0)
        return [float(n) / len(scores) for n in torch.bincount(scores.argmax(1), minlength=scores.shape[1])]

    # -- step ------------------------------------------------------------------------------------
    def wrap_grads(self, grads: Grads, evaluate: Evaluate) -> Grads:
        """Return ``grads`` at all sizes in turn (first training), or under sizes drawn for every image (second)."""

        def resolved(model: nn.Module, batch: Batch, step: Step, params: list[nn.Parameter]) -> dict[str, Any]:
            if not isinstance(model, DynamicResolution):
                return grads(model, batch, step, params)
            if model.fixed is None:
                heat = temperature(self.tau, self.tau_end, step.index, step.total)
                with model.drawing(heat, lambda: step.generator("drnet.gumbel", per_rank=True)):
                    return grads(model, batch, step, params)
            logs: dict[str, Any] = {}
            for j in range(len(model.sizes)):
                with model.only(j):
                    for name, value in grads(model, batch, step, params).items():
                        logs[name] = logs.get(name, 0) + value
            return logs

        return resolved

    def loss(self, model: nn.Module, batch: Batch, out: Tensor, step: Step) -> Terms:
        """Return the weighted budget term of a pass whose sizes were drawn."""
        if not isinstance(model, DynamicResolution) or not model.draws:
            return {}
        drawn, terms = model.take_drawn(), {}
        if drawn.said is not None and self.credit == "expected":
            terms["drnet.credit"] = credit_term(drawn.odds, drawn.said, batch["target"])
        if self._plan["target"] is not None:
            terms["drnet.budget"] = self.eta * budget_term(drawn.choice, self._plan["macs"], self._plan["target"])
        return terms

    # -- evaluation, report, state ---------------------------------------------------------------
    def variants(self, model: nn.Module) -> dict[str, AbstractContextManager[None]]:
        """Return every size as a state in which all images take it."""
        if not isinstance(model, DynamicResolution):
            return {}
        return {f"drnet.{size}": model.only(j) for j, size in enumerate(model.sizes)}

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return sizes, costs, shares and the mean cost they make."""
        if not self._plan:
            return {}
        macs, spent, total = self._plan["macs"], self._plan["predictor_macs"], sum(map(len, self._scores))
        shares = self._shares() if total else [None] * len(macs)
        rows = [
            {"pixels": s, "MACs": m, "share of the images": None if share is None else round(share, 4)}
            for s, m, share in zip(self._plan["sizes"], macs, shares, strict=True)
        ]
        facts: dict[str, Any] = {"predictor": self.predictor, "predictor's MACs": spent, "images counted": total}
        if total:
            mean = sum(share * m for share, m in zip(self._shares(), macs, strict=True))
            facts |= {"mean MACs of an image": round(mean + spent), "over the largest size": round(mean / max(macs), 4)}
        if self._plan["target"] is not None:
            facts["target of the mean, without predictor"] = round(self._plan["target"])
        return {"facts": facts, "tables": [{"title": "Resolutions", "rows": rows}]}

    def state_dict(self) -> dict[str, Any]:
        """Return the scores of the images counted so far."""
        return {"scores": list(self._scores)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._scores = list(state["scores"])


def _router(edit: Edit) -> nn.Module:
    side, predictor = edit["predictor_size"], build_predictor(edit["predictor"], edit["choices"], edit["channels"])
    return predictor if side == edit["base"] else Resized(predictor, (side, side))
