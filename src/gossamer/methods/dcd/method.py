"""DCD as a method: a narrow generator learns from a wide one as the wide one's own discriminator sees both.

Paper: arXiv 2212.14169 (CVPR 2023). Reference code: poopit/DCD-official at 3dbc87b1 (no licence; parts CC BY-NC-SA; not
used). The release omits the student's adversarial term and does not run to its first checkpoint; what it does and what
the abstract claims are merged here (see the card).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import PlanError
from gossamer.core.method import Edit, Method
from gossamer.core.schedule import Batch, Loader, Phase, Plan, Step, Terms, Turn, Window
from gossamer.kits.adversarial import Game, JudgeOptions, Notes, adam, drawn_with, frozen, picture_channels
from gossamer.kits.perceptual import HOW, PerceptualNetwork, load_perceptual
from gossamer.kits.teacher import SELF, FeatureTap
from gossamer.methods.dcd import maths
from gossamer.methods.dcd.networks import Best, Tap, connector, find_taps, make_game, narrowed, widened
from gossamer.methods.dcd.options import Released, check_options, released
from gossamer.models.build import load_model
from gossamer.models.generators import Generator
from gossamer.models.preprocessing import preprocessing
from gossamer.ops.distances import frechet_distance, moments
from gossamer.ops.modes import evaluating
from gossamer.tasks.features import load_extractor
from gossamer.tasks.image_translation import to_unit

__all__ = ["DCD"]

STUDENT = "dcd.student"
"""Stream of the student's own phases."""
LEARNING = ("fit", "dcd")
"""Phases in which the student learns from the teacher begin so."""


