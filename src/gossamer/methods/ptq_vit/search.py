"""Calibration of one unit: targets, inputs, step search, bias (arXiv 2106.14156 section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.kits.calibration import Captured, RowPick, Walk, capture_inputs, capture_outputs, mean_quantized_input
from gossamer.kits.quant_layout import quant_layers
from gossamer.kits.scale_search import (
    LinearProblem,
    Metric,
    Penalty,
    ProductProblem,
    SearchOptions,
    SearchResult,
    Similarity,
    search_scales,
)
from gossamer.methods.ptq_vit.maths import RankingLoss, ScoreView, projection_scores, sample_pairs
from gossamer.ops.quant import QuantConv2d, QuantLinear, QuantMatMul, max_scale

__all__ = ["Objective", "UnitSearch", "activated"]

QuantLayer = QuantLinear | QuantConv2d | QuantMatMul


@dataclass(frozen=True)
class Objective:
    """What the search maximises: similarity minus gamma times the ranking loss.

    Attributes:
        metric: Similarity of outputs.
        gamma: Weight of the ranking loss; 0 leaves it out.
        theta: Margin of the ranking loss.
        on: Which scores it reads.
        reduction: Mean over ordered pairs, or the paper's sum.
        rows: Query rows of a sample it looks at; ``None`` for all that are kept.
        pairs: Key pairs it looks at; ``None`` for all.
    """

    metric: Metric
    gamma: float
    theta: float
    on: str
    reduction: Literal["mean", "sum"]
    rows: int | None
    pairs: int | None


@contextmanager
def activated(layers: Mapping[str, QuantLayer], names: Sequence[str]) -> Iterator[None]:
    """Let exactly the named layers quantize; the former states return on exit."""
    before = {n: m.active for n, m in layers.items()}
    try:
        for n, m in layers.items():
            m.active = n in set(names)
        yield
    finally:
        for n, m in layers.items():
            m.active = before[n]


class UnitSearch:
    """Calibrates the layers of a model, unit by unit in the order of execution.

    Args:
        walk: Calibration images and model.
        attentions: Paths of the attentions.
        objective: What to maximise.
        options: How to search.
        inputs: ``"quantized"``: targets from the float model, inputs from the model quantized so
            far; ``"float"``: inputs from the float model too; ``"local"``: targets recomputed from
            the quantized inputs with float weights (where tokens change places between the two).
        keep: What the search keeps of a layer; biases and extremes see everything.
        correct_bias: Whether biases are corrected.
    """

    def __init__(
        self,
        walk: Walk,
        attentions: Sequence[str],
        objective: Objective,
        options: SearchOptions,
        *,
        inputs: Literal["quantized", "float", "local"] = "quantized",
        keep: RowPick,
        correct_bias: bool = True,
    ) -> None:
        self.walk, self.attentions, self.objective, self.options = walk, set(attentions), objective, options
        self.inputs, self.keep, self.correct_bias, self.key = inputs, keep, correct_bias, keep.key
        self.layers = quant_layers(walk.model)

    # -- a unit ------------------------------------------------------------------------------------
    def run(self, unit: str, names: Sequence[str], done: Sequence[str]) -> list[dict[str, Any]]:
        """Calibrate the layers ``names`` of ``unit`` in order and leave them active with ``done``.

        Returns:
            One record per layer.
        """
        targets: dict[str, Captured] = {}
        if self.inputs != "local":
            self.walk.start_over()
            with activated(self.layers, ()):
                targets = capture_outputs(self.walk, dict.fromkeys(names, self.keep))
        for n, layer in self.layers.items():
            layer.active = n in set(done)
        self.walk.start_at(unit)
        records = []
        for name in names:
            records.append(self._layer(name, targets.pop(name, None)))
            self.layers[name].active = True
        self.walk.start_over()
        return records

    def _seen(self, name: str) -> Captured:
        if self.inputs != "float":
            return capture_inputs(self.walk, name, self.keep)
        self.walk.start_over()
        with activated(self.layers, ()):
            return capture_inputs(self.walk, name, self.keep)

    @torch.no_grad()
    def _layer(self, name: str, target: Captured | None) -> dict[str, Any]:
        layer, seen = self.layers[name], self._seen(name)
        out: Any
        if isinstance(layer, QuantMatMul):
            out = seen.parts[0] @ seen.parts[1] if target is None else target.out
            problem: ProductProblem | LinearProblem = self.product_problem(name, layer, seen, out)
        else:
            out = F.linear(seen.parts[0], layer.weight.flatten(1), layer.float_bias) if target is None else target.out
            problem = self.linear_problem(name, layer, seen, out)
        found = search_scales(problem, self.options)
        self.store(layer, problem)
        if isinstance(problem, LinearProblem) and self.correct_bias and not (seen.complete and self.inputs != "float"):
            self._correct_bias(name, layer, target)
        return self._record(name, layer, problem, found, out, seen)

    # -- problems ------------------------------------------------------------------------------------
    def linear_problem(self, name: str, layer: Any, seen: Captured, out: Tensor) -> LinearProblem:
        """Return the search problem of a weight layer for what was captured."""
        parent = name.rpartition(".")[0]
        fused = parent in self.attentions and name == f"{parent}.qkv"
        weight = layer.weight.flatten(1)
        steps = len(layer.weight_scale)
        top = weight.abs().amax(1).reshape(steps, -1).amax(1)
        x = seen.parts[0]
        penalty = self._projection_penalty(parent, out) if fused and self.objective.gamma else None
        return LinearProblem(
            x.flatten(1, 2), out.flatten(1, 2), weight, layer.float_bias,
            bits=layer.bits, signed=layer.signed, groups=3 if fused else 1, metric=self.objective.metric,
            initial=(max_scale(top, layer.bits[0]), max_scale(seen.top[0], layer.bits[1], layer.signed)),
            correct_bias=self.correct_bias and layer.bias is not None, penalty=penalty,
        )  # fmt: skip

    def product_problem(self, name: str, layer: QuantMatMul, seen: Captured, out: Tensor) -> ProductProblem:
        """Return the search problem of an attention product for what was captured."""
        initial = [max_scale(t, b, s) for t, b, s in zip(seen.top, layer.bits, layer.signed, strict=True)]
        parent, _, leaf = name.rpartition(".")
        penalty = self._score_penalty(parent, out) if leaf == "scores" and self.objective.gamma else None
        return ProductProblem(
            seen.parts[0], seen.parts[1], out, bits=layer.bits, signed=layer.signed,
            initial=(initial[0], initial[1]), metric=self.objective.metric, penalty=penalty,
        )  # fmt: skip

    def ranking(self, target: Tensor) -> RankingLoss:
        """Return the ranking loss against scores [S, ..., M, N] on the sampled pairs."""
        o = self.objective
        return RankingLoss(target, o.theta, o.reduction, sample_pairs(target.shape[-1], o.pairs, self.key))

    def _view(self, attention: nn.Module) -> ScoreView:
        return ScoreView(self.objective.on, float(attention.scale))  # type: ignore[arg-type]

    def _score_penalty(self, attention: str, out: Tensor) -> Penalty:
        view, gamma = self._view(self.walk.model.get_submodule(attention)), self.objective.gamma
        rows = self._rank_rows(out.shape[-2], out.device)
        loss = self.ranking(view(out).index_select(-2, rows))
        return lambda outputs: gamma * float(loss(view(outputs[0].index_select(-2, rows))))

    def _projection_penalty(self, path: str, out: Tensor) -> Penalty:
        attention = self.walk.model.get_submodule(path)
        view, gamma = self._view(attention), self.objective.gamma
        plain: Callable[[Tensor], Tensor] = nn.Identity()
        norms = (getattr(attention, "q_norm", plain), getattr(attention, "k_norm", plain))
        shape = (out.shape[1], out.shape[2])
        rows = self._rank_rows(shape[1], out.device)

        def scores(outputs: Sequence[Tensor]) -> Tensor:
            q = outputs[0].reshape(len(outputs[0]), *shape, -1)
            few = q.index_select(2, rows)
            k = outputs[1].reshape(len(outputs[1]), *shape, -1)
            return view(projection_scores((few, k), int(attention.num_heads), float(attention.scale), norms))  # type: ignore[arg-type]

        loss = self.ranking(scores(out.chunk(3, -1)))
        return lambda outputs: gamma * float(loss(scores(outputs)))

    def _rank_rows(self, count: int, device: torch.device) -> Tensor:
        keep = count if self.objective.rows is None else min(count, self.objective.rows)
        draw = torch.randperm(count, generator=torch.Generator().manual_seed(self.key + 1))
        return draw[:keep].sort().values.to(device)

    # -- results ---------------------------------------------------------------------------------------
    def store(self, layer: QuantLayer, problem: LinearProblem | ProductProblem) -> None:
        """Write a problem's steps (and bias) into its layer."""
        if isinstance(layer, QuantMatMul):
            layer.a_scale.copy_(problem.scales["a"])
            layer.b_scale.copy_(problem.scales["b"])
            return
        assert isinstance(problem, LinearProblem)  # noqa: S101 - weight layers have linear problems
        layer.weight_scale.copy_(problem.weight_scale())
        layer.input_scale.copy_(problem.scales["input"])
        bias = problem.bias()
        if self.correct_bias and layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)

    def _correct_bias(self, name: str, layer: Any, target: Captured | None) -> None:
        """Set the bias from the means of everything that passes, on the inputs as deployed."""
        if layer.bias is None:
            return
        if self.inputs == "float":
            self.walk.start_over()
        plain, grid = mean_quantized_input(self.walk, name)
        weight, quantized = layer.weight.flatten(1).double(), layer.quantized_weight().flatten(1).double()
        mean = target.mean if target is not None else weight @ plain + layer.float_bias.double()
        layer.bias.copy_(mean - quantized @ grid)

    def _record(
        self, name: str, layer: Any, problem: LinearProblem | ProductProblem, found: SearchResult, out: Tensor,
        seen: Captured,
    ) -> dict[str, Any]:  # fmt: skip
        got = torch.cat([o.reshape(*out.shape[:-1], -1) for o in problem.outputs()], -1)
        spread = seen.parts[0].square().mean().sqrt().clamp_min(1e-20)
        record: dict[str, Any] = {
            "layer": name,
            "bits": list(layer.bits),
            "gamma": 1 - Similarity(out, "pearson").loss(got),
            "error": Similarity(out, "mse").loss(got),
            "tau": None,
            "rounds": len(found.losses) - 1,
            "evaluations": found.evaluations,
            "peak": float(seen.top[0] / spread),
            "factors": {k: float((problem.scales[k] / problem.initial[k]).flatten()[0]) for k in problem.initial},
        }
        if name.endswith(".scores"):
            rows = self._rank_rows(out.shape[-2], out.device)
            record["tau"] = self.ranking(out.index_select(-2, rows)).agreement(got.index_select(-2, rows))
        return record
