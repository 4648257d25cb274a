"""Where a model is quantized: which layers, in which units, and how they change form.

Three steps, each driven by plain JSON so that edits can be replayed: attentions are opened,
layers are wrapped in the searchable forms of ``ops.quant``, and at the end each wrapped layer
takes its final form (real 8 bit, simulated, or float again).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import nn

from gossamer.core.errors import ModelError
from gossamer.kits.folding import fold_norms
from gossamer.models.contracts import replace_module
from gossamer.models.timm_adapter import attention_views, open_attention
from gossamer.ops.attention import MatMul
from gossamer.ops.int8 import Int8Conv2d, Int8Linear, Int8MatMul
from gossamer.ops.quant import QuantConv2d, QuantLinear, QuantMatMul

__all__ = [
    "FINAL_FORMS",
    "QUANT_TYPES",
    "LayerSpec",
    "Layout",
    "find_layout",
    "WidthOptions",
    "classifiers",
    "final_forms",
    "finish_layers",
    "float_layer",
    "layer_specs",
    "open_layout",
    "quant_layers",
    "unfit_padding",
    "weight_counts",
    "wrap_layers",
]

QUANT_TYPES = (QuantLinear, QuantConv2d, QuantMatMul)
FINAL_FORMS = ("int8", "simulated", "float")
_INT8_TYPES = (Int8Linear, Int8Conv2d, Int8MatMul)
_HEADS = ("head", "head_dist", "fc", "classifier")


@dataclass(frozen=True)
class Layout:
    """What of a model is quantized.

    Attributes:
        attentions: Module paths of the attentions to open.
        units: Layers by unit. A unit is one transformer block, or one layer outside of blocks;
            its layers are calibrated in one go.
        heads: Those of the layers that are classifiers.
        modules: Layers by module of a mixed-precision decision: ``<attention path>`` and
            ``<block path>.mlp`` (whatever of the block is not its attention).
        skipped: Layers left in float, with the reason.
        norms: ``[layer, batch norm]`` to fold before anything else.
        unsigned: Layers whose input cannot be negative.
        sums: Modules whose output is to be rounded beside the layers' inputs (``"signed"`` or
            ``"unsigned"``), so that sums run in integers.
    """

    attentions: tuple[str, ...]
    units: dict[str, list[str]]
    heads: tuple[str, ...]
    modules: dict[str, list[str]]
    skipped: dict[str, str]
    norms: list[list[str]] = field(default_factory=list)
    unsigned: list[str] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {**asdict(self), "attentions": list(self.attentions), "heads": list(self.heads)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """Undo ``to_json``."""
        return cls(**{**data, "attentions": tuple(data["attentions"]), "heads": tuple(data["heads"])})


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is wrapped.

    Attributes:
        kind: ``"weights"`` (linear, convolution) or ``"product"``.
        bits: Width of weights and input, or of both operands.
        num_scales: Weight scales (0 for a product).
        signed: Signedness of the input grid; of both operands of a product.
        new_bias: Create a bias where there is none.
    """

    kind: Literal["weights", "product"]
    bits: tuple[int, int]
    num_scales: int = 1
    signed: tuple[bool, bool] = (True, True)
    new_bias: bool = False


def classifiers(model: nn.Module) -> set[str]:
    """Return the paths of the classifier layers (timm's ``get_classifier``, else by usual names)."""
    get = getattr(model, "get_classifier", None)
    if get is None:
        return {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in _HEADS}
    found = get()
    owned = {id(m) for m in (found if isinstance(found, tuple | list) else (found,))}
    return {n for n, m in model.named_modules() if id(m) in owned and isinstance(m, nn.Linear)}


def unfit_padding(module: nn.Conv2d) -> str | None:
    """Return why the padding of a convolution keeps it in float, ``None`` if it does not."""
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"padding {module.padding!r} in mode {module.padding_mode!r}"
    return None


def _unfit(module: nn.Conv2d) -> str | None:
    if module.groups != 1:
        return f"grouped convolution (groups={module.groups}), whose outputs are no one matrix product"
    return unfit_padding(module)


