"""CycleGAN as a method: a generator learns to translate between two domains without pairs.

Paper: arXiv 1703.10593 (ICCV 2017), written from its equations 1 to 3 and sections 4 and 5.2. The model is the
generator of the way there; the way back and both judges are the method's own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, PlanError
from gossamer.core.method import Edit, Method
from gossamer.core.schedule import Batch, Phase, Plan, Step, Terms
from gossamer.kits.adversarial import (
    CycleGame,
    CycleOptions,
    JudgeOptions,
    drawn_with,
    frozen,
    picture_channels,
    way_back,
    with_judge,
)

__all__ = ["CycleGAN"]


@dataclass
class CycleGAN(Method):
    """Each step both generators move, then both judges, who see pictures through a pool of earlier ones.

    Attributes:
        gan: ``"lsgan"`` (paper), ``"hinge"`` or ``"vanilla"``.
        lambda_gan: Weight of the adversarial terms.
        lambda_cycle: Weights of the cycles from the first and from the second domain.
        lambda_identity: Weight of the identity terms, relative to the cycles'; 0 leaves them out.
        pool: Pictures of each image pool; 0 shows the latest.
        ndf: Channels of the judges' first layer.
        layers: Stride-2 convolutions of the judges; 3 sees 70 pixels, small pictures need fewer.
        norm: Norm of the judges.
        betas: Betas of Adam for all four networks.
        judge_lr: Learning rate of the judges; ``None``: as the generators'.
        partner: Generator of the way back; default a fresh twin of the model.
        channels: Channels in and out, for a generator that does not say.
        seed: Seed of the method's own networks.
    """

    stage: ClassVar[str] = "training"
    touches: ClassVar[frozenset[str]] = frozenset({"loss", "adversary"})

    gan: str = "lsgan"
    lambda_gan: float = 1.0
    lambda_cycle: tuple[float, float] = (10.0, 10.0)
    lambda_identity: float = 0.5
    pool: int = 50
    ndf: int = 64
    layers: int = 3
    norm: str = "instance"
    betas: tuple[float, float] = (0.5, 0.999)
    judge_lr: float | None = None
    partner: nn.Module | None = None
    channels: tuple[int, int] | None = None
    seed: int = 0
    extra: nn.ModuleDict | None = field(default=None, init=False, repr=False, compare=False)

    def prepare(self, model: nn.Module) -> Edit:
        """Decide what the judges see.

        Raises:
            ModelError: The model does not say its pictures' channels, cannot be turned around, or keeps the
                identity of pictures with other channels.
            RecipeError: An option is out of range.
        """
        given, made = picture_channels(model, self.channels, "cyclegan")
        if self.lambda_identity and given != made:
            raise ModelError(
                f"cyclegan: {given} channels in, {made} out; the identity terms need the same: set lambda_identity=0"
            )
        return {"channels": [given, made]}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Make the way back and both judges."""
        given, made = edit["channels"]
        options = JudgeOptions(self.gan, self.ndf, self.layers, self.norm, self.lambda_gan)
        cycle = CycleOptions(*self.lambda_cycle, self.lambda_identity, self.pool)
        with drawn_with(self.seed):
            partner = way_back(model, "cyclegan") if self.partner is None else copy.deepcopy(self.partner)
            game = CycleGame(options.make(made), options, partner, options.make(given), cycle)
        self.extra = nn.ModuleDict({"game": game})
        return model

    @property
    def game(self) -> CycleGame:
        """The way back, the judges and the losses."""
        if self.extra is None:
            raise PlanError("cyclegan: no judge yet; call stack.prepare(model) first")
        return self.extra["game"]  # type: ignore[return-value]

    def phases(self, plan: Plan) -> Plan:
        """Let the judges move after each step of the recipe's own training."""

        def duel(phase: Phase) -> list[Phase]:
            return [with_judge(phase, self._judge, first=False, partners=True, betas=self.betas, lr=self.judge_lr)]

        return plan.swap("fit", duel)

    def groups(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Return the judges' parameters and those of the way back."""
        return {"judge": self.game.judges(), "partner": self.game.partners()}

    def _judge(self, model: nn.Module, batch: Batch, step: Step) -> Terms:
        picture = self.game.noted("second", batch, step)  # made before this step's update, as in the paper's code
        if picture is None:
            with torch.no_grad(), frozen(model):
                picture = model(batch["image"])
        return self.game.judge_terms([picture], batch, step)

    def loss(self, model: nn.Module, batch: Batch, out: Tensor, step: Step) -> Terms:
        """Return adversarial, cycle and identity terms of both ways, in the recipe's own training."""
        return self.game.generator_terms(model, batch, out, step) if step.phase.partition(".")[0] == "fit" else {}

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return the judge's margin."""
        return {"facts": {"gan": self.gan, "judge_margin": float(self.game.margin)}} if self.extra is not None else {}
