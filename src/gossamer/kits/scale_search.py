"""Alternating search of quantizer steps with a pluggable similarity.

A *problem* holds one layer's calibration data and its current steps; ``search_scales`` walks over
its steps in turn and keeps the candidate of least loss, until a round brings too little
(arXiv 2106.14156 section 3.2). Losses are distances: 1 - Gamma for a similarity Gamma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.core.errors import RecipeError
from gossamer.ops.quant import fake_quantize, spread_rows

__all__ = [
    "METRICS",
    "LinearProblem",
    "Penalty",
    "ProductProblem",
    "ScaleProblem",
    "SearchOptions",
    "SearchResult",
    "Similarity",
    "search_scales",
]

METRICS = ("pearson", "cosine", "mse")
Metric = Literal["pearson", "cosine", "mse"]
LossOf = Callable[[Tensor], float]
Penalty = Callable[[Sequence[Tensor]], float]
"""Weighted extra loss of a problem's outputs (its row groups, or the one product)."""
_COARSE = 4
_TINY = 1e-20


@dataclass(frozen=True)
class SearchOptions:
    """How steps are searched.

    Attributes:
        alpha: Smallest candidate, as a factor of the initial step.
        beta: Largest candidate.
        n_candidates: Number of candidates, linearly spaced; the one nearest 1 is set to 1.
        max_iter: Largest number of alternations.
        early_stop: A round that lowers the loss by less than this share is the last; 0 stops only
            when nothing improves (the paper).
        coarse: Try every fourth candidate, then the neighbours of the best, instead of all.
    """

    alpha: float = 0.5
    beta: float = 1.2
    n_candidates: int = 100
    max_iter: int = 20
    early_stop: float = 0.0
    coarse: bool = False

    def check(self, where: str) -> None:
        """Raise ``RecipeError`` for values that no search can use."""
        if not 0 < self.alpha <= self.beta:
            raise RecipeError(f"{where}: alpha={self.alpha}, beta={self.beta}; expected 0 < alpha <= beta")
        if self.n_candidates < 1 or self.max_iter < 0:
            raise RecipeError(
                f"{where}: n_candidates={self.n_candidates}, max_iter={self.max_iter}; expected >= 1 and >= 0"
            )
        if not 0 <= self.early_stop < 1:
            raise RecipeError(f"{where}: early_stop={self.early_stop}; allowed are 0 <= early_stop < 1")

    def factors(self) -> Tensor:
        """Return the candidate factors [C], ascending."""
        grid = torch.linspace(self.alpha, self.beta, self.n_candidates)
        if self.alpha <= 1 <= self.beta:
            grid[(grid - 1).abs().argmin()] = 1.0
        return grid


@dataclass
class SearchResult:
    """What a search found.

    Attributes:
        losses: Loss at the start and after each accepted alternation (never rising).
        evaluations: Number of candidates tried.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: int = 0


class Similarity:
    """Distance of outputs to fixed targets, averaged over samples (arXiv 2106.14156 eq. 10).

    ``pearson``: 1 - correlation of all elements of one sample, both centred by their own means;
    ``cosine``: the same without centring; ``mse``: squared error over the target's energy. A
    sample whose target is constant counts 0 for an equally constant output and 1 otherwise.
    Computed as half the squared distance of unit vectors, which keeps its digits near zero.

    Args:
        target: [S, ...], one sample per entry of the first axis.
        metric: One of ``METRICS``.
    """

    def __init__(self, target: Tensor, metric: Metric = "pearson") -> None:
        self.metric = metric
        flat = target.reshape(target.shape[0], -1)
        self._unit = flat if metric == "mse" else self._normalised(flat)
        self._energy = self._unit.square().sum(1)

    def _normalised(self, flat: Tensor) -> Tensor:
        if self.metric == "pearson":
            flat = flat - flat.mean(1, keepdim=True)
        return flat / flat.norm(dim=1, keepdim=True).clamp_min(_TINY)

    def losses(self, out: Tensor) -> Tensor:
        """Return the distance of each sample [S]."""
        flat = out.reshape(out.shape[0], -1)
        if self.metric == "mse":
            return (flat - self._unit).square_().sum(1) / self._energy.clamp_min(_TINY)
        gap = self._normalised(flat).sub_(self._unit).square_().sum(1)
        return torch.where(self._energy > 0, gap / 2, (gap > 0).to(gap.dtype))

    def loss(self, out: Tensor) -> float:
        """Return the mean distance."""
        return float(self.losses(out).double().mean())


class ScaleProblem(Protocol):
    """One layer's steps and what they do to its output."""

    initial: dict[str, Tensor]
    scales: dict[str, Tensor]

    def vary(self, name: str) -> LossOf:
        """Return the loss as a function of one step, all others fixed as they are now."""

    def settle(self) -> float:
        """Bring what depends on the steps (the bias) up to date; return the loss."""


