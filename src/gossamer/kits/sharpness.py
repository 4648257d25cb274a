"""Sharpness-aware updates for any model: two gradients a step, the second at a worst-case neighbour.

Ordinary SAM (arXiv 2010.01412) and ASAM (arXiv 2102.11600) on float weights, and the three placements of the
perturbation where weights are quantized (arXiv 2111.12273): any module that has a ``weight``, an ``offset``
and a ``quantized_weight()`` (``ops.liq``) counts as quantized, everything else as float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import RecipeError
from gossamer.core.method import Grads
from gossamer.core.schedule import Batch, Step
from gossamer.kits.norm_statistics import norms_frozen
from gossamer.ops.modes import evaluating

__all__ = [
    "ADAPTIVE",
    "KINDS",
    "Ascent",
    "Placement",
    "Sharpness",
    "TakesOffset",
    "displaced",
    "measure_sharpness",
    "sharp_grads",
]

KINDS = ("weights", "norm", "bias", "act_clip", "weight_clip")
"""Kinds of tensors that can be perturbed; ``norm``: scale and shift of normalisation layers."""
ADAPTIVE = ("no", "asam", "released")
"""``asam``: e = T^2 g rho / ||T g||, T = |w| + eta. ``released`` (SAQ's code): e = w^2 g rho / ||T g||."""
_TINY = 1e-12


class Placement(StrEnum):
    """Where quantized weights are perturbed, and by which gradient."""

    MIXED = "mixed"
    """Case 1, ``Q(w) + e(dL/dw)``: clipping zeroes part of the gradient that e is made of."""
    FLOAT = "float"
    """Case 2, ``Q(w + e(dL/dw))``: rounding swallows a small e."""
    QUANTIZED = "quantized"
    """Case 3, ``Q(w) + e(dL/dQ)``: the paper's choice."""


@runtime_checkable
class TakesOffset(Protocol):
    """A layer with a ``weight`` whose quantized values can be displaced.

    The weight is not a member: from Python 3.12 on ``isinstance`` does not see what a module registers.
    """

    offset: Tensor | None

    def quantized_weight(self) -> Tensor:
        """Return the weights as computed with, without the offset."""


@dataclass(frozen=True)
class Ascent:
    """How the worst-case neighbour is found.

    Attributes:
        rho: Euclidean norm of the whole perturbation; 0 switches the second pass off.
        adaptive: One of ``ADAPTIVE``; biases are never scaled.
        eta: Added to magnitudes under ``adaptive``.
        placement: Where quantized weights are perturbed.
        perturb: Which ``KINDS`` are perturbed.
        norm_updates: ``"both"`` or ``"first"``: passes in which batch norms update their running statistics.
        spare: Paths of modules whose own tensors are not perturbed.

    Raises:
        RecipeError: A value out of range.
    """

    rho: float = 0.05
    adaptive: str = "no"
    eta: float = 0.01
    placement: Placement = Placement.QUANTIZED
    perturb: tuple[str, ...] = ("weights", "norm", "bias", "act_clip")
    norm_updates: str = "first"
    spare: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.rho >= 0 or not self.eta >= 0:
            raise RecipeError(f"sharpness: rho={self.rho}, eta={self.eta}; expected 0 or more")
        allowed = {"adaptive": ADAPTIVE, "norm_updates": ("both", "first"), "placement": tuple(Placement)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise RecipeError(f"sharpness: {name}={getattr(self, name)!r}; allowed are {', '.join(values)}")
        unknown = [k for k in self.perturb if k not in KINDS]
        if unknown or not self.perturb:
            raise RecipeError(f"sharpness: perturb={list(self.perturb)}; allowed are {', '.join(KINDS)}, at least one")


@dataclass
class _Spot:
    """One perturbed tensor: the gradient of ``leaf`` says whereto, ``target`` is what moves."""

    leaf: Tensor
    target: Tensor
    magnitude: Callable[[], Tensor] | None


def _kind(module: nn.Module, name: str, value: Tensor) -> str:
    if isinstance(module, TakesOffset) and name in ("weight_clip", "input_clip"):
        return "weight_clip" if name == "weight_clip" else "act_clip"
    if isinstance(module, _BatchNorm) or "norm" in type(module).__name__.lower():
        return "norm"
    return "bias" if name == "bias" or value.ndim < 2 else "weights"


def _spots(model: nn.Module, ascent: Ascent, trained: set[int]) -> list[_Spot]:
    """Return the tensors to perturb, each once; offsets must be there already."""
    found: dict[int, _Spot] = {}
    for path, module in model.named_modules():
        if path in ascent.spare:
            continue
        for name, p in module.named_parameters(recurse=False):
            kind = _kind(module, name, p)
            if kind not in ascent.perturb or id(p) not in trained or id(p) in found:
                continue
            leaf = target = p
            magnitude: Callable[[], Tensor] | None = p.detach if name != "bias" else None
            if kind == "weights" and name == "weight" and isinstance(module, TakesOffset):
                if ascent.placement is not Placement.FLOAT and module.offset is not None:
                    target = module.offset
                if ascent.placement is Placement.QUANTIZED:
                    leaf, magnitude = target, module.quantized_weight
            found[id(p)] = _Spot(leaf, target, magnitude)
    return list(found.values())


@contextmanager
def _offsets(model: nn.Module, ascent: Ascent) -> Iterator[None]:
    """Give quantized layers zero offsets: they change no value; their gradient is that of the quantized weights."""
    layers = [m for m in model.modules() if isinstance(m, TakesOffset)]
    if ascent.placement is Placement.FLOAT:
        layers = []
    for m in layers:
        m.offset = torch.zeros_like(m.get_parameter("weight")).requires_grad_(ascent.placement is Placement.QUANTIZED)
    try:
        yield
    finally:
        for m in layers:
            m.offset = None


@torch.no_grad()
def _ascend(spots: Sequence[_Spot], ascent: Ascent) -> list[tuple[_Spot, Tensor]]:
    """Return every perturbation e = rho T^2 g / ||T g||, T = 1 unless adaptive."""
    held = [(s, s.leaf.grad) for s in spots if s.leaf.grad is not None]
    scaled = []
    for spot, grad in held:
        size = spot.magnitude().abs() if spot.magnitude is not None and ascent.adaptive != "no" else None
        scaled.append((spot, grad, size))
    norms = [torch.linalg.vector_norm(g if size is None else g * (size + ascent.eta)) for _, g, size in scaled]
    if not norms:
        return []
    scale = ascent.rho / (torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])) + _TINY)
    moves = []
    for spot, grad, size in scaled:
        move = grad * scale.to(grad.device)
        if size is not None:
            move = move * (size + (ascent.eta if ascent.adaptive == "asam" else 0.0)).square()
        moves.append((spot, move))
    return moves


