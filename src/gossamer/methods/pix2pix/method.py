"""pix2pix as a method: a generator learns pairs of pictures from their error and from a conditional judge.

Paper: arXiv 1611.07004 (CVPR 2017), written from its equations 1 to 4 and section 6.1. Noise is the generator's own
dropout in training; at inference it is off (the paper leaves it on).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.errors import PlanError
from gossamer.core.method import Edit, Method
from gossamer.core.schedule import Batch, Phase, Plan, Step, Terms
from gossamer.kits.adversarial import JudgeOptions, PairedGame, drawn_with, frozen, picture_channels, with_judge

__all__ = ["Pix2Pix"]


@dataclass
class Pix2Pix(Method):
    """Each step the judge moves, then the generator: ``lambda_gan * adversarial + lambda_recon * L1``.

    Attributes:
        gan: ``"vanilla"`` (paper), ``"lsgan"`` or ``"hinge"``.
        lambda_gan: Weight of the adversarial term; 0 leaves the pixel error alone.
        lambda_recon: Weight of the mean absolute error.
        ndf: Channels of the judge's first layer.
        layers: Stride-2 convolutions of the judge; 3 sees 70 pixels, small pictures need fewer.
        norm: Norm of the judge, ``"batch"`` (paper) or ``"instance"``.
        betas: Betas of Adam for generator and judge.
        judge_lr: Learning rate of the judge; ``None``: as the generator's.
        channels: Channels in and out, for a generator that does not say.
        seed: Seed of the judge's weights.
    """

    stage: ClassVar[str] = "training"
    touches: ClassVar[frozenset[str]] = frozenset({"loss", "adversary"})

    gan: str = "vanilla"
    lambda_gan: float = 1.0
    lambda_recon: float = 100.0
    ndf: int = 64
    layers: int = 3
    norm: str = "batch"
    betas: tuple[float, float] = (0.5, 0.999)
    judge_lr: float | None = None
    channels: tuple[int, int] | None = None
    seed: int = 0
    extra: nn.ModuleDict | None = field(default=None, init=False, repr=False, compare=False)

    def prepare(self, model: nn.Module) -> Edit:
        """Decide what the judge sees.

        Raises:
            ModelError: The model does not say its pictures' channels.
            RecipeError: An option is out of range.
        """
        given, made = picture_channels(model, self.channels, "pix2pix")
        return {"judge": given + made}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Make the judge."""
        options = JudgeOptions(self.gan, self.ndf, self.layers, self.norm, self.lambda_gan)
        with drawn_with(self.seed):
            game = PairedGame(options.make(edit["judge"]), options, self.lambda_recon)
        self.extra = nn.ModuleDict({"game": game})
        return model

    @property
    def game(self) -> PairedGame:
        """The judge and the losses."""
        if self.extra is None:
            raise PlanError("pix2pix: no judge yet; call stack.prepare(model) first")
        return self.extra["game"]  # type: ignore[return-value]

    def phases(self, plan: Plan) -> Plan:
        """Let the judge move before each step of the recipe's own training."""

        def duel(phase: Phase) -> list[Phase]:
            return [with_judge(phase, self._judge, first=True, partners=False, betas=self.betas, lr=self.judge_lr)]

        return plan.swap("fit", duel) if self.lambda_gan else plan

    def groups(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Return the judge's parameters."""
        return {"judge": self.game.judges()}

    def _judge(self, model: nn.Module, batch: Batch, step: Step) -> Terms:
        with torch.no_grad(), frozen(model):
            picture = model(batch["image"])
        return self.game.judge_terms([picture], batch, step)

    def loss(self, model: nn.Module, batch: Batch, out: Tensor, step: Step) -> Terms:
        """Return the weighted pixel error as ``"task"``, and ``"gan"``, in the recipe's own training."""
        if step.phase.partition(".")[0] != "fit":
            return {}
        terms = self.game.generator_terms(model, batch, out, step)
        return {"task": terms.pop("recon"), **terms}

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return the judge's margin."""
        return {"facts": {"gan": self.gan, "judge_margin": float(self.game.margin)}} if self.extra is not None else {}