class LinearProblem:
    """A linear layer (or a convolution on unfolded patches) in groups of output rows.

    Each group has its own weight step and objective; all share the input step, whose objective
    is the mean of theirs. ``settle`` corrects the bias (eq. 14-16): ``b = mean(O - X^ W^)`` per
    output row, over samples and tokens, which is ``b_float`` minus the mean output error.

    Args:
        x: Deployed inputs [S, R, in].
        target: Outputs to reproduce [S, R, out].
        weight: [out, in].
        bias: [out] or ``None``.
        groups: Number of row groups.
        bits: Width of weights and inputs.
        signed: Whether the input grid is signed.
        initial: Steps to start from: weight steps [groups] or [out], input step [1].
        metric: Similarity.
        correct_bias: Whether ``settle`` corrects the bias.
        penalty: Extra loss of the outputs of all groups; counted for the groups in ``penalised``.
        penalised: Groups the penalty concerns.
    """

    def __init__(  # noqa: PLR0913 - the data of a layer, all by keyword
        self,
        x: Tensor,
        target: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        bits: tuple[int, int],
        initial: tuple[Tensor, Tensor],
        groups: int = 1,
        signed: bool = True,
        metric: Metric = "pearson",
        correct_bias: bool = False,
        penalty: Penalty | None = None,
        penalised: tuple[int, ...] = (0, 1),
    ) -> None:
        self.x, self.bits, self.signed = x, bits, signed
        self.weights = weight.chunk(groups)
        self.targets = target.chunk(groups, -1)
        self._distance = [Similarity(t, metric) for t in self.targets]
        self.correct_bias, self.penalty, self.penalised = correct_bias, penalty, penalised
        per_group = initial[0].chunk(groups)
        self.initial = {f"weight.{g}": s for g, s in enumerate(per_group)} | {"input": initial[1]}
        self.scales = dict(self.initial)
        self.biases: list[Tensor | None] = [None] * groups if bias is None else list(bias.chunk(groups))

    def weight_scale(self) -> Tensor:
        """Return the weight steps of all groups, [groups] or [out]."""
        return torch.cat([self.scales[f"weight.{g}"] for g in range(len(self.weights))])

    def bias(self) -> Tensor | None:
        """Return the bias [out] as it stands."""
        parts = [b for b in self.biases if b is not None]
        return torch.cat(parts) if parts else None

    def _input(self, scale: Tensor) -> Tensor:
        return fake_quantize(self.x, scale, self.bits[1], self.signed)

    def _weight(self, group: int, scale: Tensor | None = None) -> Tensor:
        weight = self.weights[group]
        scale = self.scales[f"weight.{group}"] if scale is None else scale
        return fake_quantize(weight, spread_rows(scale, weight), self.bits[0])

    def outputs(self) -> list[Tensor]:
        """Return each group's output [S, R, out / groups] under the current steps."""
        xq = self._input(self.scales["input"])
        return [F.linear(xq, self._weight(g), self.biases[g]) for g in range(len(self.weights))]

    def _loss(self, outputs: Sequence[Tensor]) -> float:
        loss = sum(d.loss(o) for d, o in zip(self._distance, outputs, strict=True))
        if self.penalty is not None:
            loss += len(self.penalised) * self.penalty(outputs)
        return loss / len(outputs)

    def vary(self, name: str) -> LossOf:
        """Return the loss as a function of ``"input"`` or ``"weight.<group>"``."""
        if name == "input":
            weights = [self._weight(g) for g in range(len(self.weights))]

            def of_input(scale: Tensor) -> float:
                xq = self._input(scale)
                return self._loss([F.linear(xq, w, b) for w, b in zip(weights, self.biases, strict=True)])

            return of_input
        group = int(name.rpartition(".")[2])
        xq = self._input(self.scales["input"])
        penalty = self.penalty if group in self.penalised else None
        others = self.outputs() if penalty is not None else []

        def of_weight(scale: Tensor) -> float:
            out = F.linear(xq, self._weight(group, scale), self.biases[group])
            loss = self._distance[group].loss(out)
            if penalty is not None:
                loss += penalty([*others[:group], out, *others[group + 1 :]])
            return loss

        return of_weight

    def settle(self) -> float:
        """Correct the bias if asked; return the loss."""
        if not self.correct_bias:
            return self._loss(self.outputs())
        xq, outputs = self._input(self.scales["input"]), []
        for g, target in enumerate(self.targets):
            plain = F.linear(xq, self._weight(g))
            bias = (target - plain).double().mean((0, 1)).to(plain.dtype)
            self.biases[g] = bias
            outputs.append(plain + bias)
        return self._loss(outputs)