@contextmanager
def displaced(moves: Sequence[tuple[_Spot, Tensor]]) -> Iterator[None]:
    """Add the perturbations; on exit every tensor has its old bits again (copies, no subtraction)."""
    kept = [(s.target, s.target.detach().clone()) for s, _ in moves]
    flags = [(s.target, s.target.requires_grad) for s, _ in moves]
    with torch.no_grad():
        for spot, move in moves:
            if not isinstance(spot.target, nn.Parameter):  # an offset: a constant in the second pass
                spot.target.requires_grad_(False)
            spot.target.add_(move)
    try:
        yield
    finally:
        with torch.no_grad():
            for target, old in kept:
                target.copy_(old)
        for target, flag in flags:
            target.requires_grad_(flag)


def two_passes(
    grads: Grads, ascent: Ascent, model: nn.Module, batch: Batch, step: Step, params: list[nn.Parameter]
) -> dict[str, Any]:
    """Fill ``.grad`` of ``params`` by the gradient at the perturbed model; returns the first pass's terms."""
    with _offsets(model, ascent):
        logs = grads(model, batch, step, params)
        moves = _ascend(_spots(model, ascent, {id(p) for p in params}), ascent)
        for p in params:
            p.grad = None
        with displaced(moves), norms_frozen(model, ascent.norm_updates == "first"):
            grads(model, batch, step, params)
    return logs


def sharp_grads(grads: Grads, ascent: Ascent) -> Grads:
    """Wrap a function that fills gradients, for ``Method.wrap_grads`` or a loop of one's own.

    The perturbation is made of the gradient of this process (all its micro batches), as released; the loop
    averages the second gradient. Only parameters handed in are perturbed.
    """
    if ascent.rho == 0:
        return grads

    def sharp(model: nn.Module, batch: Batch, step: Step, params: list[nn.Parameter]) -> dict[str, Any]:
        return two_passes(grads, ascent, model, batch, step, params)

    return sharp


@dataclass(frozen=True)
class Sharpness:
    """Mean loss over the batches, the same at the perturbed model, and their difference."""

    loss: float
    perturbed: float

    @property
    def rise(self) -> float:
        """The measure: how much the loss rises."""
        return self.perturbed - self.loss


def measure_sharpness(
    model: nn.Module, batches: Iterable[Batch], loss: Callable[[nn.Module, Batch], Tensor], ascent: Ascent
) -> Sharpness:
    """Return the sharpness of a model in evaluation mode (arXiv 2111.12273; release, derivation).

    One perturbation from the gradient over all ``batches``, then the loss with it. Gradients, flags, modes and
    every value are as before afterwards.

    Args:
        model: Any model.
        batches: The data; kept, they are gone through twice.
        loss: ``loss(model, batch)``, the mean over the batch.
        ascent: How to perturb; ``rho`` 0 measures the loss alone.
    """
    data = list(batches)
    total = sum(len(b["image"]) for b in data)
    params = list(model.parameters())
    before = [(p, p.grad, p.requires_grad) for p in params]
    for p in params:
        p.grad = None
        p.requires_grad_(True)
    try:
        with evaluating(model), _offsets(model, ascent), torch.enable_grad():
            plain = 0.0
            for b in data:
                value = loss(model, b) * (len(b["image"]) / total)
                value.backward()
                plain += float(value.detach())
            moves = _ascend(_spots(model, ascent, {id(p) for p in params}), ascent)
            with displaced(moves), torch.no_grad():
                high = sum(float(loss(model, b)) * len(b["image"]) / total for b in data) if ascent.rho else plain
    finally:
        for p, grad, flag in before:
            p.grad = grad
            p.requires_grad_(flag)
    return Sharpness(plain, high)
