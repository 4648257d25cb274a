"""The adaptive learning rate and the annealed exponent (arXiv 1912.13200 section 3.3, 2105.14202)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.errors import RecipeError
from gossamer.ops.adder_layers import AdderConv2d, AdderLinear

__all__ = ["SHAPES", "AdaptiveLRScaler", "PNormSchedule", "adder_layers", "scale_gradient"]

SHAPES = ("linear", "cosine")
_TINY = 1e-12


def adder_layers(model: nn.Module) -> dict[str, AdderConv2d | AdderLinear]:
    """Return the trainable adder layers of a model by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdderConv2d | AdderLinear)}


def scale_gradient(grad: Tensor, eta: float) -> Tensor:
    """Return ``grad * eta sqrt(k) / max(||grad||_2, 1e-12)`` with k elements (eq. 13): its root mean square is eta.

    Whatever the scale of the loss was: apply it to complete gradients (averaged, accumulated, unscaled), once a step.
    """
    return grad * (eta * math.sqrt(grad.numel()) / grad.norm().clamp_min(_TINY))


class AdaptiveLRScaler:
    """The adaptive learning rate in a loop of one's own: scales the gradients of adder filters before every step.

    With a ``GradScaler`` nothing else is needed (it unscales first); clip gradients before the optimiser steps.

    Args:
        model: Model with adder layers, or the layers.
        optimizer: Optimiser that holds their filters.
        eta: Root mean square of every scaled gradient.
    """

    def __init__(
        self, model: nn.Module | Iterable[nn.Module], optimizer: torch.optim.Optimizer, eta: float = 0.2
    ) -> None:
        self.eta = eta
        layers = adder_layers(model).values() if isinstance(model, nn.Module) else model
        self.weights = [layer.get_parameter("weight") for layer in layers]
        self._handle = optimizer.register_step_pre_hook(lambda *_: self.scale())

    def scale(self) -> None:
        """Scale what gradients there are; the optimiser calls it."""
        for weight in self.weights:
            if weight.grad is not None:
                weight.grad = scale_gradient(weight.grad, self.eta)

    def remove(self) -> None:
        """Let the optimiser go."""
        self._handle.remove()


@dataclass(frozen=True)
class PNormSchedule:
    """The exponent over a training: from ``start`` to ``end`` until a share of the steps is done, then ``end``.

    Attributes:
        start: First exponent, 1..2.
        end: Last exponent, 1..2 (inference is always at 1).
        until: Share of the steps after which ``end`` is reached, in (0, 1].
        shape: ``"linear"`` or ``"cosine"`` (flat at both ends).
    """

    start: float = 2.0
    end: float = 1.0
    until: float = 0.75
    shape: str = "linear"

    def __post_init__(self) -> None:
        if not (1 <= self.end <= self.start <= 2 and 0 < self.until <= 1):
            raise RecipeError(
                f"l_p schedule: from {self.start} to {self.end} until {self.until}; allowed are exponents 2 >= start "
                f">= end >= 1 and a share above 0, at most 1"
            )
        if self.shape not in SHAPES:
            raise RecipeError(f"l_p schedule: shape={self.shape!r}; allowed are {', '.join(SHAPES)}")

    def __call__(self, done: float) -> float:
        """Return the exponent when the share ``done`` of the steps is done."""
        share = min(1.0, done / self.until)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share
