"""Trainable quantized layers in place of plain ones: their widths, and where their clips start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import ModelError, RecipeError
from gossamer.kits.norm_statistics import norms_frozen
from gossamer.kits.qat.layout import QatLayout, Widths
from gossamer.kits.quant_layout import float_layer
from gossamer.models.contracts import replace_module
from gossamer.ops.liq import FLOAT_BITS, LIQConv2d, LIQLinear
from gossamer.ops.modes import evaluating
from gossamer.ops.switchable import SwitchableNorm

__all__ = [
    "CLIP_STARTS", "decay_clips", "first_batch", "init_clips", "qat_layers", "set_widths", "unwrap_layers",
    "wrap_layers",
]  # fmt: skip

CLIP_STARTS = ("paper", "mse")
"""``paper``: clips 1, or 0.8 x the largest magnitude where weights are not normalised; ``mse``: least squared error."""
_SCAN = tuple(k / 40 for k in range(2, 41))


def qat_layers(model: nn.Module) -> dict[str, LIQConv2d | LIQLinear]:
    """Return the trainable quantized layers by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LIQConv2d | LIQLinear)}


def wrap_layers(
    model: nn.Module, layout: QatLayout, choices: Mapping[str, Sequence[Widths]], *, norms: bool = True
) -> nn.Module:
    """Put trainable quantized layers in place.

    Args:
        model: The float model of the layout.
        layout: What to quantize.
        choices: Widths of each layer; where there are several, it can be switched.
        norms: Give a batch norm behind a switchable layer a copy for each of its choices.

    Raises:
        ModelError: A layer is gone or has changed its kind.
    """
    for layer in layout.layers:
        try:
            source = model.get_submodule(layer.name)
        except AttributeError:
            raise ModelError(f"layer {layer.name!r} is gone since the model was looked at") from None
        if type(source) not in (nn.Conv2d, nn.Linear):
            raise ModelError(f"layer {layer.name!r} is {type(source).__name__}; expected a float layer")
        form = LIQConv2d if isinstance(source, nn.Conv2d) else LIQLinear
        widths = tuple((int(w), int(a)) for w, a in choices[layer.name])
        new = form(source, widths, normalise=layer.normalise, inputs=layer.inputs)  # type: ignore[arg-type]
        replace_module(model, layer.name, new)
    for name, feeder in layout.norms.items() if norms else ():
        if len(choices[feeder]) > 1:
            settings = [(int(w), int(a)) for w, a in choices[feeder]]
            replace_module(model, name, SwitchableNorm(model.get_submodule(name), settings))
    return model


def unwrap_layers(model: nn.Module) -> nn.Module:
    """Put plain layers back, with the weights as they are, and the first copy of each switchable norm."""
    for name, layer in qat_layers(model).items():
        replace_module(model, name, float_layer(layer))
    for name, norm in [(n, m) for n, m in model.named_modules() if isinstance(m, SwitchableNorm)]:
        replace_module(model, name, norm.versions[0])
    return model


def set_widths(model: nn.Module, layout: QatLayout, widths: Mapping[str, Widths]) -> None:
    """Switch every layer, and the norms behind them."""
    for name, layer in qat_layers(model).items():
        layer.select(widths[name])
    for name, feeder in layout.norms.items():
        norm = model.get_submodule(name)
        if isinstance(norm, SwitchableNorm):
            norm.select(widths[feeder])


# -- clips ---------------------------------------------------------------------------------------
def _best_clip(x: Tensor, layer: Any, side: str) -> float:
    """Return the clip of least squared error among fractions of the largest magnitude."""
    top = float(x.abs().max())
    if top == 0:
        return 1.0
    clip = (layer.weight_clip if side == "weight" else layer.input_clip).detach()
    held, errors = clip.clone(), {}
    for share in _SCAN:
        clip.fill_(share * top)
        errors[share * top] = float((layer.on_grid(x, side) - x).square().sum())
    clip.copy_(held)
    return min(errors, key=errors.__getitem__)


def _start_input(layer: LIQConv2d | LIQLinear, x: Tensor, how: str) -> None:
    if layer.input_clip is None:
        return
    if how == "paper":
        if not layer.normalise:
            layer.input_clip.fill_(max(0.8 * float(x.abs().max()), 1e-6))
        return
    for widths in layer.choices:
        layer.select(widths)
        if widths[1] != FLOAT_BITS:
            place = layer.place("input")
            layer.input_clip[place] = _best_clip(x, layer, "input")


def _start_weight(layer: LIQConv2d | LIQLinear, how: str) -> None:
    if how == "paper":
        return  # the layer's own start
    for widths in layer.choices:
        layer.select(widths)
        if widths[0] != FLOAT_BITS:
            layer.weight_clip[layer.place("weight")] = _best_clip(layer.grid_weight(), layer, "weight")


@torch.no_grad()
def init_clips(model: nn.Module, images: Tensor, how: str = "paper") -> None:
    """Set the clips from one batch, layer by layer, each seeing inputs that its predecessors have quantized.

    Batch norms use the batch's statistics: normalised weights have another scale than the running ones know.

    Args:
        model: Model with trainable quantized layers.
        images: [N, C, H, W].
        how: One of ``CLIP_STARTS``.

    Raises:
        RecipeError: An unknown start.
    """
    if how not in CLIP_STARTS:
        raise RecipeError(f"clip_start={how!r}; allowed are {', '.join(CLIP_STARTS)}")

    def start(layer: Any, args: tuple[Any, ...]) -> None:
        kept = layer.widths
        _start_weight(layer, how)
        _start_input(layer, args[0], how)
        layer.select(kept)

    handles = [m.register_forward_pre_hook(start) for m in qat_layers(model).values()]
    try:
        with evaluating(model), norms_frozen(model):
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.train()
            model(images)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def decay_clips(model: nn.Module, decay: float) -> None:
    """Add ``decay`` x clip to the gradients of all clips (weight decay, which the engine gives to no vector)."""
    for layer in qat_layers(model).values() if decay else ():
        for clip in (layer.weight_clip, layer.input_clip):
            if clip is not None and clip.grad is not None:
                clip.grad.add_(clip, alpha=decay)


def first_batch(loaders: Mapping[str, Any], step: Any) -> Tensor:
    """Return the images of the calibration loader's first batch, or of the training loader's.

    The same images whatever the phase is called: methods on this kit start alike.
    """
    loader = loaders.get("calibration") or loaders.get("train")
    if loader is None:
        names: Iterable[str] = sorted(loaders)
        raise ModelError(f"clips start from a batch of images: no loader 'calibration' or 'train' among {names}")
    return loader(replace(step, phase="clips"))["image"]