def find_layout(model: nn.Module, *, products: bool = True) -> Layout:
    """Find the layers to quantize in a vision transformer.

    Args:
        model: Any module that holds attentions known to ``models.timm_adapter``.
        products: Include the two products of each attention.

    Raises:
        ModelError: No attention, an attention that cannot be opened, or a model that is
            already quantized.
    """
    for name, module in model.named_modules():
        if isinstance(module, (*QUANT_TYPES, *_INT8_TYPES)):
            raise ModelError(
                f"layer {name!r} is {type(module).__name__}: the model is already quantized; pass the float one"
            )
    views = attention_views(model)
    if not views:
        raise ModelError(
            f"{type(model).__name__} holds no attention; expected a vision transformer (ViT, DeiT, Swin) whose "
            f"attention products are quantized. For a convolutional network take a method that needs no attention"
        )
    blocks = {v.name: v.name.rpartition(".")[0] or v.name for v in views}
    units: dict[str, list[str]] = {b: [] for b in blocks.values()}
    modules: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, nn.Conv2d):
            continue
        reason = _unfit(module) if isinstance(module, nn.Conv2d) else None
        if reason:
            skipped[name] = reason
            continue
        around = [b for b in blocks.values() if name.startswith(b + ".")]
        block = max(around, key=len, default=None)
        units.setdefault(block or name, []).append(name)
        if block:
            home = next((a for a in blocks if name.startswith(a + ".")), f"{block}.mlp")
            modules.setdefault(home, []).append(name)
    if products:
        for attention, block in blocks.items():
            new = [f"{attention}.scores", f"{attention}.values"]
            units[block] += new
            modules.setdefault(attention, []).extend(new)
    layers = {n for names in units.values() for n in names}
    heads = tuple(sorted(classifiers(model) & layers))
    return Layout(tuple(blocks), units, heads, modules, skipped)


def open_layout(model: nn.Module, layout: Layout) -> nn.Module:
    """Open the attentions and fold the batch norms that a layout lists (those still there)."""
    for name in layout.attentions:
        open_attention(model, name)
    return fold_norms(model, layout.norms)


def wrap_layers(model: nn.Module, specs: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Wrap layers in their searchable, still inactive forms.

    Args:
        model: Model with open attentions.
        specs: ``LayerSpec`` fields by module path.

    Raises:
        ModelError: A path is missing or holds another kind of layer.
    """
    for name, given in specs.items():
        spec = LayerSpec(**given)
        try:
            source = model.get_submodule(name)
        except AttributeError:
            raise ModelError(
                f"layer {name!r} is gone since the model was prepared; quantize the finished model"
            ) from None
        bits = (spec.bits[0], spec.bits[1])
        if spec.kind == "product" and type(source) is MatMul:
            new: nn.Module = QuantMatMul(bits, (spec.signed[0], spec.signed[1]))
            new.to(next(model.parameters()).device)
        elif spec.kind == "weights" and type(source) in (nn.Linear, nn.Conv2d):
            form = QuantLinear if isinstance(source, nn.Linear) else QuantConv2d
            new = form(source, num_scales=spec.num_scales, bits=bits, signed=spec.signed[0], new_bias=spec.new_bias)  # type: ignore[arg-type]
        else:
            raise ModelError(f"layer {name!r} is {type(source).__name__}; expected a {spec.kind} layer in float")
        replace_module(model, name, new)
    return model


@dataclass(frozen=True)
class WidthOptions:
    """Widths and grids of a whole model.

    Attributes:
        w_bits: Width of weights.
        a_bits: Width of activations.
        head_bits: Width of the classifiers; ``None`` leaves them in float.
        per_channel: One weight step per output row, else one per tensor (three for fused q/k/v).
        unsigned_softmax: Unsigned grid for the softmax output.
        new_bias: Create biases where there are none.
    """

    w_bits: int = 8
    a_bits: int = 8
    head_bits: int | None = 8
    per_channel: bool = False
    unsigned_softmax: bool = False
    new_bias: bool = False


def layer_specs(model: nn.Module, layout: Layout, options: WidthOptions) -> dict[str, dict[str, Any]]:
    """Return the ``LayerSpec`` fields of every layer of ``layout``, as plain JSON."""
    specs = {}
    for name in (n for names in layout.units.values() for n in names):
        parent, _, leaf = name.rpartition(".")
        if name in layout.heads and options.head_bits is None:
            continue
        if leaf in ("scores", "values") and parent in layout.attentions:
            signed = (leaf == "scores" or not options.unsigned_softmax, True)
            spec = LayerSpec("product", (options.a_bits, options.a_bits), 0, signed)
        else:
            layer: Any = model.get_submodule(name)
            bits = (options.w_bits, options.a_bits)
            if name in layout.heads and options.head_bits is not None:
                bits = (options.head_bits, options.head_bits)
            fused = leaf == "qkv" and parent in layout.attentions
            steps = layer.weight.shape[0] if options.per_channel else 3 if fused else 1
            signed = (name not in layout.unsigned, True)
            spec = LayerSpec("weights", bits, steps, signed, new_bias=options.new_bias)
        specs[name] = asdict(spec)
    return specs


def final_forms(model: nn.Module, low_bits: str = "simulated") -> dict[str, str]:
    """Return the form that ``finish_layers`` shall give each wrapped layer.

    Real 8 bit where both widths are 8, float where a layer is not active (nothing reached it),
    else simulated; ``low_bits="int8"`` puts widths below 8 into 8-bit storage and kernels too.
    """
    forms = {}
    for name, layer in quant_layers(model).items():
        real = layer.bits == (8, 8) or (low_bits == "int8" and max(layer.bits) <= 8)
        forms[name] = "float" if not layer.active else "int8" if real else "simulated"
    return forms


def quant_layers(model: nn.Module) -> dict[str, QuantLinear | QuantConv2d | QuantMatMul]:
    """Return the wrapped layers by module path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QUANT_TYPES)}


