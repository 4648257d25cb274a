"""FQSR: fully quantized image super-resolution networks (arXiv 2011.14265).

Every convolution's input, weights and output and both operands of every skip connection lie on learned intervals, which
start from the values they meet and are trained with the weights, drawn by a calibration loss.

Reference: billhhh/FQSR at 24cb67a (no licence file), an oracle only. Changed: skip connections are quantized in every
network (the release: in EDSR, all but the long one); the range of an input follows from the dataflow (the release:
lists of indices by hand); batch norms are folded before; the values are observed in passes of their own before
training; deployed forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from gossamer.core.errors import DataError, RecipeError, StateError
from gossamer.core.method import Edit, Method
from gossamer.core.schedule import Batch, Loader, Phase, Plan, Step, Terms
from gossamer.kits.conv_layout import round_outputs
from gossamer.kits.folding import fold_norms
from gossamer.methods.fqsr.layers import STARTS, FQAdd, FQConv2d, Interval, intervals
from gossamer.methods.fqsr.placement import Placement, find_placement
from gossamer.models.contracts import replace_module
from gossamer.ops.liq import check_width

__all__ = ["FQSR"]

START, DEPLOY = "fqsr.start", "fqsr.deploy"
_CHOICES = {
    "ranges": ("auto", "half", "full"),
    "grid": ("midrise", "midtread"),
    "start": STARTS,
    "calibration_loss": ("l1", "l2"),
    "pad": ("before", "after"),
    "skips": ("all", "body", "none"),
    "norms": ("fold", "keep"),
    "deployment": ("exact", "midtread"),
}
_DEPLOYED = 8


@dataclass
class FQSR(Method):
    """Quantization-aware training of all layers of a super-resolution network, skip connections included.

    Attributes:
        weight_bits: Width of weights: 2..16, or 32 for float.
        input_bits: Width of the inputs of convolutions.
        output_bits: Width of the outputs of convolutions and of the operands of skip connections; 32 for float.
        ranges: Interval of an input: ``"auto"`` (``[0, c]`` where the dataflow shows that it cannot be negative, else
            ``[-c, c]``), ``"half"``, ``"full"``.
        grid: ``"midrise"`` (published: 2^bits levels without a zero) or ``"midtread"`` (with one) for full ranges.
        start: ``"max"`` (published: mean of the largest magnitudes), ``"lsq"`` (arXiv 1902.08153), ``"one"`` (1).
        warmup: Calls of an interval that are observed; a skip connection's has two a pass.
        alpha: Weight of the calibration loss; 0 is off.
        calibration_loss: ``"l1"`` (published) or ``"l2"``.
        grad_scale: Scale the intervals' gradients as LSQ does (the release: no).
        relative: Train each interval in units of its start over this number (the release: as it is, 0). Adam moves
            every number by about the learning rate: an end of some hundred grey levels hardly learns in a short
            training, ``relative: 10`` moves each by ten learning rates of its size.
        pad: Pad ``"before"`` rounding (released: the border lies on a level) or ``"after"`` (the border is 0).
        skips: Quantize ``"all"`` additions, all but the last (``"body"``, as released), or ``"none"``.
        norms: ``"fold"`` batch norms into convolutions first, or ``"keep"`` them in float (released).
        deployment: ``"exact"``: the finished model computes what was trained. ``"midtread"``: the last part of the
            training goes on grids that integer kernels like best, and the finished model computes that: full ranges
            and 8-bit weights get a zero, every value is rounded once, whoever reads it.
        deployment_share: Share of the training that goes on these grids.
    """

    stage: ClassVar[str] = "precision"
    touches: ClassVar[frozenset[str]] = frozenset({"precision", "loss"})

    weight_bits: int = 8
    input_bits: int = 8
    output_bits: int = 8
    ranges: str = "auto"
    grid: str = "midrise"
    start: str = "max"
    warmup: int = 20
    alpha: float = 0.3
    calibration_loss: str = "l1"
    grad_scale: bool = False
    relative: float = 0.0
    pad: str = "before"
    skips: str = "all"
    norms: str = "fold"
    deployment: str = "exact"
    deployment_share: float = 0.1
    _placement: Placement | None = field(default=None, init=False, repr=False, compare=False)

    # -- structure -------------------------------------------------------------------------------
    def prepare(self, model: nn.Module) -> Edit | None:
        """Check options and model; layers are put in place by the first phase, after whatever comes before it.

        Raises:
            RecipeError: A width or choice out of range.
            ModelError: A network that cannot be quantized as a whole; says what stands in the way.
        """
        for name in ("weight_bits", "input_bits", "output_bits"):
            check_width(getattr(self, name), f"fqsr: {name}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise RecipeError(f"fqsr: {name}={getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        if self.warmup < 1 or min(self.alpha, self.relative) < 0 or not 0 < self.deployment_share < 1:
            raise RecipeError(
                f"fqsr: warmup={self.warmup}, alpha={self.alpha}, relative={self.relative}, "
                f"deployment_share={self.deployment_share}; expected 1 or more, 0 or more, 0 or more, between 0 and 1"
            )
        self._find(model)
        return None

    def _find(self, model: nn.Module) -> Placement:
        return find_placement(model, ranges=self.ranges, skips=self.skips, fold=self.norms == "fold")

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Decide the layers when training begins, and the grids of deployment."""
        if phase.name == START:
            return {"do": "wrap", "placement": self._find(model).to_json()}
        return {"do": "regrid", "placement": self._known().to_json()} if phase.name == DEPLOY else None

    def leave(self, model: nn.Module, phase: Phase) -> Edit | None:
        """End the observation."""
        return {"do": "activate"} if phase.name == START else None

    def finish(self, model: nn.Module) -> Edit:
        """Decide each layer's deployed form."""
        forms = {n: m.form for n, m in model.named_modules() if isinstance(m, FQConv2d)}
        if not forms:
            raise StateError(f"fqsr: no layer is quantized; run the phase {START!r} before finish")
        return {"do": "finish", "forms": forms}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Put quantized layers in place, let them round, change their grids, or give them their deployed form."""
        if edit["do"] == "wrap":
            self._placement = Placement.from_json(edit["placement"])
            return self._wrap(model, self._placement)
        if edit["do"] == "activate":
            for interval in intervals(model):
                interval.activate(self.relative)
            return model
        if edit["do"] == "regrid":
            return self._regrid(model, Placement.from_json(edit["placement"]))
        return self._finish(model, edit["forms"])

    def _interval(self, bits: int, half: bool, like: torch.Tensor) -> Interval:
        new = Interval(
            bits, half, zero=self.grid == "midtread", start=self.start, warmup=self.warmup, scaled=self.grad_scale,
            loss=self.calibration_loss if self.alpha else "",
        )  # fmt: skip
        return new.to(like.device)

    def _wrap(self, model: nn.Module, placement: Placement) -> nn.Module:
        fold_norms(model, placement.norms)
        like = next(model.parameters())
        for name, about in placement.convs.items():
            inside = self._interval(self.input_bits, about["input"] == "half", like)
            new = FQConv2d(
                model.get_submodule(name),  # type: ignore[arg-type]
                self._interval(self.weight_bits, False, like),
                None if about["input"] == "float" else inside,
                self._interval(self.output_bits, False, like) if about["output"] else None,
                self.pad == "before",
            )
            replace_module(model, name, new)
        for name in placement.adds:
            replace_module(model, name, FQAdd(self._interval(self.output_bits, False, like)))
        return model

    def _regrid(self, model: nn.Module, placement: Placement) -> nn.Module:
        """Give every value one grid with a zero; weights below 8 bits keep theirs, which integers hold as it is."""
        for interval in intervals(model):
            interval.zero = True
        for name in placement.convs:
            conv = _conv(model, name)
            conv.weight_interval.zero = self.weight_bits >= _DEPLOYED or self.grid == "midtread"
            if name in placement.spare:
                conv.output_interval = None
        for add, name in placement.ties:
            if self.input_bits == self.output_bits:
                joint = model.get_submodule(add)
                _conv(model, name).input_interval = joint.interval  # type: ignore[assignment]
        return model

    def _finish(self, model: nn.Module, forms: Mapping[str, str]) -> nn.Module:
        grids = {}
        for name, form in forms.items():
            conv = _conv(model, name)
            out = conv.output_interval
            if form == "int8" and out is not None and out.bits <= _DEPLOYED:
                grids[name] = {"bits": out.bits, "kind": out.kind, "step": float(out.step())}
            if form == "int8":
                replace_module(model, name, conv.deployed())
            elif form == "float":
                replace_module(model, name, conv.plain())
        for name, add in [(n, m) for n, m in model.named_modules() if isinstance(m, FQAdd)]:
            replace_module(model, name, add.deployed())
        return round_outputs(model, grids)

    def _known(self) -> Placement:
        if self._placement is None:
            raise StateError("fqsr: the layers are not known yet; enter the phases in order")
        return self._placement

    # -- schedule --------------------------------------------------------------------------------
    def phases(self, plan: Plan) -> Plan:
        """Observe before the recipe's own training; give its end to the grids of deployment where asked."""
        passes = 0 if self.start == "one" else self.warmup
        start = Phase(START, passes, turns=(), work=self._observe)
        trains = any(p.name.split(".")[0] == "fit" for p in plan)
        plan = plan.before("fit", start) if trains else Plan((*plan, start))
        if self.deployment == "exact":
            return plan
        swap = Phase(DEPLOY, 0, turns=())
        return plan.swap("fit", lambda p: self._divided(p, swap)) if trains else Plan((*plan, swap))

    def _divided(self, fit: Phase, swap: Phase) -> list[Phase]:
        last = round(self.deployment_share * fit.steps)
        if not last:
            return [fit, swap]
        return [fit.part("fit", 0, fit.steps - last), swap, fit.part("fit.deployed", fit.steps - last, last)]

    def _observe(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        loader = loaders.get("train") or loaders.get("calibration")
        if loader is None:
            raise DataError("fqsr: intervals start from pictures; name some (data.train, or data.calibration)")
        with torch.no_grad():
            model(loader(step)["image"])
        return {}

    # -- step ------------------------------------------------------------------------------------
    def loss(self, model: nn.Module, batch: Batch, out: Any, step: Step) -> Terms:
        """Return the calibration loss of all intervals that round."""
        noted = [value for interval in intervals(model) for value in interval.noted]
        self._forget(model)
        return {"fqsr.calibration": self.alpha * torch.stack(noted).sum()} if noted else {}

    def before_step(self, model: nn.Module, step: Step) -> None:
        """Drop what a turn with an objective of its own has noted."""
        self._forget(model)

    def _forget(self, model: nn.Module) -> None:
        for interval in intervals(model):
            interval.noted.clear()

    # -- report ----------------------------------------------------------------------------------
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return widths and forms per layer, bit operations, and what stays in float."""
        if self._placement is None:
            return {}
        convs = self._placement.convs
        rows = [
            {
                "layer": n,
                "bits": f"{self.weight_bits}x{8 if about['input'] == 'float' else self.input_bits}",
                "input": about["input"],
                "output": self.output_bits if about["output"] else "float",
                "MACs": about["macs"] or None,
                "form": type(model.get_submodule(n)).__name__,
            }
            for n, about in convs.items()
        ]
        bops = sum(
            a["macs"] * self.weight_bits * (8 if a["input"] == "float" else self.input_bits) for a in convs.values()
        )
        facts: dict[str, Any] = {"BOPs per image": bops} if bops else {}  # none where the input size is not stated
        facts["quantized additions"] = len(self._placement.adds)
        facts |= {f"left in float: {where}": why for where, why in self._placement.islands.items()}
        return {"facts": facts, "tables": [{"title": "Quantized layers", "rows": rows}]}


def _conv(model: nn.Module, name: str) -> FQConv2d:
    layer = model.get_submodule(name)
    if not isinstance(layer, FQConv2d):
        raise StateError(f"fqsr: layer {name!r} is {type(layer).__name__}; expected a quantized convolution")
    return layer
