"""Which layers of a model become adder layers, and how they are exchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.core.schedule import Step
from gossamer.kits.dataflow import Dataflow
from gossamer.kits.folding import fold_norms
from gossamer.models.contracts import replace_module
from gossamer.models.weights import classifiers
from gossamer.ops.adder_layers import AdderConv2d, AdderLinear, Int8AdderConv2d, SharedGrid, unfit_for_adders

__all__ = ["Choice", "NormedLinear", "choose", "convert", "convert_to_adder", "quantize_adder"]


class NormedLinear(nn.Linear):
    """A classifier with a batch norm on its logits, under the names of the plain one."""

    norm: nn.BatchNorm1d

    @classmethod
    def like(cls, linear: nn.Linear) -> NormedLinear:
        """Return one with the weights of ``linear``."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None)
        new.weight, new.bias = linear.weight, linear.bias
        new.norm = nn.BatchNorm1d(linear.out_features, device=linear.weight.device)
        return new

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


@dataclass(frozen=True)
class Choice:
    """What becomes of the layers of a model.

    Attributes:
        layers: Paths that become adder layers.
        logits: Paths of classifiers that get a batch norm on their logits.
        left: Reason by path of those that stay as they are.
    """

    layers: list[str]
    logits: list[str]
    left: dict[str, str]


def choose(model: nn.Module, skip: Sequence[str] = (), logits: bool = True) -> Choice:
    """Choose every convolution and linear layer that a batch norm alone reads, but the first and the classifier.

    Args:
        model: A model that ``torch.fx`` can trace.
        skip: Patterns of further module paths to leave.
        logits: Give the classifier a batch norm.

    Raises:
        ModelError: The model cannot be traced, no layer can become one, or a pattern fits none.
    """
    known = {n: m for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
    if idle := [pattern for pattern in skip if not any(fnmatch(name, pattern) for name in known)]:
        raise ModelError(
            f"addernet on {type(model).__name__}: skip={idle[0]!r} fits no convolution or linear layer; their paths "
            f"are {', '.join(list(known)[:5])}, ..."
        )
    normed = {layer for layer, _ in Dataflow(model).norms}
    heads, config = set(classifiers(model)), getattr(model, "pretrained_cfg", None) or {}
    first = config.get("first_conv") or next((n for n, m in known.items() if isinstance(m, nn.Conv2d)), "")
    firsts = {first} if isinstance(first, str) else set(first)
    left: dict[str, str] = {}
    for name, module in known.items():
        if name in firsts:
            left[name] = "first layer"
        elif name in heads:
            left[name] = "classifier"
        elif any(fnmatch(name, pattern) for pattern in skip):
            left[name] = "skipped"
        elif isinstance(module, nn.Conv2d) and (reason := unfit_for_adders(module)) is not None:
            left[name] = reason
        elif name not in normed:
            left[name] = "no batch norm alone reads it"
    layers = [n for n in known if n not in left]
    if not layers:
        raise ModelError(
            f"addernet on {type(model).__name__}: none of {len(known)} convolutions and linear layers can become an "
            f"adder layer ({', '.join(f'{n}: {why}' for n, why in list(left.items())[:3])}); each needs a batch norm "
            f"behind it, groups and dilation 1"
        )
    plain = [n for n in left if n in heads and type(known[n]) is nn.Linear]
    return Choice(layers, plain if logits else [], left)


def convert(model: nn.Module, edit: Mapping[str, Any]) -> nn.Module:
    """Exchange layers as chosen, in place.

    Args:
        model: The model.
        edit: ``layers``, ``logits`` (paths), ``seed`` of the filters or ``None`` for those of the model, ``gradient``
            and ``clip``.
    """
    with torch.random.fork_rng(devices=[]):  # what constructors draw is not used
        for name in edit["layers"]:
            replace_module(model, name, _adder(model.get_submodule(name), name, edit))
        for name in edit["logits"]:
            replace_module(model, name, NormedLinear.like(model.get_submodule(name)))  # type: ignore[arg-type]
    return model


def _adder(old: Any, name: str, edit: Mapping[str, Any]) -> AdderConv2d | AdderLinear:
    kind: Any = AdderConv2d if isinstance(old, nn.Conv2d) else AdderLinear
    new = kind.like(old, edit["gradient"])
    new.clip = edit["clip"]
    if edit["seed"] is None:
        new.weight, new.bias = old.weight, old.bias
    else:
        draw = Step("addernet.convert", "filters", 0, 1, seed=edit["seed"]).generator(name)
        new.weight.data.copy_(torch.randn(new.weight.shape, generator=draw))
    return new


def convert_to_adder(
    model: nn.Module, skip: Sequence[str] = (), *, gradient: str = "full", clip: bool = True, seed: int | None = 0,
    logits: bool = True,
) -> nn.Module:  # fmt: skip
    """Return ``model`` with adder layers, changed in place: the method without anything around it.

    Args:
        model: A CNN with batch norms that ``torch.fx`` can trace.
        skip: Patterns of module paths to leave; the first convolution and the classifier stay anyway.
        gradient: ``"full"``, ``"lp"`` or ``"sign"``.
        clip: Clamp the derivatives of inputs.
        seed: Of the filters, drawn from N(0, 1); ``None`` keeps the weights of the model.
        logits: Give the classifier a batch norm on its logits, as the release does.

    Raises:
        ModelError: No layer can become an adder layer.
    """
    found = choose(model, skip, logits)
    return convert(
        model, {"layers": found.layers, "logits": found.logits, "seed": seed, "gradient": gradient, "clip": clip}
    )


def quantize_adder(model: nn.Module, grids: Mapping[str, SharedGrid]) -> nn.Module:
    """Put adder convolutions on bytes, in place, with the batch norms behind them as gain and shift.

    Args:
        model: Trained model in evaluation mode.
        grids: Grid by path (``ops.adder_layers.shared_grid``).
    """
    pairs = [pair for pair in Dataflow(model).norms if pair[0] in grids]
    for name, grid in grids.items():
        replace_module(model, name, Int8AdderConv2d.of(model.get_submodule(name), grid))  # type: ignore[arg-type]
    return fold_norms(model, pairs)
