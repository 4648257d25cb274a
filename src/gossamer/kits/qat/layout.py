"""Which layers of a model are trained at few bits, in which roles, and what they cost at which widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import ModelError, RecipeError
from gossamer.cost.ledger import cost, default_example
from gossamer.kits.quant_layout import classifiers, unfit_padding
from gossamer.ops.liq import FLOAT_BITS, check_width
from gossamer.ops.modes import evaluating

__all__ = ["SHORTCUTS", "QatLayer", "QatLayout", "Widths", "find_layers", "layer_rows"]

Widths = tuple[int, int]
"""Width of a layer's weights and of its input."""
SHORTCUTS = ("downsample", "shortcut")
"""Path components of layers on a shortcut: they take the widths of the last layer of their block."""


@dataclass(frozen=True)
class QatLayer:
    """One convolution or linear layer.

    Attributes:
        name: Module path.
        role: ``"first"``, ``"last"`` (both at a fixed width), ``"body"`` (decided), ``"shortcut"`` (follows).
        inputs: Grid of its input (``ops.liq.INPUT_GRIDS``).
        normalise: Whether its weights are normalised.
        macs: MACs for one image.
        follows: The layer whose widths a shortcut takes.
    """

    name: str
    role: str
    inputs: str
    normalise: bool
    macs: int
    follows: str | None = None


@dataclass(frozen=True)
class QatLayout:
    """What of a model is quantized.

    Attributes:
        layers: Layers in the order of the model.
        norms: Batch norms by path, with the layer that ran last before each.
        rest_bops: Bit operations of everything that stays in float.
        skipped: Layers left in float, with the reason.
    """

    layers: tuple[QatLayer, ...]
    norms: dict[str, str] = field(default_factory=dict)
    rest_bops: int = 0
    skipped: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QatLayout:
        """Undo ``to_json``."""
        return cls(**{**data, "layers": tuple(QatLayer(**layer) for layer in data["layers"])})

    @property
    def decided(self) -> list[str]:
        """Names of the layers whose widths are free, in model order."""
        return [layer.name for layer in self.layers if layer.role == "body"]

    def widths(self, body: int | Sequence[int | Widths], first_last: int = 8) -> dict[str, Widths]:
        """Return every layer's widths.

        Args:
            body: One width for all, or one entry a decided layer: a width, or (weights, input).
            first_last: Width of the first and last layers.

        Raises:
            RecipeError: A width out of range, or another number of entries.
        """
        names = self.decided
        entries = [body] * len(names) if isinstance(body, int) else list(body)
        if len(entries) != len(names):
            raise RecipeError(f"bits: {len(entries)} entries; the model has {len(names)} layers to decide")
        pairs = [(e, e) if isinstance(e, int) else (int(e[0]), int(e[1])) for e in entries]
        of = dict(zip(names, pairs, strict=True))
        for layer in self.layers:
            of.setdefault(layer.name, of[layer.follows] if layer.follows else (first_last, first_last))
        for name, (w, a) in of.items():
            check_width(w, f"layer {name!r} weights")
            check_width(a, f"layer {name!r} input")
        return of

    def bops(self, widths: Mapping[str, Widths]) -> int:
        """Return MACs x weight bits x input bits of all layers, and what stays in float, for one image."""
        return self.rest_bops + sum(k.macs * widths[k.name][0] * widths[k.name][1] for k in self.layers)