class ProductProblem:
    """A product of two activations; it has no bias to correct.

    Args:
        a: Deployed left operands [S, ..., M, K].
        b: Deployed right operands [S, ..., K, N].
        target: Products to reproduce [S, ..., M, N].
        bits: Width of each operand.
        initial: Steps to start from, [1] each.
        signed: Signedness of each grid.
        metric: Similarity.
        penalty: Extra loss of the product.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        target: Tensor,
        *,
        bits: tuple[int, int],
        initial: tuple[Tensor, Tensor],
        signed: tuple[bool, bool] = (True, True),
        metric: Metric = "pearson",
        penalty: Penalty | None = None,
    ) -> None:
        self._operands = {"a": a, "b": b}
        self._grid = {"a": (bits[0], signed[0]), "b": (bits[1], signed[1])}
        self.initial = {"a": initial[0], "b": initial[1]}
        self.scales = dict(self.initial)
        self._distance = Similarity(target, metric)
        self.penalty = penalty

    def _quantized(self, name: str, scale: Tensor | None = None) -> Tensor:
        return fake_quantize(self._operands[name], self.scales[name] if scale is None else scale, *self._grid[name])

    def _loss(self, out: Tensor) -> float:
        return self._distance.loss(out) + (self.penalty([out]) if self.penalty is not None else 0.0)

    def outputs(self) -> list[Tensor]:
        """Return the product [S, ..., M, N] under the current steps."""
        return [self._quantized("a") @ self._quantized("b")]

    def vary(self, name: str) -> LossOf:
        """Return the loss as a function of the step of ``"a"`` or ``"b"``."""
        if name == "a":
            right = self._quantized("b")
            return lambda scale: self._loss(self._quantized("a", scale) @ right)
        left = self._quantized("a")
        return lambda scale: self._loss(left @ self._quantized("b", scale))

    def settle(self) -> float:
        """Return the loss."""
        return self._loss(self.outputs()[0])


def _pick(loss_of: LossOf, initial: Tensor, options: SearchOptions) -> tuple[Tensor, int]:
    """Return the best candidate step and the number of candidates tried."""
    factors = options.factors().to(initial.device)
    tried: dict[int, float] = {}

    def visit(indices: Sequence[int]) -> int:
        for i in indices:
            if 0 <= i < len(factors) and i not in tried:
                tried[i] = loss_of(initial * factors[i])
        return min(tried, key=lambda i: tried[i])

    if options.coarse and len(factors) > 2 * _COARSE:
        one = int((factors - 1).abs().argmin())
        best = visit([*range(0, len(factors), _COARSE), len(factors) - 1, one])
        best = visit(range(best - _COARSE + 1, best + _COARSE))
    else:
        best = visit(range(len(factors)))
    return initial * factors[best], len(tried)


@torch.no_grad()
def search_scales(problem: ScaleProblem, options: SearchOptions) -> SearchResult:
    """Search the steps of ``problem`` in turn; it is left in its best state.

    Every candidate is a multiple of the *initial* step, so steps stay in
    ``[alpha, beta] * initial``. A round that does not lower the loss is undone and ends the search.
    """
    result = SearchResult([problem.settle()])
    for _ in range(options.max_iter):
        before = dict(problem.scales)
        for name, initial in problem.initial.items():
            problem.scales[name], count = _pick(problem.vary(name), initial, options)
            result.evaluations += count
        loss, last = problem.settle(), result.losses[-1]
        if loss >= last:
            problem.scales = before
            problem.settle()
            break
        result.losses.append(loss)
        if loss > (1 - options.early_stop) * last:
            break
    return result