def weight_counts(model: nn.Module, names: Sequence[str]) -> int:
    """Return the number of weights (biases not counted) of the named layers."""
    layers: list[Any] = [model.get_submodule(n) for n in names]
    return sum(m.weight.numel() for m in layers if hasattr(m, "weight"))


def _as_int8(layer: Any) -> nn.Module:
    if isinstance(layer, QuantMatMul):
        return Int8MatMul.from_scales(layer.a_scale, layer.b_scale, signed=layer.signed, bits=layer.bits)
    form = Int8Linear if isinstance(layer, QuantLinear) else Int8Conv2d
    return form.from_scales(
        layer, layer.weight_scale, layer.input_scale,
        signed=layer.signed, weight_bits=layer.bits[0], input_bits=layer.bits[1],
    )  # fmt: skip


def float_layer(layer: Any) -> nn.Linear | nn.Conv2d:
    """Return a plain layer that holds the very weight and bias of a trainable or calibrated one."""
    new: nn.Linear | nn.Conv2d
    if hasattr(layer, "in_features"):
        new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    else:
        new = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, bias=layer.bias is not None, device="meta",
        )  # fmt: skip
    new.weight, new.bias = layer.weight, layer.bias
    return new


def finish_layers(model: nn.Module, forms: Mapping[str, str]) -> nn.Module:
    """Give every wrapped layer its final form.

    Args:
        model: Model with wrapped layers.
        forms: ``"int8"``, ``"simulated"`` or ``"float"`` by module path.

    Raises:
        ModelError: A path does not hold a wrapped layer, or an unknown form.
    """
    for name, form in forms.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, QUANT_TYPES) or form not in FINAL_FORMS:
            raise ModelError(
                f"layer {name!r} is {type(layer).__name__}, form {form!r}; expected a wrapped layer and one of "
                f"{FINAL_FORMS}"
            )
        if form == "simulated":
            layer.active = True
            if not isinstance(layer, QuantMatMul):
                layer.float_bias = None
        else:
            if form == "int8":
                new = _as_int8(layer)
            else:
                new = MatMul() if isinstance(layer, QuantMatMul) else float_layer(layer)
            device = next((t.device for t in (*layer.parameters(), *layer.buffers())), None)
            replace_module(model, name, new.to(device) if device is not None else new)
    return model
