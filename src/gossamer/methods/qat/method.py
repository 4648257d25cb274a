"""Quantization-aware training at one width, with learned clips: the baseline of methods that do more.

The quantizers are those of arXiv 2111.12273 (LIQ, ``ops.liq``), the layers, starts and deployed forms those of
``kits.qat``: a method built on the same kit differs from this one in nothing but what it adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from gossamer.core.errors import RecipeError, StateError
from gossamer.core.method import Edit, Method
from gossamer.core.schedule import Loader, Phase, Plan, Step
from gossamer.kits.qat import (
    CLIP_STARTS,
    QatLayout,
    decay_clips,
    final_forms,
    find_layers,
    finish_layers,
    first_batch,
    foldable_norms,
    init_clips,
    layer_rows,
    qat_layers,
    sum_grids,
    wrap_layers,
)
from gossamer.ops.liq import check_width

__all__ = ["QAT"]

CLIPS, SUMS = "qat.clips", "qat.sums"


@dataclass
class QAT(Method):
    """Trains with quantized weights and activations whose clips are learned.

    Attributes:
        bits: Width of weights and activations between the first and the last layer: 2..16, or 32 for float.
        first_last_bits: Width of the first and the last layers.
        inputs: Grid of activations: ``"auto"`` (signed where a model's activations are), ``"unsigned"``, ``"signed"``.
        normalise: Normalise the weights of convolutions; null: where the model has batch norms.
        quantize_image: Put the image on a grid too; else it stays float and counts as 8 bit.
        clip_start: ``"paper"`` or ``"mse"`` (least squared error on one batch: better where training is short).
        clip_decay: Weight decay of the clips (published: that of the weights).
        round_sums: In the finished model, round to 8 bits what convolutions hand to sums and means. ONNX Runtime needs
            it to run them in integers; OpenVINO does without. Off: the finished model computes what was trained.
    """

    stage: ClassVar[str] = "precision"
    touches: ClassVar[frozenset[str]] = frozenset({"precision"})

    bits: int = 4
    first_last_bits: int = 8
    inputs: str = "auto"
    normalise: bool | None = None
    quantize_image: bool = False
    clip_start: str = "paper"
    clip_decay: float = 0.0
    round_sums: bool = True
    _layout: QatLayout | None = field(default=None, init=False, repr=False, compare=False)
    _sums: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def prepare(self, model: nn.Module) -> Edit | None:
        """Check options and model; layers are put in place by the first phase, after whatever comes before it.

        Raises:
            RecipeError: A width or choice out of range.
            ModelError: Nothing to quantize, or quantized already.
        """
        check_width(self.bits, "qat: bits")
        check_width(self.first_last_bits, "qat: first_last_bits")
        if self.clip_start not in CLIP_STARTS or self.clip_decay < 0:
            raise RecipeError(
                f"qat: clip_start={self.clip_start!r}, clip_decay={self.clip_decay}; allowed are "
                f"{', '.join(CLIP_STARTS)}, 0 or more"
            )
        self._find(model)
        return None

    def _find(self, model: nn.Module) -> QatLayout:
        return find_layers(model, inputs=self.inputs, normalise=self.normalise, image_bits=self.quantize_image)

    def phases(self, plan: Plan) -> Plan:
        """Quantize and start the clips before the recipe's own training; see to the sums after it."""
        start = Phase(CLIPS, 1, turns=(), work=self._start)
        trains = any(p.name.split(".")[0] == "fit" for p in plan)
        plan = plan.before("fit", start) if trains else Plan((*plan, start))
        return Plan((*plan, Phase(SUMS, 1, turns=(), work=self._round_sums))) if self.round_sums else plan

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Decide the layers."""
        return {"do": "wrap", "layout": self._find(model).to_json()} if phase.name == CLIPS else None

    def finish(self, model: nn.Module) -> Edit:
        """Decide each layer's deployed form."""
        if not qat_layers(model):
            raise StateError(f"qat: no layer is quantized; run the phase {CLIPS!r} before finish")
        forms = final_forms(model)
        return {"do": "finish", "forms": forms, "norms": foldable_norms(model, forms), "sums": self._sums}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Put trainable layers in place, or give them their deployed form."""
        if edit["do"] == "finish":
            return finish_layers(model, edit["forms"], edit["norms"], edit["sums"])
        self._layout = QatLayout.from_json(edit["layout"])
        widths = self._layout.widths(self.bits, self.first_last_bits)
        return wrap_layers(model, self._layout, {n: [w] for n, w in widths.items()})

    def _start(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        init_clips(model, first_batch(loaders, step), self.clip_start)
        return {}

    def _round_sums(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        self._sums = sum_grids(model, first_batch(loaders, step))
        return {}

    def before_step(self, model: nn.Module, step: Step) -> None:
        """Let the clips decay."""
        decay_clips(model, self.clip_decay)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return widths and forms per layer."""
        if self._layout is None:
            return {}
        widths = self._layout.widths(self.bits, self.first_last_bits)
        forms = {n: type(model.get_submodule(n)).__name__ for n in widths}
        facts: dict[str, Any] = {"BOPs per image": self._layout.bops(widths)}
        facts |= {f"left in float: {n}": why for n, why in self._layout.skipped.items()}
        rows = layer_rows(self._layout, widths, forms)
        return {"facts": facts, "tables": [{"title": "Quantized layers", "rows": rows}]}

    def state_dict(self) -> dict[str, Any]:
        """Return the grids of the sums."""
        return {"sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._sums = dict(state["sums"])
