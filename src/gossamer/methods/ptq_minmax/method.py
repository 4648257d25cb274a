"""Post-training quantization from extremes: max-abs weights, max-abs or percentile activations.

The baseline of arXiv 2106.14156 (Table 1, "Percentile"): the same layers and grids as the
searching methods, steps read off the data in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.errors import RecipeError, StateError
from gossamer.core.method import Edit, Method
from gossamer.core.schedule import Loader, Phase, Plan, Step
from gossamer.kits.calibration import Observe, TopMagnitudes, Walk, calibration_batches
from gossamer.kits.conv_layout import find_conv_layout, measure_sums, round_outputs
from gossamer.kits.quant_layout import (
    Layout,
    WidthOptions,
    final_forms,
    find_layout,
    finish_layers,
    layer_specs,
    open_layout,
    quant_layers,
    wrap_layers,
)
from gossamer.models.timm_adapter import attention_views
from gossamer.ops.quant import BITS, QuantMatMul, max_scale

__all__ = ["PTQMinMax"]

CALIBRATE = "ptq_minmax.calibrate"


@dataclass
class PTQMinMax(Method):
    """Quantizes a vision transformer or a convolutional network with steps from extremes.

    Attributes:
        w_bits: Width of weights, 2..16.
        a_bits: Width of activations, 2..16.
        percentile: Magnitude of activations put on the largest code, as a percentile over all
            calibration images: 100 is max-abs, the paper's baseline is near 99.9. Exact.
        per_channel: One weight step per output row.
        unsigned_softmax: Unsigned grid for the softmax output.
        head_bits: Width of the classifier; ``None`` for float.
        attention_products: Quantize both attention products.
        sums: Round residual sums and what pooling reads to 8 bits too, so that a convolutional network
            runs in integers from end to end. Only where weights and activations have 8 bits.
        images: Calibration images.
    """

    stage: ClassVar[str] = "precision"
    touches: ClassVar[frozenset[str]] = frozenset({"precision"})

    w_bits: int = 8
    a_bits: int = 8
    percentile: float = 100.0
    per_channel: bool = False
    unsigned_softmax: bool = False
    head_bits: int | None = 8
    attention_products: bool = True
    sums: bool = True
    images: int = 32
    _layout: Layout | None = field(default=None, init=False, repr=False, compare=False)
    _reached: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    _sums: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def check(self) -> None:
        """Raise ``RecipeError`` for option values that cannot be used."""
        for name, bits in (("w_bits", self.w_bits), ("a_bits", self.a_bits), ("head_bits", self.head_bits)):
            if bits is not None and bits not in BITS:
                raise RecipeError(f"ptq_minmax: {name}={bits}; allowed are {BITS[0]}..{BITS[-1]}")
        if self.images < 1:
            raise RecipeError(f"ptq_minmax: images={self.images}; calibrating needs at least 1. Set images, e.g. 32")
        TopMagnitudes(self.percentile)

    def prepare(self, model: nn.Module) -> Edit | None:
        """Check options and model; layers are found once everything before has changed them."""
        self.check()
        self._find(model)
        return None

    def _find(self, model: nn.Module) -> Layout:
        if attention_views(model):
            return find_layout(model, products=self.attention_products)
        return find_conv_layout(model)

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Find and wrap the layers; open the attentions or fold the batch norms."""
        if phase.name != CALIBRATE:
            return None
        layout = self._find(model)
        widths = WidthOptions(self.w_bits, self.a_bits, self.head_bits, self.per_channel, self.unsigned_softmax)
        return {"layout": layout.to_json(), "wrap": layer_specs(model, layout, widths)}

    def leave(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Name the calibrated layers."""
        return {"active": list(self._reached)} if phase.name == CALIBRATE else None

    def finish(self, model: nn.Module) -> Edit:
        """Decide each layer's final form and the grids of the sums."""
        if not any(m.active for m in quant_layers(model).values()):
            raise StateError(f"ptq_minmax: no layer is calibrated; run the phase {CALIBRATE!r} before finish")
        return {"final": final_forms(model), "sums": self._sums}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Open, wrap, activate or give final forms."""
        if "layout" in edit:
            self._layout = Layout.from_json(edit["layout"])
            model = open_layout(model, self._layout)
        if "wrap" in edit:
            return wrap_layers(model, edit["wrap"])
        layers = quant_layers(model)
        for name in edit.get("active", []):
            layers[name].active = True
        return round_outputs(finish_layers(model, edit.get("final", {})), edit.get("sums", {}))

    def phases(self, plan: Plan) -> Plan:
        """Calibrate after everything else, in one unit of work."""
        return Plan((*plan, Phase(CALIBRATE, 1, turns=(), work=self._calibrate)))

    @torch.no_grad()
    def _calibrate(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        layers = quant_layers(model)
        device = next(model.parameters()).device
        walk = Walk(model, [b.to(device) for b in calibration_batches(loaders, self.images, step)])
        self._reached = walk.order(layers)
        share = len(walk.batches[0]) / walk.num_images
        tops: dict[str, list[TopMagnitudes]] = {n: [] for n in self._reached}

        def observer(name: str) -> Observe:
            def observe(inputs: tuple[Tensor, ...], out: Tensor | None, batch: int) -> None:
                if not tops[name]:
                    shared = share / walk.calls[name]
                    tops[name] = [TopMagnitudes(self.percentile, shared) for _ in inputs]
                for top, x in zip(tops[name], inputs, strict=True):
                    top.add(x)

            return observe

        walk.run({n: observer(n) for n in self._reached}, outputs=False)
        for name, seen in tops.items():
            layer = layers[name]
            if isinstance(layer, QuantMatMul):
                for scale, top, k in ((layer.a_scale, seen[0], 0), (layer.b_scale, seen[1], 1)):
                    scale.copy_(max_scale(top.value(), layer.bits[k], layer.signed[k]))
                continue
            rows = layer.weight.abs().flatten(1).amax(1).reshape(len(layer.weight_scale), -1).amax(1)
            layer.weight_scale.copy_(max_scale(rows, layer.bits[0]))
            layer.input_scale.copy_(max_scale(seen[0].value(), layer.bits[1], layer.signed))
        if self.sums and self._layout is not None and (self.w_bits, self.a_bits) == (8, 8):
            self._sums = measure_sums(walk, self._layout.sums, self.percentile)
        return {}

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return widths per layer."""
        if self._layout is None:
            return {}
        rows = []
        for name in self._reached:
            layer = model.get_submodule(name)
            rows.append(
                {"layer": name, "bits": f"{layer.weight_bits}x{layer.input_bits}", "form": type(layer).__name__}
            )
        facts = {"activation percentile": self.percentile, "calibration images asked for": self.images}
        return {"facts": facts, "tables": [{"title": "Quantized layers", "rows": rows}]}

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the calibrated layers and the grids of the sums."""
        return {"reached": list(self._reached), "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._reached = list(state["reached"])
        self._sums = dict(state.get("sums", {}))
