"""Channel equalisation: outlier channels are scaled down before a layer and its weights up.

The float function stays the same, but one step per tensor then suits all channels (SmoothQuant,
arXiv 2211.10438 eq. 4; for value rows and projections arXiv 1906.04721 eq. 7). The scales
disappear into a LayerNorm or into the value rows of a fused projection; behind a GELU they stay
as one multiplication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.kits.calibration import Walk
from gossamer.models.contracts import replace_module
from gossamer.ops.quant import ChannelGain, QuantLinear

__all__ = ["equalise", "find_pairs", "insert_gains"]

Pair = dict[str, Any]
"""``kind`` (``norm``, ``values``, ``gain``), ``source`` (module path) and ``targets`` (the layers it feeds)."""
_FLOOR = 1e-5
_TOLERANCE = 1e-3


def _children(model: nn.Module, name: str) -> dict[str, nn.Module]:
    return dict(model.get_submodule(name).named_children())


def _is_affine(module: nn.Module | None) -> bool:
    return isinstance(module, nn.LayerNorm) and module.weight is not None


def find_pairs(model: nn.Module, attentions: Sequence[str]) -> list[Pair]:
    """Return what can be equalised in the blocks around the given (open) attentions.

    LayerNorm before q/k/v and before the MLP, value rows before the output projection (where
    nothing but the value product lies between), activation before the MLP's second layer.
    """
    pairs: list[Pair] = []
    for attention in attentions:
        block = attention.rpartition(".")[0]
        inside, parts = _children(model, attention), _children(model, block) if block else {}
        between = inside.get("norm")
        if isinstance(between, nn.Identity | None) and inside.get("gate") is None:
            rows = f"{attention}.qkv" if "qkv" in inside else f"{attention}.v"
            pairs.append({"kind": "values", "source": rows, "targets": [f"{attention}.proj"]})
        if _is_affine(parts.get("norm1")):
            projections = [f"{attention}.{n}" for n in ("qkv", "q", "k", "v") if n in inside]
            pairs.append({"kind": "norm", "source": f"{block}.norm1", "targets": projections})
        mlp = _children(model, f"{block}.mlp") if "mlp" in parts else {}
        if _is_affine(parts.get("norm2")) and "fc1" in mlp:
            pairs.append({"kind": "norm", "source": f"{block}.norm2", "targets": [f"{block}.mlp.fc1"]})
        if isinstance(mlp.get("norm"), nn.Identity) and "fc2" in mlp:
            pairs.append({"kind": "gain", "source": f"{block}.mlp.norm", "targets": [f"{block}.mlp.fc2"]})
    return pairs


def insert_gains(model: nn.Module, pairs: Sequence[Pair]) -> nn.Module:
    """Put a gain of ones where a multiplication will stay."""
    for pair in pairs:
        if pair["kind"] == "gain":
            weight: Any = model.get_submodule(pair["targets"][0]).weight
            replace_module(model, pair["source"], ChannelGain(weight.shape[1]).to(weight.device))
    return model


def _channel_tops(walk: Walk, names: Sequence[str]) -> dict[str, Tensor]:
    tops: dict[str, Tensor] = {}

    def observer(name: str) -> Callable[[tuple[Tensor, ...], Tensor | None, int], None]:
        def observe(inputs: tuple[Tensor, ...], out: Tensor | None, batch: int) -> None:
            top = inputs[0].abs().flatten(0, -2).amax(0)
            tops[name] = torch.maximum(tops[name], top) if name in tops else top

        return observe

    walk.run({n: observer(n) for n in names}, outputs=False)
    return tops


def _tensors(layer: QuantLinear, *, bias: bool) -> list[Tensor]:
    biases = (layer.bias, layer.float_bias) if bias else ()
    return [layer.weight, *(b for b in biases if b is not None)]


@torch.no_grad()
def equalise(walk: Walk, pairs: Sequence[Pair], strength: float) -> None:
    """Equalise a model of wrapped, inactive layers in place.

    The scale of channel j is ``max|x_j|^strength / max|w_j|^(1 - strength)``, relative to its
    geometric mean over channels.

    Args:
        walk: Calibration images and model.
        pairs: What ``find_pairs`` found, gains inserted.
        strength: 0 levels the weights, 1 the activations.

    Raises:
        ModelError: The model's outputs changed: it is not built as the names of its parts say.
    """
    model = walk.model
    before = model(walk.batches[0])
    reached = [p for p in pairs if all(t in walk.calls for t in p["targets"])]
    tops = _channel_tops(walk, [p["targets"][0] for p in reached])
    for pair in reached:
        targets: list[Any] = [model.get_submodule(t) for t in pair["targets"]]
        source: Any = model.get_submodule(pair["source"])
        top = tops[pair["targets"][0]].clamp_min(_FLOOR) ** strength
        weights = torch.stack([t.weight.abs().amax(0) for t in targets]).amax(0)
        scale = top / weights.clamp_min(_FLOOR) ** (1 - strength)
        scale = scale / scale.log().mean().exp()
        if pair["kind"] == "gain":
            source.gain.div_(scale)
        elif pair["kind"] == "norm":
            for tensor in (source.weight, source.bias):
                if tensor is not None:
                    tensor.div_(scale)
        else:
            for tensor in _tensors(source, bias=True):
                rows = tensor[-len(scale) :]  # queries, keys, then values
                rows.div_(scale.reshape(-1, *[1] * (rows.dim() - 1)))
        for target in targets:
            target.weight.mul_(scale)
    gap = (model(walk.batches[0]) - before).abs().max() / before.abs().max().clamp_min(_FLOOR)
    if not gap <= _TOLERANCE:
        raise ModelError(
            f"equalise: outputs of {type(model).__name__} changed by {float(gap):.2g} of the largest; expected "
            f"pre-norm blocks in which norm1 feeds attn and norm2 feeds mlp. Set equalise to null"
        )
