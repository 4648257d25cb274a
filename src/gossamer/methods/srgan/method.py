"""SRGAN as a method: a super-resolution network learns from content and from a judge (arXiv 1609.04802).

Written from the paper's equations 2 to 6. Its generator is ``srresnet_x4`` (the method takes any super-resolution
network), its discriminator ``models.super_resolution.Judge``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ModelError, PlanError, RecipeError
from gossamer.core.method import Edit, Method
from gossamer.core.schedule import Batch, Phase, Plan, Step, Terms
from gossamer.kits.adversarial import drawn_with, with_judge
from gossamer.kits.perceptual import PerceptualNetwork, load_perceptual
from gossamer.models.super_resolution import Judge
from gossamer.ops.adversarial import fooling_loss, judging_loss
from gossamer.tasks.super_resolution import scale_of

__all__ = ["SRGAN"]

CONTENTS = ("pixels", "features", "task")
_BETAS = (0.9, 0.999)
_HOW = "give VGG-19 as 'vgg19@vgg19.safetensors' (timm's or torchvision's ImageNet weights), or set content: pixels"
_RANGE = 2.0
"""Pictures count as in [-1, 1]: twice the range of [0, 1]."""


@dataclass
class SRGAN(Method):
    """Each step the judge moves, then the network: content loss + ``adversarial`` x (- log judge).

    Attributes:
        adversarial: Weight of the adversarial term (published: 1e-3).
        content: ``"features"`` (published as SRGAN-VGG54: squared error of a network's features), ``"pixels"``
            (SRGAN-MSE: squared error of pictures in [-1, 1]) or ``"task"`` (the recipe's own loss as it is).
        content_weight: Weight of the content term (published for features: 0.006).
        perceptual: Feature network with weights for ``"features"`` (``vgg19@vgg19.safetensors``).
        layer: Module path of its features (published: relu5_4 of VGG-19).
        width: Channels of the judge's first layer.
        judge_lr: Learning rate of the judge; ``None``: as the recipe's.
        seed: Seed of the judge's weights.
    """

    stage: ClassVar[str] = "training"
    touches: ClassVar[frozenset[str]] = frozenset({"loss", "adversary"})

    adversarial: float = 1e-3
    content: str = "pixels"
    content_weight: float = 1.0
    perceptual: Any = None
    layer: str = "features.35"
    width: int = 64
    judge_lr: float | None = None
    seed: int = 0
    extra: nn.ModuleDict | None = field(default=None, init=False, repr=False, compare=False)
    _features: PerceptualNetwork | None = field(default=None, init=False, repr=False, compare=False)

    def prepare(self, model: nn.Module) -> Edit:
        """Check options and model.

        Raises:
            RecipeError: An option out of range, or features without a network that has weights.
            ModelError: The model says that it is for something else.
        """
        if self.content not in CONTENTS or self.adversarial < 0 or self.content_weight < 0 or self.width < 1:
            raise RecipeError(
                f"srgan: content={self.content!r}, adversarial={self.adversarial}, width={self.width}, "
                f"content_weight={self.content_weight}; allowed are {', '.join(CONTENTS)}, 0, 1 and 0 or more"
            )
        says = hasattr(model, "gossamer_source") or hasattr(model, "pretrained_cfg")
        if says and scale_of(model) is None:
            raise ModelError(f"srgan: {type(model).__name__} is for something else; expected super-resolution")
        return {"judge": self.width}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Make the judge."""
        with drawn_with(self.seed):
            self.extra = nn.ModuleDict({"judge": Judge(edit["judge"])})
        if self.content == "features":
            self._features = load_perceptual(self.perceptual, [self.layer], normalise=True, who="srgan", how=_HOW)
        return model

    @property
    def judge(self) -> nn.Module:
        """The discriminator."""
        if self.extra is None:
            raise PlanError("srgan: no judge yet; call stack.prepare(model) first")
        return self.extra["judge"]

    def phases(self, plan: Plan) -> Plan:
        """Let the judge move before each step of the recipe's own training."""

        def duel(phase: Phase) -> list[Phase]:
            return [with_judge(phase, self._judge_loss, first=True, partners=False, betas=_BETAS, lr=self.judge_lr)]

        return plan.swap("fit", duel) if self.adversarial else plan

    def groups(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Return the judge's parameters."""
        return {"judge": list(self.judge.parameters())}

    def _judge_loss(self, model: nn.Module, batch: Batch, step: Step) -> Terms:
        with torch.no_grad():
            made = model(batch["image"])
        real = judging_loss(self.judge(batch["target"]), real=True, kind="vanilla")
        return {"srgan.judge": real + judging_loss(self.judge(made), real=False, kind="vanilla")}

    def loss(self, model: nn.Module, batch: Batch, out: Tensor, step: Step) -> Terms:
        """Return the content term as ``"task"`` and the adversarial one, in the recipe's own training."""
        if step.phase.partition(".")[0] != "fit":
            return {}
        terms = {} if self.content == "task" else {"task": self.content_weight * self._content(out, batch["target"])}
        if self.adversarial:
            terms["srgan.adversarial"] = self.adversarial * fooling_loss(self.judge(out), "vanilla")
        return terms

    def _content(self, out: Tensor, target: Tensor) -> Tensor:
        if self.content == "pixels":
            return F.mse_loss(_RANGE * out.float(), _RANGE * target)
        if self._features is None:
            raise PlanError("srgan: no feature network yet; call stack.prepare(model) first")
        self._features.to(out.device)
        (ours,) = self._features(_RANGE * out - 1)
        with torch.no_grad():
            (goal,) = self._features(_RANGE * target - 1)
        return F.mse_loss(ours.float(), goal.float())

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return what the loss was made of."""
        return {"facts": {"content": self.content, "adversarial weight": self.adversarial}}
