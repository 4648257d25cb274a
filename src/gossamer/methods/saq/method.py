"""SAQ: sharpness-aware quantization for deep neural networks (arXiv 2111.12273v1).

Trains at 2 to 5 bits by two passes a step: the second gradient is taken where the *quantized* weights are moved to
their worst neighbour. The widths of the layers may be searched: a generator samples them, a supernet of switchable
layers is trained under its samples, the flattest configuration within the budget is trained from the float weights.

Reference: zhuang-group/SAQ at 594e9c7 (Apache-2.0), an oracle only. Changed: the search perturbs every quantized
layer and the fine-tuning trains at the widths found (``release=True``: neither, as released); the generator's cost
is a number without gradients; widths are drawn alike on all ranks; inputs with negative values keep them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.errors import RecipeError, StateError
from gossamer.core.method import Edit, Evaluate, Grads, Method
from gossamer.core.schedule import Batch, Loader, Phase, Plan, Step, Terms, Turn
from gossamer.kits.controller import Policy, TablePolicy, contrast, reinforce, uniform_choices
from gossamer.kits.norm_statistics import reestimate_norms
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
    set_widths,
    sum_grids,
    unwrap_layers,
    wrap_layers,
)
from gossamer.kits.sharpness import Ascent, Placement, Sharpness, measure_sharpness, sharp_grads
from gossamer.methods.saq.search import (
    UNITS,
    SearchSpace,
    budget_logits,
    cost_term,
    draw_in_band,
    measured_row,
    parse_target,
    row_logits,
    uniform_rows,
)
from gossamer.ops.liq import check_width
from gossamer.ops.modes import evaluating
from gossamer.tasks.classification import Classification, logits_of

__all__ = ["SAQ"]

CHOICES = ("perturbed", "sharpness")
START, WARMUP, SEARCH, DERIVE, CLIPS, SUMS = (
    "saq.start", "saq.warmup", "saq.search", "saq.derive", "saq.clips", "saq.sums",
)  # fmt: skip


@dataclass
class SAQ(Method):
    """Sharpness-aware quantization-aware training at given or searched bit widths.

    Attributes:
        bits: Widths of weights and activations between the first and last layers: one number, or one entry a layer
            (a width, or weights and activations). With ``search`` the widths are found instead.
        first_last_bits: Width of the first and last layers.
        inputs: Grid of activations: ``"auto"`` (signed where they have negative values), ``"unsigned"`` (released:
            negative values become 0), ``"signed"``.
        normalise: Normalise the weights of convolutions; null: where the model has batch norms.
        quantize_image: Put the image on a grid too; else it stays float and counts as 8 bit.
        clip_start: ``"paper"`` or ``"mse"`` (least squared error on one batch: better where training is short).
        clip_decay: Weight decay of the clips (published: that of the weights).
        round_sums: In the finished model, round to 8 bits what convolutions hand to sums and means. ONNX Runtime needs
            it to run them in integers; OpenVINO does without. Off: the finished model computes what was trained.
        rho: Norm of the perturbation; 0 is plain quantization-aware training.
        search_rho: The same while widths are searched; null: ``rho``.
        placement: ``"quantized"`` (case 3), ``"float"`` (case 2), ``"mixed"`` (case 1).
        adaptive: ``"no"``, ``"asam"`` or ``"released"`` (QASAM's code).
        eta: Added to magnitudes under ``adaptive``.
        perturb: What moves: ``weights``, ``norm``, ``bias``, ``act_clip``, ``weight_clip``.
        norm_updates: Batch norms update their statistics in ``"both"`` passes (released) or in the ``"first"``.
        search: Search the widths.
        choices: Candidate widths.
        share: Weights and activations of a layer have one width.
        search_steps: Steps of the supernet's training, warm-up included.
        warmup: Share of them with uniformly drawn widths, before the generator learns.
        target_bops: ``"4bit"``, a share of the float model or an amount.
        bops_weight: Weight of the squared distance to the target.
        bops_unit: ``"relative"`` (the target counts as 674 M), ``"mbops"`` or ``"gbops"`` (published).
        entropy: Weight of the generator's entropy.
        policy_lr: Learning rate of the generator (Adam, betas 0.5 and 0.999).
        policy_decay: Its weight decay.
        baseline: Decay of the moving average subtracted from its costs; 0: none (released).
        controller: ``"lstm"`` (published) or ``"table"``, which decides every layer by itself and learns faster.
        draws: Configurations it judges in a step, on one batch. Two or more: each against the others' mean cost.
        near_budget: Train supernet and generator on draws within the band alone, starting around the width that costs
            the target, and compare that too. Off: all draws; the cost of BOPs leads to the target (released).
        spread: Deviation in bits of the widths that the generator starts with under ``near_budget``.
        measured_start: Measure first what each decision changes by itself, on the float weights; the generator starts
            around the configuration of least summed loss, which is compared in the end too (needs ``near_budget``).
        candidates: Configurations compared in the end.
        band: How far below the target they may lie, as a share of it.
        derive_batches: Batches of the search loader each is measured on.
        choose: Which of them is trained: the one of the lowest ``"perturbed"`` loss, as the generator is taught, or of
            the least ``"sharpness"`` (published: but a bad configuration can be flat too).
        settle_norms: Judge a configuration with the norms' statistics of the images that it is judged on; off: with
            the supernet's running ones (released), which average over the widths of all other layers and lag.
        finetune_loader: Loader of the training at the found widths: ``"all"`` (published) or ``"train"``.
        release: As released: the search perturbs first layer, last layer and norms alone, and the fine-tuning
            trains at ``bits`` whatever was found.
    """

    stage: ClassVar[str] = "precision"
    touches: ClassVar[frozenset[str]] = frozenset({"precision", "gradients"})

    bits: int | list[int] | list[tuple[int, int]] = 4
    first_last_bits: int = 8
    inputs: str = "auto"
    normalise: bool | None = None
    quantize_image: bool = False
    clip_start: str = "paper"
    clip_decay: float = 0.0
    round_sums: bool = True
    rho: float = 0.4
    search_rho: float | None = None
    placement: str = "quantized"
    adaptive: str = "no"
    eta: float = 0.01
    perturb: list[str] = field(default_factory=lambda: ["weights", "norm", "bias", "act_clip"])
    norm_updates: str = "both"
    search: bool = False
    choices: list[int] = field(default_factory=lambda: [2, 3, 4, 5])
    share: bool = True
    search_steps: int = 1000
    warmup: float = 0.1
    target_bops: str | float = "4bit"
    bops_weight: float = 1e-4
    bops_unit: str = "relative"
    entropy: float = 5e-3
    policy_lr: float = 5e-4
    policy_decay: float = 5e-4
    baseline: float = 0.0
    controller: str = "lstm"
    draws: int = 1
    near_budget: bool = False
    spread: float = 0.6
    measured_start: bool = False
    candidates: int = 20
    band: float = 0.015
    derive_batches: int = 8
    choose: str = "perturbed"
    settle_norms: bool = True
    finetune_loader: str = "all"
    release: bool = False

    _layout: QatLayout | None = field(default=None, init=False, repr=False, compare=False)
    _float: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _sums: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _found: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False, compare=False)
    _measured: list[list[int]] = field(default_factory=list, init=False, repr=False, compare=False)
    _widths: dict[str, tuple[int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    # -- options ---------------------------------------------------------------------------------
    def prepare(self, model: nn.Module) -> Edit | None:
        """Check options and model; layers are put in place by the first phase, after whatever comes before it.

        Raises:
            RecipeError: A width, choice or target out of range.
            ModelError: Nothing to quantize, or quantized already.
        """
        self._check()
        layout = self._find(model)
        layout.widths(self._body(), self.first_last_bits)
        if self.search:
            parse_target(self._space(layout), self.target_bops)
        return None

    def _check(self) -> None:
        self._ascent("fit")
        self._ascent(SEARCH)
        for bits in (self.first_last_bits, *self.choices):
            check_width(bits, "saq")
        allowed = {
            "clip_start": CLIP_STARTS,
            "bops_unit": UNITS,
            "finetune_loader": ("all", "train"),
            "choose": CHOICES,
            "controller": ("lstm", "table"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise RecipeError(f"saq: {name}={getattr(self, name)!r}; allowed are {', '.join(values)}")
        least = {"search_steps": 1, "draws": 1, "candidates": 1, "derive_batches": 1, "clip_decay": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise RecipeError(f"saq: {name}={getattr(self, name)}; expected {low} or more")
        for name in ("warmup", "baseline", "band"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"saq: {name}={getattr(self, name)}; expected 0 to 1")
        if self.spread <= 0:
            raise RecipeError(f"saq: spread={self.spread}; expected more than 0 bits")
        if self.near_budget and self.draws < 2:
            raise RecipeError(f"saq: near_budget with draws={self.draws}; the generator needs two or more to compare")
        if self.measured_start and not (self.near_budget and self.controller == "table"):
            got = f"near_budget={self.near_budget}, controller={self.controller!r}"
            raise RecipeError(f"saq: measured_start with {got}; expected near_budget=True and controller='table'")
        if len(set(self.choices)) < 2 and self.search:
            raise RecipeError(f"saq: choices={self.choices}; a search needs two widths or more")
        if self.release and not isinstance(self.bits, int):
            raise RecipeError("saq: release=True fine-tunes at one width; give bits as a number")

    def _body(self) -> int | list[Any]:
        return self.bits if isinstance(self.bits, int) else list(self.bits)

    def _find(self, model: nn.Module) -> QatLayout:
        return find_layers(model, inputs=self.inputs, normalise=self.normalise, image_bits=self.quantize_image)

    def _space(self, layout: QatLayout) -> SearchSpace:
        return SearchSpace(layout, tuple(self.choices), self.share, self.first_last_bits)

    def _ascent(self, phase: str) -> Ascent:
        searching = phase in (WARMUP, SEARCH, DERIVE)
        spare: tuple[str, ...] = ()
        if self.release and searching and self._layout is not None:
            spare = tuple(k.name for k in self._layout.layers if k.role in ("body", "shortcut"))
        known = self.placement in tuple(Placement)
        return Ascent(
            rho=self.search_rho if searching and self.search_rho is not None else self.rho,
            adaptive=self.adaptive,
            eta=self.eta,
            placement=Placement(self.placement) if known else self.placement,  # type: ignore[arg-type]
            perturb=tuple(self.perturb),
            norm_updates=self.norm_updates,
            spare=spare,
        )

    # -- structure -------------------------------------------------------------------------------
    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Decide the layers, and after a search their widths."""
        if phase.name == START:
            return {"do": "supernet", "layout": self._find(model).to_json()}
        if phase.name != CLIPS:
            return None
        if not self.search:
            return {"do": "wrap", "layout": self._find(model).to_json(), "bits": self._body()}
        if not self._found:
            raise StateError(f"saq: no configuration was compared; run the phase {DERIVE!r} before {CLIPS!r}")
        best = min(self._found, key=lambda c: c[self.choose])
        bits = self._body() if self.release else best["bits"]
        layout = self._known().to_json()
        return {"do": "rewrap", "layout": layout, "bits": bits, "found": best, "candidates": self._found}

    def finish(self, model: nn.Module) -> Edit:
        """Decide each layer's deployed form."""
        if not qat_layers(model):
            raise StateError(f"saq: no layer is quantized; run the phase {CLIPS!r} before finish")
        forms = final_forms(model)
        return {"do": "finish", "forms": forms, "norms": foldable_norms(model, forms), "sums": self._sums}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Put trainable layers in place (switchable ones for a search), or give them their deployed form."""
        if edit["do"] == "finish":
            return finish_layers(model, edit["forms"], edit["norms"], edit["sums"])
        if "layout" in edit:
            self._layout = QatLayout.from_json(edit["layout"])
        layout = self._known()
        if edit["do"] == "supernet":
            self._float = {k: v.detach().clone() for k, v in model.state_dict().items()}
            space = self._space(layout)
            size, heads = (space.decisions, len(self.choices)), 1 if self.share else 2
            policy = TablePolicy(*size) if self.controller == "table" else Policy(*size, heads=heads)
            self.extra = nn.ModuleDict({"policy": policy})
            return wrap_layers(model, layout, space.layer_choices())
        if edit["do"] == "rewrap":
            self._found = edit["candidates"]
            model = unwrap_layers(model)
            if self._float:  # a saved model brings its own tensors
                model.load_state_dict(self._float)
            self._float, self.extra = {}, None
        self._widths = layout.widths(edit["bits"], self.first_last_bits)
        return wrap_layers(model, layout, {n: [w] for n, w in self._widths.items()})

    def _known(self) -> QatLayout:
        if self._layout is None:
            raise StateError("saq: the layers are not known yet; enter the phases in order")
        return self._layout

    # -- schedule --------------------------------------------------------------------------------
    def phases(self, plan: Plan) -> Plan:
        """Lay the phases before the recipe's own training, which trains at the final widths."""
        clips = Phase(CLIPS, 1, turns=(), work=self._start)
        new = (*self._search_phases(), clips) if self.search else (clips,)
        trains = any(p.name.split(".")[0] == "fit" for p in plan)
        plan = plan.before("fit", *new) if trains else Plan((*plan, *new))
        if trains and self.search:
            plan = plan.swap("fit", lambda p: [self._finetune(p)])
        return Plan((*plan, Phase(SUMS, 1, turns=(), work=self._round_sums))) if self.round_sums else plan

    def _finetune(self, fit: Phase) -> Phase:
        turns = tuple(replace(t, loader=self.finetune_loader) if t.loader == "train" else t for t in fit.turns)
        return replace(fit, turns=turns, fresh=True)

    def _search_phases(self) -> tuple[Phase, ...]:
        warm = round(self.warmup * self.search_steps)
        policy = Turn("policy", ("policy",), self._policy_loss, "search")
        whole = Phase(
            "saq.supernet",
            self.search_steps,
            (Turn(),),
            lr={"policy": self.policy_lr},
            optimizer={"policy": {"opt": "adam", "betas": [0.5, 0.999], "weight_decay": self.policy_decay}},
        )
        search = replace(whole.part(SEARCH, warm, self.search_steps - warm), turns=(Turn(), policy))
        return (
            Phase(START, 1, turns=(), work=self._start),
            whole.part(WARMUP, 0, warm),
            search,
            Phase(DERIVE, self.candidates, turns=(), work=self._derive),
        )

    def groups(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Return the generator as group ``"policy"`` while it exists."""
        return {"policy": list(self._policy().parameters())} if self.extra is not None else {}

    def _policy(self) -> Policy | TablePolicy:
        if self.extra is None:
            raise StateError("saq: the generator does not exist outside of the search's phases")
        policy = self.extra["policy"]
        assert isinstance(policy, Policy | TablePolicy)  # noqa: S101 - made so by apply
        return policy

    def _start(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        init_clips(model, first_batch(loaders, step), self.clip_start)
        if step.phase == START:
            space = self._space(self._known())
            target = parse_target(space, self.target_bops)
            logits = budget_logits(space, target, self.spread) if self.near_budget else None
            if self.measured_start:
                images = self._search_batches(loaders, step)
                row = measured_row(space, target, lambda row: self._loss(model, images, row))
                self._measured, logits = [row], row_logits(space, row, self.spread)
            self._policy().reset(step.generator("saq.policy"), logits)
        return {}

    def _search_batches(self, loaders: Mapping[str, Loader], step: Step) -> list[Batch]:
        steps = (replace(step, phase=DERIVE, index=i, total=self.derive_batches) for i in range(self.derive_batches))
        return [loaders["search"](s) for s in steps]

    def _round_sums(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        self._sums = sum_grids(model, first_batch(loaders, step))
        return {}

    # -- step ------------------------------------------------------------------------------------
    def wrap_grads(self, grads: Grads, evaluate: Evaluate) -> Grads:
        """Return the two-pass form of ``grads``, under widths drawn for the step while the supernet trains."""

        def sharp(model: nn.Module, batch: Batch, step: Step, params: list[nn.Parameter]) -> dict[str, Any]:
            if not qat_layers(model):
                return grads(model, batch, step, params)
            if step.phase in (WARMUP, SEARCH):
                self._draw(model, step)
            return sharp_grads(grads, self._ascent(step.phase))(model, batch, step, params)

        return sharp

    def _draw(self, model: nn.Module, step: Step) -> None:
        space, rng = self._space(self._known()), step.generator("saq.widths")
        free = step.phase == WARMUP and not self.near_budget
        row = uniform_choices(space.decisions, len(space.choices), rng) if free else self._row(space, rng)
        set_widths(model, space.layout, space.widths(row))

    def _row(self, space: SearchSpace, rng: torch.Generator) -> list[int]:
        """Return a row of the generator."""
        if self.near_budget:
            return draw_in_band(self._policy(), space, parse_target(space, self.target_bops), self.band, rng)[0]
        with torch.no_grad():
            return self._policy()(rng).choices

    def _policy_loss(self, model: nn.Module, batch: Batch, step: Step) -> Terms:
        """Return REINFORCE terms; a draw's cost is the loss at the perturbed model and the distance in BOPs."""
        space, policy, rng = self._space(self._known()), self._policy(), step.generator("saq.policy")
        target = parse_target(space, self.target_bops)
        draws = [policy(row=self._row(space, rng)) for _ in range(self.draws)]
        costs = [
            self._judge(model, [batch], d.choices, SEARCH).perturbed
            + cost_term(space.bops(d.choices), target, self.bops_weight, self.bops_unit)
            for d in draws
        ]
        if self.draws > 1:
            terms = contrast(draws, costs, self.entropy)
        else:
            terms = reinforce(policy, draws[0], costs[0], self.entropy, self.baseline)
        return {f"saq.{name}": value for name, value in terms.items()}

    def before_step(self, model: nn.Module, step: Step) -> None:
        """Let the clips decay."""
        decay_clips(model, self.clip_decay)

    def _derive(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        """Draw one configuration within the budget and measure how sharp the supernet is there."""
        space = self._space(self._known())
        target = parse_target(space, self.target_bops)
        given = [*self._measured, *(uniform_rows(space, target, self.band) if self.near_budget else [])]
        if step.index < len(given):
            row, drawn = given[step.index], False
        else:
            row, drawn = draw_in_band(self._policy(), space, target, self.band, step.generator("saq.candidate"))
        found = self._judge(model, self._search_batches(loaders, step), row, DERIVE)
        measured = {"loss": found.loss, "perturbed": found.perturbed, "sharpness": found.rise}
        bits = [list(pair) for pair in space.body(row)]
        self._found = [*self._found, {"bits": bits, "bops": space.bops(row), "drawn": drawn, **measured}]
        return {"bops": float(space.bops(row)), **measured}

    def _judge(self, model: nn.Module, batches: list[Batch], row: list[int], phase: str) -> Sharpness:
        """Return loss and sharpness of the supernet at a row of choices."""
        self._set(model, batches, row)
        return measure_sharpness(model, batches, _task_loss, self._ascent(phase))

    @torch.no_grad()
    def _loss(self, model: nn.Module, batches: list[Batch], row: list[int]) -> float:
        """Return the mean loss of the supernet at a row of choices."""
        self._set(model, batches, row)
        with evaluating(model):
            return sum(float(_task_loss(model, b)) for b in batches) / len(batches)

    def _set(self, model: nn.Module, batches: list[Batch], row: list[int]) -> None:
        space = self._space(self._known())
        set_widths(model, space.layout, space.widths(row))
        if self.settle_norms:
            reestimate_norms(model, (b["image"] for b in batches))

    # -- report and state ------------------------------------------------------------------------
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return widths and forms per layer, and the configurations that were compared."""
        if self._layout is None or not self._widths:
            return {}
        forms = {n: type(model.get_submodule(n)).__name__ for n in self._widths}
        rows = layer_rows(self._layout, self._widths, forms)
        facts: dict[str, Any] = {"BOPs per image": self._layout.bops(self._widths), "rho": self.rho}
        facts |= {f"left in float: {n}": why for n, why in self._layout.skipped.items()}
        tables = [{"title": "Quantized layers", "rows": rows}]
        if self._found:
            shown = [
                {
                    "widths": " ".join(str(w) if w == a else f"{w}x{a}" for w, a in c["bits"]),
                    "MBOPs": round(c["bops"] / 1e6, 3),
                    **{k: round(c[k], 5) for k in ("perturbed", "sharpness", "loss")},
                    "drawn": c["drawn"],
                }
                for c in sorted(self._found, key=lambda c: c[self.choose])
            ]
            facts["configurations compared"] = len(shown)
            if self.release:
                facts["found widths"] = "not used, as released"
            tables.append({"title": "Configurations within the budget, the chosen one first", "rows": shown})
        return {"facts": facts, "tables": tables}

    def state_dict(self) -> dict[str, Any]:
        """Return the generator, the float weights that the final training starts from, and the compared rows."""
        extra = {} if self.extra is None else {"extra": self.extra.state_dict()}
        return {
            **extra,
            "float": dict(self._float),
            "found": list(self._found),
            "measured": list(self._measured),
            "sums": dict(self._sums),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        if self.extra is not None:
            self.extra.load_state_dict(state["extra"])
        self._float, self._found, self._sums = dict(state["float"]), list(state["found"]), dict(state["sums"])
        self._measured = list(state["measured"])


def _task_loss(model: nn.Module, batch: Batch) -> Tensor:
    return Classification().cross_entropy(logits_of(model(batch["image"])), batch["target"])
