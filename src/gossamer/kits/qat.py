"""Quantization-aware training of a whole model: which layers, at which widths, from which clips, to which end.

Everything is driven by plain JSON, so that edits can be replayed: ``find_layers`` looks at a model once,
``wrap_layers`` puts the layers of ``ops.liq`` in place, ``finish_layers`` gives them their deployed form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import ModelError, RecipeError
from gossamer.cost.ledger import cost, default_example
from gossamer.kits.conv_layout import round_outputs
from gossamer.kits.dataflow import Dataflow
from gossamer.kits.folding import fold_norms
from gossamer.kits.norm_statistics import norms_frozen
from gossamer.kits.quant_layout import classifiers, float_layer, unfit_padding
from gossamer.models.contracts import replace_module
from gossamer.ops.grids import LayerGrids
from gossamer.ops.int8 import int8_layer
from gossamer.ops.liq import FLOAT_BITS, LIQConv2d, LIQLinear, check_width
from gossamer.ops.modes import evaluating
from gossamer.ops.quant import max_scale
from gossamer.ops.switchable import SwitchableNorm

__all__ = [
    "CLIP_STARTS",
    "QatLayer",
    "QatLayout",
    "Widths",
    "decay_clips",
    "final_forms",
    "find_layers",
    "finish_layers",
    "first_batch",
    "foldable_norms",
    "init_clips",
    "layer_rows",
    "open_sums",
    "qat_layers",
    "set_widths",
    "sum_grids",
    "unwrap_layers",
    "wrap_layers",
]

Widths = tuple[int, int]
"""Width of a layer's weights and of its input."""
CLIP_STARTS = ("paper", "mse")
"""``paper``: clips 1, or 0.8 x the largest magnitude where weights are not normalised; ``mse``: least squared error."""
SHORTCUTS = ("downsample", "shortcut")
"""Path components of layers on a shortcut: they take the widths of the last layer of their block."""
DEPLOYED_BITS = 8
_SCAN = tuple(k / 40 for k in range(2, 41))


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


# -- wrapping ------------------------------------------------------------------------------------
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


# -- the end -------------------------------------------------------------------------------------
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


def first_batch(loaders: Mapping[str, Any], step: Any) -> Tensor:
    """Return the images of the calibration loader's first batch, or of the training loader's.

    The same images whatever the phase is called: methods on this kit start alike.
    """
    loader = loaders.get("calibration") or loaders.get("train")
    if loader is None:
        names: Iterable[str] = sorted(loaders)
        raise ModelError(f"clips start from a batch of images: no loader 'calibration' or 'train' among {names}")
    return loader(replace(step, phase="clips"))["image"]