@dataclass
class DCD(Method):
    """Distil a generator through the discriminator that its teacher is trained with, in the same run.

    Student: ``lambda_style * style + lambda_feature * feature + lambda_gan * adversarial + lambda_dcd * features``.

    Attributes:
        teacher: ``"self"`` (the model before it is narrowed), a model, or a model spec with weights.
        width: Channels (ngf) that the model is narrowed to; ``None``: the model is the student as it is.
        teacher_width: Channels of the teacher, drawn anew; ``None``: as it is.
        features: ``"dcd"`` (discriminator features of connector images), ``"images"`` (the images themselves),
            ``"raw"`` (squared error after 1x1 adaptors: plain feature distillation) or ``"none"``.
        taps: Features to compare, by number among the generator's own, or as pairs of module paths (student,
            teacher); default all of its own.
        judge_tap: Which activation of the discriminator is compared, by number; -1 feeds its scores.
        connector: ``"conv_bn_relu"`` or ``"conv"``.
        train_teacher_connectors: Train the teacher's connectors too (pix2pix release; may collapse), else they stay
            random.
        lambda_dcd: Weight of the feature term, whatever ``features`` says.
        lambda_style: Weight of the Gram matrices.
        lambda_feature: Weight of the perceptual features.
        lambda_gan: Weight of the student's adversarial term; 0 as in the release.
        lambda_task: Weight of the task's own pixel error, for pairs; 0 as published.
        perceptual: Network of style and feature, such as ``vgg16@weights.safetensors``.
        perceptual_paths: Its modules; default as ``kits.perceptual.load_perceptual``.
        perceptual_norm: Bring pictures to its own normalisation (the release leaves them in [0, 1]).
        paired: Whether pictures come in pairs: the teacher plays pix2pix, else CycleGAN.
        gan: Adversarial loss; default as released (``hinge`` with pairs, ``lsgan`` without).
        ndf: Channels of the discriminators; default as released (128, 64).
        layers: Stride-2 convolutions of the discriminators; small pictures need fewer than 3.
        norm: Norm of the discriminators.
        judge_weights: Weights of the discriminator (ablation: it starts trained); default from scratch.
        d_fakes: Whose pictures the discriminator learns to refuse: ``"both"``, ``"teacher"`` or ``"student"``.
        online: Train teacher and discriminator in this run; else both stay as given.
        lambda_recon: Weight of the teacher's pixel error, for pairs.
        lambda_cycle: Weights of the teacher's cycles, without pairs.
        lambda_identity: Weight of its identity terms, relative to the cycles'.
        pool: Pictures of each image pool, without pairs.
        schedule: ``"joint"`` (all move in each step) or ``"progressive"`` (teacher for a while, then the student
            against the best teacher so far); default as released (joint with pairs).
        every: Joint: teacher and discriminator move every so many steps (n_dis).
        cycles: Progressive: times that teacher and student alternate.
        student_ratio: Progressive: steps of the student for each of the teacher (n_dis).
        select: Progressive: feature network that picks the best teacher by its Frechet distance (spec or module);
            ``None``: the student always learns from the latest.
        select_images: Pictures that are compared for it.
        betas: Betas of Adam for all networks.
        channels: Channels in and out, for a generator that does not say.
        seed: Seed of all fresh weights.
    """

    stage: ClassVar[str] = "structure"
    touches: ClassVar[frozenset[str]] = frozenset({"structure", "weights", "loss", "adversary"})

    teacher: str | nn.Module = SELF
    width: int | None = None
    teacher_width: int | None = None
    features: str = "dcd"
    taps: list[int] | list[tuple[str, str]] | None = None
    judge_tap: int = -1
    connector: str = "conv_bn_relu"
    train_teacher_connectors: bool = False
    lambda_dcd: float = 1.0
    lambda_style: float = 1e4
    lambda_feature: float = 1e1
    lambda_gan: float = 1.0
    lambda_task: float = 0.0
    perceptual: str | nn.Module | None = None
    perceptual_paths: list[str] | None = None
    perceptual_norm: bool = False
    paired: bool = True
    gan: str | None = None
    ndf: int | None = None
    layers: int = 3
    norm: str = "instance"
    judge_weights: str | None = None
    d_fakes: str = "both"
    online: bool = True
    lambda_recon: float = 100.0
    lambda_cycle: tuple[float, float] = (10.0, 10.0)
    lambda_identity: float = 0.5
    pool: int = 50
    schedule: str | None = None
    every: int = 1
    cycles: int = 20
    student_ratio: float = 4.0
    select: str | nn.Module | None = None
    select_images: int = 256
    betas: tuple[float, float] = (0.5, 0.999)
    channels: tuple[int, int] | None = None
    seed: int = 0
    extra: nn.ModuleDict | None = field(default=None, init=False, repr=False, compare=False)
    _dense: nn.Module | None = field(default=None, init=False, repr=False, compare=False)
    _seer: PerceptualNetwork | None = field(default=None, init=False, repr=False, compare=False)
    _judge_of: nn.Module | None = field(default=None, init=False, repr=False, compare=False)
    _facts: Edit = field(default_factory=dict, init=False, repr=False, compare=False)
    _active: str = field(default="", init=False, repr=False, compare=False)
    _tap: FeatureTap | None = field(default=None, init=False, repr=False, compare=False)
    _notes: Notes[tuple[Tensor, list[Tensor]]] = field(default_factory=Notes, init=False, repr=False, compare=False)

    # -- who is who ------------------------------------------------------------------------------
    def bind(self, dense: nn.Module) -> None:
        """Take ``dense`` as what the teacher starts from (pretraining hands it over a second time)."""
        self._dense = dense
        if self.extra is not None and self.teacher_width is None:
            self.extra["teacher"].load_state_dict(dense.state_dict())

    @property
    def _chosen(self) -> Released:
        usual = released(self.paired)
        return Released(self.gan or usual.gan, self.ndf or usual.ndf, self.schedule or usual.schedule)

    def _origin(self) -> nn.Module:
        """Return the network that the teacher is a copy of."""
        if self.teacher != SELF and self._dense is None:
            self._dense = self.teacher if isinstance(self.teacher, nn.Module) else load_model(str(self.teacher))
        if self._dense is None:
            raise PlanError(
                "dcd: no teacher yet; call stack.prepare(model), or bind_self(stack, model) before a replay"
            )
        return self._dense

    def prepare(self, model: nn.Module) -> Edit:
        """Decide the student's width and what is compared.

        Raises:
            RecipeError: An option is out of range, or a feature network is missing.
            ModelError: The model is no generator that the options fit.
        """
        check_options(self)
        channels = picture_channels(model, self.channels, "dcd")
        if self._dense is None and self.teacher == SELF:
            self._dense = model
        student, origin = narrowed(model, self.width), self._origin()
        if self.lambda_style or self.lambda_feature:
            self._perceptual()
        if self.select is not None and self._chosen.schedule == "progressive":
            self._selector()
        with drawn_with(self.seed):
            teacher = widened(origin, self.teacher_width)
        found: list[list[Any]] = []
        if self.features != "none":
            layers = self.layers if self.features == "dcd" else None
            found = find_taps(student, teacher, preprocessing(model).size, taps=self.taps, layers=layers)
        return {"width": self.width, "channels": list(channels), "taps": found}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Narrow the model, or tap it for a phase in which it learns."""
        if "tapped" in edit:
            if self._tap is not None:
                self._tap.remove()
            self._tap = FeatureTap(model, edit["tapped"]) if edit["tapped"] else None
            self._active = edit["phase"]
            return model
        self._facts = edit
        if edit["width"] is not None and isinstance(model, Generator):
            if self._dense is model:
                self._dense = widened(model, None)
            with drawn_with(self.seed + 1):
                model.set_width(edit["width"])
        return model

    # -- the networks beside the student -------------------------------------------------------------
    @property
    def _taps(self) -> list[Tap]:
        return [Tap(s, t, (a, b)) for s, t, a, b in self._facts["taps"]]

    def _build(self) -> nn.ModuleDict:
        if self.extra is None:
            judge = JudgeOptions(self._chosen.gan, self._chosen.ndf, self.layers, self.norm)
            with drawn_with(self.seed + 2):
                teacher = widened(self._origin(), self.teacher_width)
                game = make_game(teacher, self._facts["channels"], judge, self)
                self.extra = nn.ModuleDict({"teacher": teacher, "game": game, **self._connectors(game.judge.in_chans)})
            if self.lambda_style or self.lambda_feature:
                self._perceptual()
            if self.select is not None and self._chosen.schedule == "progressive":
                self.extra["best"] = Best(teacher)
        return self.extra

    def _connectors(self, images: int) -> dict[str, nn.Module]:
        if self.features == "raw":
            return {"connectors": nn.ModuleList(connector(*t.channels, "conv") for t in self._taps)}
        ours, theirs = (
            nn.ModuleList(connector(t.channels[side], images, self.connector) for t in self._taps) for side in (0, 1)
        )
        return {"connectors": ours, "teacher_connectors": theirs.train(self.train_teacher_connectors)}

    @property
    def game(self) -> Game:
        """The teacher's discriminators and losses."""
        return self._build()["game"]  # type: ignore[return-value]

    def _perceptual(self) -> PerceptualNetwork:
        if self._seer is None:
            self._seer = load_perceptual(
                self.perceptual, self.perceptual_paths, normalise=self.perceptual_norm, who="dcd",
                how=f"{HOW}, or set lambda_style and lambda_feature to 0",
            )  # fmt: skip
        return self._seer

    def groups(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of teacher (with the way back), discriminators and connectors."""
        own = self._build()
        trained = ["connectors", *(["teacher_connectors"] if self.train_teacher_connectors else [])]
        found = {
            "judge": self.game.judges(),
            "teacher": [*own["teacher"].parameters(), *self.game.partners()],
            "connectors": [p for name in trained if name in own for p in own[name].parameters()],
        }
        return {name: params for name, params in found.items() if params}

    # -- schedule ----------------------------------------------------------------------------------
    def phases(self, plan: Plan) -> Plan:
        """Let teacher, discriminator and student take turns in the recipe's own training.

        Raises:
            PlanError: Another method has cut that training into parts.
        """
        self._build()
        fits = [p for p in plan if p.name.partition(".")[0] == "fit"]
        if self._chosen.schedule == "progressive" and len(fits) > 1:
            raise PlanError(f"dcd: the training is in {len(fits)} parts already; a progressive schedule cuts it itself")
        return plan.swap("fit", self._joint if self._chosen.schedule == "joint" else self._progressive)

    def _duel(self, every: int = 1) -> tuple[Turn, ...]:
        if not self.online:
            return ()
        judge = Turn("judge", ("judge",), self._judge_turn, every=every)
        teacher = Turn("teacher", ("teacher",), self._teacher_turn, every=every)
        return (judge, teacher) if self.paired else (teacher, judge)

    def _learning(self, phase: Phase) -> tuple[Turn, ...]:
        """Return the student's turns, with the connectors."""
        if not self._facts["taps"]:
            return phase.turns
        return tuple(replace(t, trains=(*t.trains, "connectors")) if "weights" in t.trains else t for t in phase.turns)

    def _rates(self, turns: tuple[Turn, ...]) -> dict[str, dict[str, Any]]:
        return adam(self.betas, *dict.fromkeys(g for t in turns for g in t.trains))

    def _joint(self, phase: Phase) -> list[Phase]:
        turns = (*self._duel(self.every), *self._learning(phase))
        return [replace(phase, turns=turns, optimizer={**self._rates(turns), **(phase.optimizer or {})})]

    def _progressive(self, phase: Phase) -> list[Phase]:
        """Return ``cycles`` times: teacher, selection, student; rates and data run on through each one's phases."""
        whole = round(phase.steps * self.student_ratio)
        duel, learning = self._duel(), self._learning(phase)
        found: list[Phase] = []
        for k in range(self.cycles):
            a, b = (round(n * phase.steps / self.cycles) for n in (k, k + 1))
            s, e = (round(n * whole / self.cycles) for n in (k, k + 1))
            if duel:
                part = phase.part(f"dcd.teacher.{k}", a, b - a)
                found.append(replace(part, turns=duel, optimizer=self._rates(duel)))
            if "best" in self._build():
                found.append(Phase(f"dcd.select.{k}", 1, work=self._select))
            student = replace(phase, name=f"{STUDENT}.{k}", steps=e - s, window=Window(STUDENT, s, whole))
            found.append(replace(student, turns=learning, optimizer=self._rates(learning)))
        return found

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Tap the student in the phases in which it learns from the teacher."""
        learns = phase.work is None and phase.whole.partition(".")[0] in LEARNING
        if not learns or not any("weights" in t.trains and t.objective is None for t in phase.turns):
            return None
        return {"tapped": [t.student for t in self._taps], "phase": phase.name}

    def leave(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Take the taps off."""
        return {"tapped": [], "phase": ""} if self._active else None

    def finish(self, model: nn.Module) -> None:
        """Check that the student has had its phases; the saving is physical already.

        Raises:
            PlanError: It has not.
        """
        if self.extra is None:
            raise PlanError("dcd: the student has not learned yet; run the phases of stack.phases(plan) before finish")

    # -- the teacher's moves -------------------------------------------------------------------------
    def _teacher_turn(self, model: nn.Module, batch: Batch, step: Step) -> Terms:
        teacher = self._build()["teacher"]
        with FeatureTap(teacher, [t.teacher for t in self._taps], training_only=False) as tap:
            out = teacher(batch["image"])
            features = [f.detach() for f in tap.read().values()]
        self._notes.keep(batch, step, (out.detach(), features))
        return self.game.generator_terms(teacher, batch, out, step)

    def _judge_turn(self, model: nn.Module, batch: Batch, step: Step) -> Terms:
        pictures, teacher = [], self._build()["teacher"]
        with torch.no_grad(), frozen(teacher, model):
            if self.d_fakes != "student":
                made = self.game.noted("second", batch, step)  # by the teacher's own move, where that comes first
                pictures.append(teacher(batch["image"]) if made is None else made)
            if self.d_fakes != "teacher":
                pictures.append(model(batch["image"]))
        return self.game.judge_terms(pictures, batch, step)

    @torch.no_grad()
    def _select(self, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        """Offer the teacher as the best one, by the Frechet distance of its pictures to real ones."""
        own = self._build()
        see = self._selector().to(next(own["teacher"].parameters()).device)
        made: list[Tensor] = []
        real: list[Tensor] = []
        n = 0
        while sum(len(m) for m in made) < self.select_images:
            batch = loaders["search"](replace(step, phase="dcd.select", index=n))
            with evaluating(own["teacher"]):
                made.append(see(to_unit(own["teacher"](batch["image"]))).float())
            real.append(see(to_unit(batch["target"])).float())
            n += 1
        score = frechet_distance(moments(torch.cat(made)), moments(torch.cat(real)))
        own["best"].offer(own["teacher"], score)  # type: ignore[operator]
        return {"teacher_score": score, "best_score": float(own["best"].score)}  # type: ignore[arg-type]

    def _selector(self) -> nn.Module:
        if self._judge_of is None:
            self._judge_of = self.select if isinstance(self.select, nn.Module) else load_extractor(self.select)
        return self._judge_of

    # -- the student's move --------------------------------------------------------------------------
    def _taught(self, batch: Batch, step: Step) -> tuple[Tensor, list[Tensor]]:
        """Return the teacher's pictures and features of a batch, detached."""
        known = self._notes.find(batch, step)
        if known is not None:
            return known
        own = self._build()
        guide = own["best"].teacher if "best" in own else own["teacher"]
        paths = [t.teacher for t in self._taps]
        with torch.no_grad(), frozen(guide), FeatureTap(guide, paths, training_only=False) as tap:  # type: ignore[arg-type]
            picture = guide(batch["image"])  # type: ignore[operator]
            return picture, list(tap.read().values())

    def loss(self, model: nn.Module, batch: Batch, out: Tensor, step: Step) -> Terms:
        """Return the weighted terms of the student's objective in the turns in which it learns.

        Terms: ``style``, ``feature``, ``gan``, ``dcd`` (whatever ``features`` says), and for pairs ``task``, the
        pixel error under ``lambda_task``. Terms of weight 0 are neither computed nor returned.
        """
        if step.phase.partition(".")[0] not in LEARNING:
            return {}
        seen = self._seen(model, batch, step)
        picture, features = self._taught(batch, step)
        terms: Terms = {}
        if self.lambda_style or self.lambda_feature:
            style, content = self._perceptual().terms(out, picture)
            terms |= {"style": self.lambda_style * style} if self.lambda_style else {}
            terms |= {"feature": self.lambda_feature * content} if self.lambda_feature else {}
        if self.lambda_gan:
            terms["gan"] = self.lambda_gan * self.game.fooling(batch["image"], out)
        if seen and self.lambda_dcd:
            terms["dcd"] = self.lambda_dcd * self._feature_term(seen, features)
        if self.paired:
            pixels = F.l1_loss(out.float(), batch["target"].float()) if self.lambda_task else out.new_zeros(())
            terms["task"] = self.lambda_task * pixels
        return terms

    def _seen(self, model: nn.Module, batch: Batch, step: Step) -> list[Tensor]:
        """Return the student's features: of the pass just made, or of one more where the phase was not entered."""
        if self._active == step.phase:
            return list(self._tap.read().values()) if self._tap is not None else []
        paths = [t.student for t in self._taps]
        if not paths or not self.lambda_dcd:
            return []
        with FeatureTap(model, paths, training_only=False) as tap:
            model(batch["image"])
            return list(tap.read().values())

    def _feature_term(self, seen: list[Tensor], features: list[Tensor]) -> Tensor:
        own, judge = self._build(), self.game.judge
        ours = [c(f) for c, f in zip(own["connectors"], seen, strict=True)]  # type: ignore[call-overload]
        if self.features == "raw":
            return maths.adapted_loss(ours, features)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_teacher_connectors):
            theirs = [c(f) for c, f in zip(own["teacher_connectors"], features, strict=True)]  # type: ignore[call-overload]
        if self.features == "images":
            return maths.cooperation_loss(ours, theirs, lambda x: x)
        with frozen(judge):
            return maths.cooperation_loss(ours, theirs, lambda x: judge.features(x, self.judge_tap))

    def after_step(self, model: nn.Module, step: Step) -> None:
        """Let go of what other turns left in the taps."""
        if self._tap is not None:
            self._tap.clear()

    # -- report ----------------------------------------------------------------------------------------
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return widths, weights and how saturated the discriminator is."""
        if self.extra is None:
            return {}
        teacher = self.extra["teacher"]
        facts = {
            "student width": getattr(model, "width", None),
            "teacher width": getattr(teacher, "width", None),
            "features": self.features,
            "schedule": self._chosen.schedule,
            "discriminator's margin": float(self.game.margin),
        }
        if "best" in self.extra:
            facts["best teacher's distance"] = float(self.extra["best"].score)  # type: ignore[arg-type]
        names = ("lambda_dcd", "lambda_style", "lambda_feature", "lambda_gan", "lambda_task")
        rows = [[n.removeprefix("lambda_"), getattr(self, n)] for n in names]
        return {
            "facts": {k: v for k, v in facts.items() if v is not None},
            "tables": [{"title": "Weights of the student's objective", "columns": ["term", "weight"], "rows": rows}],
        }
