"""Sharpness-aware minimisation as a training method, and its adaptive form.

Papers: SAM, arXiv 2010.01412; ASAM, arXiv 2102.11600. Written from their formulas. The passes are
``kits.sharpness``; with a quantizing method in the stack ``placement`` says which weights move.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from gossamer.core.method import Edit, Evaluate, Grads, Method
from gossamer.kits.sharpness import Ascent, Placement, sharp_grads

__all__ = ["SAM"]


@dataclass
class SAM(Method):
    """Each step takes the gradient at the worst neighbour within ``rho`` of the weights.

    Attributes:
        rho: Radius; 0 is plain training.
        adaptive: Scale the neighbourhood by the weights' magnitudes (ASAM; wants a ``rho`` about ten times larger).
        eta: Added to the magnitudes (ASAM).
        perturb: What moves, of ``kits.sharpness.KINDS``.
        norm_updates: Batch norms update their statistics in the ``"first"`` pass or in ``"both"``.
        placement: Where weights that another method quantizes are moved (``kits.sharpness.Placement``).
    """

    stage: ClassVar[str] = "training"
    touches: ClassVar[frozenset[str]] = frozenset({"gradients"})

    rho: float = 0.05
    adaptive: bool = False
    eta: float = 0.01
    perturb: list[str] = field(default_factory=lambda: ["weights", "norm", "bias"])
    norm_updates: str = "first"
    placement: str = "quantized"

    def ascent(self) -> Ascent:
        """Return the options as the kit takes them; raises ``RecipeError`` for a value out of range."""
        return Ascent(
            rho=self.rho,
            adaptive="asam" if self.adaptive else "no",
            eta=self.eta,
            placement=Placement(self.placement) if self.placement in tuple(Placement) else self.placement,  # type: ignore[arg-type]
            perturb=tuple(self.perturb),
            norm_updates=self.norm_updates,
        )

    def prepare(self, model: nn.Module) -> Edit | None:
        """Check the options."""
        self.ascent()
        return None

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Change nothing: the method only acts on gradients."""
        return model

    def wrap_grads(self, grads: Grads, evaluate: Evaluate) -> Grads:
        """Return the two-pass form of ``grads``."""
        return sharp_grads(grads, self.ascent())
