"""The end of a training at few bits: each layer's deployed form, norms folded in, sums rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.kits.conv_layout import round_outputs
from gossamer.kits.dataflow import Dataflow
from gossamer.kits.folding import fold_norms
from gossamer.kits.qat.training import qat_layers
from gossamer.kits.quant_layout import float_layer
from gossamer.models.contracts import replace_module
from gossamer.ops.grids import LayerGrids
from gossamer.ops.int8 import int8_layer
from gossamer.ops.liq import FLOAT_BITS, LIQConv2d, LIQLinear
from gossamer.ops.quant import max_scale

__all__ = ["final_forms", "finish_layers", "foldable_norms", "open_sums", "sum_grids"]

DEPLOYED_BITS = 8


def final_forms(model: nn.Module) -> dict[str, str]:
    """Return the deployed form of every trainable layer.

    ``"int8"`` (weights of at most 8 bits, input of at most 8 or float: exact integer codes), ``"float"`` (nothing
    quantized), ``"simulated"`` (9 to 16 bits: no kernel holds them; stays as it is).
    """
    forms = {}
    for name, layer in qat_layers(model).items():
        w, a = layer.widths
        if w == FLOAT_BITS and (a == FLOAT_BITS or layer.inputs == "float"):
            forms[name] = "float"
        else:
            forms[name] = "int8" if _small(layer) else "simulated"
    return forms


def _small(layer: LIQConv2d | LIQLinear) -> bool:
    w, a = layer.widths
    return w <= DEPLOYED_BITS and (layer.inputs == "float" or a <= DEPLOYED_BITS)


def foldable_norms(model: nn.Module, forms: Mapping[str, str]) -> list[list[str]]:
    """Return ``[layer, batch norm]`` paths where a norm alone reads an integer layer's output.

    Empty for a model whose dataflow cannot be traced: its norms stay.
    """
    try:
        pairs = Dataflow(model).norms
    except ModelError:
        return []
    return [pair for pair in pairs if forms.get(pair[0]) == "int8"]


def open_sums(model: nn.Module) -> dict[str, str]:
    """Return grids (``"signed"``, ``"unsigned"``) of values that would be summed or pooled in float, by module path.

    ONNX Runtime runs an integer convolution only where its output is rounded too. Empty for models without
    convolutions between their layers' inputs, and where the dataflow cannot be traced.
    """
    layers = [n for n, m in qat_layers(model).items() if _small(m) and m.inputs != "float"]
    if not any(isinstance(model.get_submodule(n), LIQConv2d) for n in layers):
        return {}
    try:
        return Dataflow(model).open_tensors(layers)[0]
    except ModelError:
        return {}


@torch.no_grad()
def sum_grids(model: nn.Module, images: Tensor) -> dict[str, dict[str, Any]]:
    """Return 8-bit grids (``kits.conv_layout.round_outputs``) for ``open_sums``: the largest value on the largest code.

    Args:
        model: Trained model, before ``finish_layers``; is put into evaluation mode.
        images: [N, C, H, W].
    """
    kinds = open_sums(model)
    tops: dict[str, Any] = {}

    def seen(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            tops[name] = max(tops.get(name, 0.0), float(out.abs().max()))

        return hook

    handles = [model.get_submodule(n).register_forward_hook(seen(n)) for n in kinds]
    try:
        model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    steps = {n: float(max_scale(torch.tensor(top), DEPLOYED_BITS, kinds[n] == "signed")) for n, top in tops.items()}
    return {n: {"bits": DEPLOYED_BITS, "kind": kinds[n], "step": step} for n, step in steps.items()}


@torch.no_grad()
def _deployed(layer: LIQConv2d | LIQLinear, folds: bool) -> nn.Module:
    w, a = layer.widths
    floating = layer.inputs == "float"
    rows = len(layer.weight) if folds else 1
    grids = LayerGrids(w, FLOAT_BITS if floating else a, "odd", layer.inputs, rows)  # type: ignore[arg-type]
    weight_step = layer.active_clip("weight") / (2**w - 1)
    top = 2**a - 1 if layer.inputs == "unsigned" else 2 ** (a - 1) - 1
    input_step = None if floating else layer.active_clip("input") / top
    bias = True if folds else None
    return int8_layer(layer, grids, weight_step, input_step, weight=layer.quantized_weight(), bias=bias)


def finish_layers(
    model: nn.Module,
    forms: Mapping[str, str],
    norms: Sequence[Sequence[str]] = (),
    sums: Mapping[str, Mapping[str, Any]] | None = None,
) -> nn.Module:
    """Give every trainable layer its deployed form, and fold batch norms into the integer ones.

    Args:
        model: The trained model.
        forms: Form by path (``final_forms``).
        norms: Norms to fold (``foldable_norms``).
        sums: Grids of further values (``sum_grids``); none: the finished model computes what the trained one did.

    Raises:
        ModelError: A path holds no trainable layer.
    """
    folded = {pair[0] for pair in norms}
    for name, form in forms.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, LIQConv2d | LIQLinear):
            raise ModelError(f"layer {name!r} is {type(layer).__name__}; expected a trainable quantized layer")
        if form == "int8":
            replace_module(model, name, _deployed(layer, name in folded))
        elif form == "float":
            replace_module(model, name, float_layer(layer))
    return round_outputs(fold_norms(model, norms), sums or {})