# -- looking at a model --------------------------------------------------------------------------
@dataclass
class _Seen:
    """What one forward pass showed: order of layers, lowest inputs, what ran before each norm."""

    order: list[str] = field(default_factory=list)
    lowest: dict[str, float] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def _look(model: nn.Module, layers: Sequence[str], example: Tensor) -> _Seen:
    seen, handles = _Seen(), []

    def layer_hook(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.order.append(name)
            seen.lowest[name] = min(seen.lowest.get(name, 0.0), float(args[0].min()))

        return hook

    def norm_hook(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if seen.order:
                seen.norms[name] = seen.order[-1]

        return hook

    for name, module in model.named_modules():
        if name in layers:
            handles.append(module.register_forward_pre_hook(layer_hook(name)))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(norm_hook(name)))
    try:
        with evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _followed(name: str, names: Sequence[str]) -> str | None:
    """Return the last layer beside the shortcut that ``name`` lies on, if it lies on one."""
    parts = name.split(".")
    at = next((i for i, p in enumerate(parts) if p in SHORTCUTS), None)
    if at is None:
        return None
    block = "".join(p + "." for p in parts[:at])
    beside = [n for n in names if n.startswith(block) and not set(n[len(block) :].split(".")) & set(SHORTCUTS)]
    return beside[-1] if beside else None


def find_layers(
    model: nn.Module, *, inputs: str = "auto", normalise: bool | None = None, image_bits: bool = False
) -> QatLayout:
    """Look at a float model: one forward pass on noise of the size the model states.

    Args:
        model: A model of ``nn.Conv2d`` and ``nn.Linear`` layers.
        inputs: ``"auto"`` (signed where the pass met a negative input, so nothing is lost), ``"unsigned"`` (as
            released: negative inputs become 0), or ``"signed"``.
        normalise: Normalise the weights of convolutions; ``None``: where the model has batch norms.
        image_bits: Quantize the image too; else the first layer's input stays float and counts as 8 bit.

    Raises:
        ModelError: No layer to quantize, or a model that is quantized already.
        RecipeError: An unknown choice.
    """
    if inputs not in ("auto", "unsigned", "signed"):
        raise RecipeError(f"inputs={inputs!r}; allowed are auto, unsigned, signed")
    for name, module in model.named_modules():
        if hasattr(module, "weight_bits"):
            raise ModelError(
                f"layer {name!r} is {type(module).__name__}: the model is quantized already; pass the float one"
            )
    known = {n: m for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
    skipped = {n: why for n, m in known.items() if isinstance(m, nn.Conv2d) and (why := unfit_padding(m)) is not None}
    names = [n for n in known if n not in skipped]
    example = default_example(model)
    noise = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example)
    counted = cost(model, example, saved=False)
    seen = _look(model, names, noise)
    skipped |= {n: "not reached by an image" for n in names if n not in seen.lowest}
    names = [n for n in names if n in seen.lowest]
    if len(names) < 3:
        raise ModelError(
            f"{type(model).__name__}: {len(names)} convolutions and linear layers met; expected at least a first, a "
            f"last and one between"
        )
    heads = classifiers(model) & set(names) or {seen.order[-1]}
    norms = normalise if normalise is not None else any(isinstance(m, _BatchNorm) for m in model.modules())
    macs = {row.name: row.macs for row in counted.per_layer}
    layers = []
    for name in names:
        follows = _followed(name, names)
        role = "first" if name == seen.order[0] else "last" if name in heads else "shortcut" if follows else "body"
        grid = ("signed" if seen.lowest[name] < 0 else "unsigned") if inputs == "auto" else inputs
        if role == "first":
            grid = "signed" if image_bits else "float"
        normal = norms and isinstance(known[name], nn.Conv2d)
        layers.append(QatLayer(name, role, grid, normal, macs[name], follows if role == "shortcut" else None))
    float_bops = sum(k.macs for k in layers) * FLOAT_BITS**2
    return QatLayout(tuple(layers), seen.norms, counted.bops - float_bops, skipped)


def layer_rows(layout: QatLayout, widths: Mapping[str, Widths], forms: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one table row a layer, for the report."""
    return [
        {
            "layer": k.name,
            "bits": "x".join(str(b) for b in widths[k.name]),
            "input": k.inputs,
            "MACs": k.macs,
            "form": forms.get(k.name, "trainable"),
        }
        for k in layout.layers
    ]
