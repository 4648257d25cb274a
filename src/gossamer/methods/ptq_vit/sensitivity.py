"""Sensitivity of modules at candidate widths, for mixed precision (arXiv 2106.14156 section 3.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import TypedDict

from gossamer.core.errors import RecipeError
from gossamer.kits.calibration import Captured, RowPick, capture_inputs, capture_outputs
from gossamer.kits.scale_search import search_scales
from gossamer.methods.ptq_vit.maths import sensitivity
from gossamer.methods.ptq_vit.search import UnitSearch, activated
from gossamer.ops.quant import BITS, QuantMatMul

__all__ = ["MixedPrecision", "check_mixed", "module_layers", "unit_sensitivity"]


class MixedPrecision(TypedDict, total=False):
    """Options of mixed precision; a plain dictionary, so that recipes and saved models can hold it.

    Keys:
        bits: Candidate widths, default (4, 5, 6, 7, 8).
        budget: ``"6bit"`` (mean width) or ``"16.5MB"`` (decimal, all quantized weights).
        granularity: ``"msa_mlp"`` (the paper: one width per attention and per MLP) or ``"layer"``.
        sensitivity: ``"nuclear"`` (eq. 18) or ``"nuclear_relative"`` (scale-free; ours).
    """

    __pydantic_config__ = {"extra": "forbid"}  # type: ignore[misc]

    bits: tuple[int, ...]
    budget: str
    granularity: Literal["msa_mlp", "layer"]
    sensitivity: Literal["nuclear", "nuclear_relative"]


DEFAULTS: MixedPrecision = {
    "bits": (4, 5, 6, 7, 8),
    "budget": "6bit",
    "granularity": "msa_mlp",
    "sensitivity": "nuclear",
}


def check_mixed(mixed: MixedPrecision) -> MixedPrecision:
    """Return the options completed by their defaults.

    Raises:
        RecipeError: An unknown key or value.
    """
    for key in mixed:
        if key not in DEFAULTS:
            raise RecipeError(f"mixed: option {key!r} is unknown; options are {', '.join(DEFAULTS)}")
    full: MixedPrecision = {**DEFAULTS, **mixed}
    if not full["bits"] or any(b not in BITS for b in full["bits"]):
        raise RecipeError(f"mixed.bits={full['bits']}; expected widths in {BITS[0]}..{BITS[-1]}")
    for key, allowed in (("granularity", ("msa_mlp", "layer")), ("sensitivity", ("nuclear", "nuclear_relative"))):
        if full[key] not in allowed:  # type: ignore[literal-required]
            raise RecipeError(f"mixed.{key}={full[key]!r}; allowed are {', '.join(allowed)}")  # type: ignore[literal-required]
    return full


def module_layers(modules: Mapping[str, Sequence[str]], granularity: str) -> dict[str, list[str]]:
    """Return the layers of every decision; per layer, an attention's products follow its first layer."""
    if granularity == "msa_mlp":
        return {m: list(names) for m, names in modules.items()}
    decisions: dict[str, list[str]] = {}
    for names in modules.values():
        products = [n for n in names if n.rpartition(".")[2] in ("scores", "values")]
        weights = [n for n in names if n not in products]
        decisions.update({n: [n] for n in weights})
        decisions[weights[0]] += products
    return decisions


def _output(search: UnitSearch, module: str, names: Sequence[str]) -> tuple[str, bool]:
    """Return where a module's output Y is seen: (layer, whether it is that layer's left input).

    The attention map for an attention (what enters the value product), the last layer's output else.
    """
    values = next((n for n in names if n.endswith(".values")), None)
    if values is not None and module in search.attentions:
        return values, True
    weights = [n for n in names if not isinstance(search.layers[n], QuantMatMul)]
    return weights[-1], False


def _see(search: UnitSearch, where: tuple[str, bool], active: Sequence[str]) -> Tensor:
    """Return Y [S, windows, ..., M, N] with the given layers quantized."""
    pick = RowPick(None, 0, search.keep.images)
    with activated(search.layers, active):
        if where[1]:
            return capture_inputs(search.walk, where[0], pick).parts[0]
        return capture_outputs(search.walk, {where[0]: pick})[where[0]].out  # type: ignore[return-value]


def _search_at(search: UnitSearch, seen: Mapping[str, Captured], width: int) -> None:
    """Give the layers their steps at ``width``, from float inputs and targets."""
    for name, captured in seen.items():
        layer = search.layers[name]
        layer.bits = (width, width)
        problem = (
            search.product_problem(name, layer, captured, captured.parts[0] @ captured.parts[1])
            if isinstance(layer, QuantMatMul)
            else search.linear_problem(
                name, layer, captured, F.linear(captured.parts[0], layer.weight.flatten(1), layer.float_bias)
            )
        )
        search_scales(problem, search.options)
        search.store(layer, problem)


@torch.no_grad()
def unit_sensitivity(
    search: UnitSearch, unit: str, decisions: Mapping[str, Sequence[str]], widths: Sequence[int], *, relative: bool
) -> dict[str, dict[int, float]]:
    """Return Omega (eq. 18) of a unit's decisions at every width, all else in floating point.

    Widths and steps of the layers are put back as they were; biases are not touched.

    Args:
        search: Search without bias correction.
        unit: Module path of the unit.
        decisions: Layers by decision, in order of execution.
        widths: Candidate widths.
        relative: Use the scale-free form.
    """
    omegas: dict[str, dict[int, float]] = {}
    with activated(search.layers, ()):
        search.walk.start_over()
        search.walk.start_at(unit)
        for module, names in decisions.items():
            kept = {n: (search.layers[n].bits, [b.clone() for b in search.layers[n].buffers()]) for n in names}
            where = _output(search, module, names)
            target = _see(search, where, ())
            seen = {n: capture_inputs(search.walk, n, search.keep) for n in names}
            omegas[module] = {}
            for width in widths:
                _search_at(search, seen, width)
                omegas[module][width] = sensitivity(target, _see(search, where, names), relative=relative)
            for n, (bits, buffers) in kept.items():
                search.layers[n].bits = bits
                for buffer, value in zip(search.layers[n].buffers(), buffers, strict=True):
                    buffer.copy_(value)
        search.walk.start_over()
    return omegas
