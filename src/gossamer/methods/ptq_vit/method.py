"""Post-training quantization for vision transformers (Liu et al., NeurIPS 2021, arXiv 2106.14156).

Reference code: none was published. Written from the paper; where it is silent the choice is an
option, and its default is argued for in the card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import nn

from gossamer.core.errors import RecipeError, StateError
from gossamer.core.method import Edit, Method
from gossamer.core.schedule import Loader, Phase, Plan, Step
from gossamer.kits.bit_allocation import allocate_bits, budget_bits, size_mb
from gossamer.kits.calibration import RowPick, Walk, calibration_batches
from gossamer.kits.equalisation import equalise, find_pairs, insert_gains
from gossamer.kits.quant_layout import (
    Layout,
    WidthOptions,
    final_forms,
    find_layout,
    finish_layers,
    layer_specs,
    open_layout,
    quant_layers,
    weight_counts,
    wrap_layers,
)
from gossamer.kits.scale_search import METRICS, Metric, SearchOptions
from gossamer.methods.ptq_vit.maths import RANK_ON
from gossamer.methods.ptq_vit.search import Objective, UnitSearch
from gossamer.methods.ptq_vit.sensitivity import MixedPrecision, check_mixed, module_layers, unit_sensitivity
from gossamer.ops.quant import BITS, QuantMatMul
from gossamer.ops.tokens import find_track

__all__ = ["PTQViT"]

CALIBRATE, SENSITIVITY = "ptq_vit.calibrate", "ptq_vit.sensitivity"


@dataclass
class PTQViT(Method):
    """Quantizes a trained vision transformer by searching quantizer steps on unlabelled images.

    Attributes:
        w_bits: Width of weights, 2..16.
        a_bits: Width of activations, 2..16.
        metric: Similarity of layer outputs to maximise; the paper uses ``"pearson"``.
        rank_gamma: Weight of the ranking loss on attention scores; 0 leaves it out.
        rank_theta: Margin of the ranking loss, in units of the scores.
        rank_on: Which scores: ``"scaled_scores"`` (Q K^T / sqrt(d)), ``"scores"`` (Q K^T),
            ``"attention"`` (their softmax).
        rank_reduction: ``"mean"`` over ordered pairs and heads, or the paper's ``"sum"``.
        rank_rows: Query rows per image the ranking loss looks at; ``None`` for all kept rows.
        rank_pairs: Key pairs it looks at; ``None`` for all.
        alpha: Smallest candidate step, as a factor of the max-abs step.
        beta: Largest candidate step.
        n_candidates: Candidates per step.
        max_iter: Largest number of alternations.
        early_stop: Least share by which a round must lower the loss to go on; 0 is the paper's rule.
        coarse: Search candidates coarse to fine instead of trying all (extension).
        bias_correction: Correct biases for the expected output error.
        per_channel: One weight step per output row (extension; the paper has one per tensor).
        unsigned_softmax: Unsigned grid for the softmax output (extension).
        equalise: Strength in [0, 1] of channel equalisation before the search (extension, see
            ``kits.equalisation``; changes weights, not the float function); ``None`` for none.
        head_bits: Width of the classifier (the paper leaves it open); ``None`` for float.
        attention_products: Quantize both attention products; the paper does.
        images: Calibration images.
        search_images: How many of them the search of steps looks at; ``None`` for all. Biases and
            extremes always see all images and tokens.
        rows: Output rows (tokens) per image the search looks at; ``None`` for all. A few random
            tokens can miss those with the largest activations.
        inputs: ``"quantized"``: float targets, inputs from the model as quantized so far;
            ``"float"``: float inputs; ``"local"``: targets recomputed from the quantized inputs.
            ``"auto"`` is ``"local"`` where tokens are reduced (the float and the quantized model
            may keep different ones), else ``"quantized"``.
        low_bits: Final form of layers below 8 bits: ``"simulated"`` in floating point, or
            ``"int8"`` (integer kernels on the narrower grid; saves no time over 8 bits).
        mixed: Options of mixed precision, see ``MixedPrecision``; ``None`` for one width.
    """

    stage: ClassVar[str] = "precision"
    touches: ClassVar[frozenset[str]] = frozenset({"precision"})

    w_bits: int = 8
    a_bits: int = 8
    metric: Metric = "pearson"
    rank_gamma: float = 0.1
    rank_theta: float = 0.2
    rank_on: Literal["scaled_scores", "scores", "attention"] = "scaled_scores"
    rank_reduction: Literal["mean", "sum"] = "mean"
    rank_rows: int | None = 16
    rank_pairs: int | None = 512
    alpha: float = 0.5
    beta: float = 1.2
    n_candidates: int = 40
    max_iter: int = 20
    early_stop: float = 0.02
    coarse: bool = False
    bias_correction: bool = True
    per_channel: bool = False
    unsigned_softmax: bool = False
    equalise: float | None = None
    head_bits: int | None = 8
    attention_products: bool = True
    images: int = 32
    search_images: int | None = 8
    rows: int | None = None
    inputs: Literal["auto", "quantized", "float", "local"] = "auto"
    low_bits: Literal["simulated", "int8"] = "simulated"
    mixed: MixedPrecision | None = None
    _num_units: int = field(default=0, init=False, repr=False, compare=False)
    _layout: Layout | None = field(default=None, init=False, repr=False, compare=False)
    _walk: tuple[str, Walk, list[str]] | None = field(default=None, init=False, repr=False, compare=False)
    _pairs: list[dict[str, str]] = field(default_factory=list, init=False, repr=False, compare=False)
    _state: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    # -- options -------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raise ``RecipeError`` for option values that cannot be used."""
        for name, bits in (("w_bits", self.w_bits), ("a_bits", self.a_bits), ("head_bits", self.head_bits)):
            if bits is not None and bits not in BITS:
                raise RecipeError(f"ptq_vit: {name}={bits}; allowed are {BITS[0]}..{BITS[-1]}")
        choices = {
            "metric": METRICS,
            "rank_on": RANK_ON,
            "rank_reduction": ("mean", "sum"),
            "inputs": ("auto", "quantized", "float", "local"),
            "low_bits": ("simulated", "int8"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise RecipeError(f"ptq_vit: {name}={getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        for name in ("images", "search_images", "rows", "rank_rows", "rank_pairs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"ptq_vit: {name}={value}; calibrating needs at least 1. Set {name}, e.g. 32")
        if self.rank_gamma < 0 or self.rank_theta < 0:
            raise RecipeError(f"ptq_vit: rank_gamma={self.rank_gamma}, rank_theta={self.rank_theta}; expected >= 0")
        if self.equalise is not None and not 0 <= self.equalise <= 1:
            raise RecipeError(f"ptq_vit: equalise={self.equalise}; allowed are 0..1, or null for none")
        self._search_options().check("ptq_vit")
        if self.mixed is not None:
            check_mixed(self.mixed)

    def _search_options(self) -> SearchOptions:
        return SearchOptions(self.alpha, self.beta, self.n_candidates, self.max_iter, self.early_stop, self.coarse)

    def _objective(self) -> Objective:
        return Objective(
            self.metric,
            self.rank_gamma,
            self.rank_theta,
            self.rank_on,
            self.rank_reduction,
            self.rank_rows,
            self.rank_pairs,
        )

    # -- structure -------------------------------------------------------------------------------------
    def prepare(self, model: nn.Module) -> Edit:
        """Check options and model, and count the units; layers are found once everything before has changed them."""
        self.check()
        return {"units": len(self._find(model).units)}

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Wrap the layers at the start of the first phase; set the widths of mixed precision."""
        if phase.name not in (CALIBRATE, SENSITIVITY):
            return None
        if not quant_layers(model):
            layout = self._find(model)
            pairs = find_pairs(model, layout.attentions) if self.equalise is not None else []
            return {"layout": layout.to_json(), "wrap": self._specs(model, layout), "pairs": pairs}
        return {"bits": self._allocate(model)} if phase.name == CALIBRATE and self.mixed is not None else None

    def leave(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Name the calibrated layers."""
        self._walk = None
        return {"active": [r["layer"] for r in self._state.get("records", [])]} if phase.name == CALIBRATE else None

    def finish(self, model: nn.Module) -> Edit:
        """Decide each layer's final form: real 8 bit where kernels exist, else simulated; float if never reached."""
        if not any(m.active for m in quant_layers(model).values()):
            raise StateError(f"ptq_vit: no layer is calibrated; run the phase {CALIBRATE!r} before finish")
        return {"final": final_forms(model, self.low_bits)}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Open, wrap, set widths, activate or give final forms."""
        if "units" in edit:
            self._num_units = edit["units"]
            return model
        if "layout" in edit:
            self._layout = Layout.from_json(edit["layout"])
            model = open_layout(model, self._layout)
        if "wrap" in edit:
            self._pairs = edit["pairs"]
            return insert_gains(wrap_layers(model, edit["wrap"]), self._pairs)
        layers = quant_layers(model)
        for name, bits in edit.get("bits", {}).items():
            layers[name].bits = (bits, bits)
        for name in edit.get("active", []):
            layers[name].active = True
        return finish_layers(model, edit.get("final", {}))

    def _known(self) -> Layout:
        if self._layout is None:
            raise StateError(f"ptq_vit: the layers are not known yet; enter the phase {CALIBRATE!r} first")
        return self._layout

    def _find(self, model: nn.Module) -> Layout:
        return find_layout(model, products=self.attention_products)

    def _specs(self, model: nn.Module, layout: Layout) -> dict[str, Any]:
        widths = WidthOptions(
            self.w_bits, self.a_bits, self.head_bits, self.per_channel, self.unsigned_softmax, self.bias_correction
        )
        return layer_specs(model, layout, widths)

    # -- phases ----------------------------------------------------------------------------------------
    def phases(self, plan: Plan) -> Plan:
        """Calibrate after everything else; one unit of work is one block."""
        new = [Phase(CALIBRATE, self._num_units, turns=(), work=self._calibrate)]
        if self.mixed is not None:
            new.insert(0, Phase(SENSITIVITY, self._num_units, turns=(), work=self._sensitivity))
        return Plan((*plan, *new))

    def _start(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> tuple[Walk, list[str]]:
        """Return the images' walk and the layers in order of execution, kept for the phase."""
        if self._walk is None or self._walk[0] != step.phase or self._walk[1].model is not model:
            name = replace(step, phase=CALIBRATE)  # both phases see the same images
            walk = Walk(model, calibration_batches(loaders, self.images, name), replay=find_track(model) is None)
            walk.batches = [b.to(next(model.parameters()).device) for b in walk.batches]
            self._walk = (step.phase, walk, walk.order(quant_layers(model)))
            if self.equalise is not None and not self._state.get("equalised"):
                equalise(walk, self._pairs, self.equalise)
                self._state = {**self._state, "equalised": True}
        return self._walk[1], self._walk[2]

    def _unit(self, order: list[str], index: int) -> tuple[str, list[str], list[str]] | None:
        """Return unit number ``index`` in order of execution: name, its layers, layers before it."""
        home = {n: unit for unit, names in self._known().units.items() for n in names}
        reached = list(dict.fromkeys(home[n] for n in order))
        if index >= len(reached):
            return None
        before = [n for n in order if home[n] in reached[:index]]
        return reached[index], [n for n in order if home[n] == reached[index]], before

    def _unit_search(self, walk: Walk, step: Step, *, mixed: bool = False) -> UnitSearch:
        inputs = self.inputs
        if inputs == "auto":
            inputs = "quantized" if walk.replay else "local"
        options, objective = self._search_options(), self._objective()
        if mixed:  # ranking candidate widths needs less than the final steps do
            options, objective = (
                replace(options, max_iter=min(1, self.max_iter), coarse=True),
                replace(objective, gamma=0.0),
            )
        keep = RowPick(self.rows, replace(step, index=0).key("ptq_vit.rows") % 2**31, self.search_images)
        correct = self.bias_correction and not mixed
        return UnitSearch(
            walk, self._known().attentions, objective, options, inputs=inputs, keep=keep, correct_bias=correct
        )

    def _calibrate(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        walk, order = self._start(model, loaders, step)
        unit = self._unit(order, step.index)
        if unit is None:
            return {}
        records = self._unit_search(walk, step).run(*unit)
        kept = [r for r in self._state.get("records", []) if r["layer"] not in unit[1]]
        self._state = {**self._state, "images": walk.num_images, "records": [*kept, *records]}
        return {"error": sum(r["error"] for r in records) / len(records)}

    def _sensitivity(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        walk, order = self._start(model, loaders, step)
        unit = self._unit(order, step.index)
        if unit is None:
            return {}
        mixed = check_mixed(self.mixed or {})
        decisions = module_layers(self._known().modules, mixed["granularity"])
        within = {m: [n for n in unit[1] if n in names] for m, names in decisions.items()}
        within = {m: names for m, names in within.items() if names}
        search = self._unit_search(walk, step, mixed=True)
        relative = mixed["sensitivity"] == "nuclear_relative"
        omegas = unit_sensitivity(search, unit[0], within, mixed["bits"], relative=relative)
        found = {m: {str(b): v for b, v in o.items()} for m, o in omegas.items()}
        self._state = {**self._state, "omegas": {**self._state.get("omegas", {}), **found}}
        return {}

    def _allocate(self, model: nn.Module) -> dict[str, int]:
        """Return the width of every layer of every decision."""
        mixed, layers = check_mixed(self.mixed or {}), quant_layers(model)
        decisions = module_layers(self._known().modules, mixed["granularity"])
        omegas = {m: {int(b): v for b, v in o.items()} for m, o in self._state["omegas"].items()}
        decisions = {m: [n for n in names if n in layers] for m, names in decisions.items() if m in omegas}
        sizes = {m: weight_counts(model, names) for m, names in decisions.items()}
        decided = {n for names in decisions.values() for n in names}
        outside = [m for n, m in layers.items() if n not in decided and not isinstance(m, QuantMatMul)]
        fixed = sum(m.weight.numel() * m.bits[0] for m in outside)
        widths = allocate_bits(omegas, sizes, budget_bits(mixed["budget"], sum(sizes.values()), fixed))
        self._state = {**self._state, "widths": widths}
        return {n: widths[m] for m, names in decisions.items() for n in names}

    # -- report and state --------------------------------------------------------------------------------
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return widths, similarity, pair order and size, per layer and in total."""
        records = self._state.get("records", [])
        if not records:
            return {}
        rows, bits, weights, forms = [], 0, 0, {"int8": 0, "simulated": 0}
        for r in records:
            layer: Any = model.get_submodule(r["layer"])
            count = layer.weight.numel() if hasattr(layer, "weight") else 0
            bits, weights = bits + count * r["bits"][0], weights + count
            simulated = isinstance(layer, QuantMatMul) or hasattr(layer, "active")
            forms["simulated" if simulated else "int8"] += 1
            rows.append(
                {
                    "layer": r["layer"],
                    "bits": "x".join(map(str, r["bits"])),
                    "correlation": round(r["gamma"], 6),
                    "relative error": round(r["error"], 6),
                    "pair order tau": None if r["tau"] is None else round(r["tau"], 4),
                    "input peak / rms": round(r["peak"], 1),
                    "alternations": r["rounds"],
                }
            )
        taus = [r["tau"] for r in records if r["tau"] is not None]
        facts: dict[str, Any] = {
            "calibration images": self._state["images"],
            "layers in real 8 bit": forms["int8"],
            "layers only simulated in float (no kernel at their width)": forms["simulated"],
            "quantized weights, MB (decimal)": round(size_mb(1, bits), 4),
            "the same in fp32, MB": round(size_mb(weights, 32), 4),
            "mean relative output error": round(sum(r["error"] for r in records) / len(records), 6),
            "mean pair order tau of scores": round(sum(taus) / len(taus), 4) if taus else None,
            "layers left in float": ", ".join(f"{n} ({why})" for n, why in self._known().skipped.items()) or "none",
        }
        tables = [{"title": "Quantized layers", "rows": rows}]
        if "widths" in self._state:
            omegas = self._state["omegas"]
            facts["sensitivity rises with the width in"] = ", ".join(_rising(omegas)) or "no module"
            tables.append({"title": "Mixed precision", "rows": [
                {"module": m, "bits": b, **{f"Omega at {k}": f"{v:.4g}" for k, v in omegas[m].items()}}
                for m, b in self._state["widths"].items()
            ]})  # fmt: skip
        return {"facts": facts, "tables": tables}

    def state_dict(self) -> dict[str, Any]:
        """Return records of calibrated layers, sensitivities and widths."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._state = dict(state)


def _rising(omegas: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the modules whose sensitivity is not non-increasing in the width."""
    odd = []
    for module, by_width in omegas.items():
        values = [by_width[b] for b in sorted(by_width, key=int)]
        if any(b > a for a, b in zip(values, values[1:], strict=False)):
            odd.append(module)
    return odd
