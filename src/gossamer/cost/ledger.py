"""The cost ledger: what a model computes and stores, per layer and in total."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError, ModelError, RecipeError, nearest
from gossamer.cost.counting import Product, Trace, trace
from gossamer.cost.energy import energy_pj
from gossamer.cost.saved import SavedTensor, by_operator, saved_tensors
from gossamer.ops.modes import evaluating
from gossamer.ops.routing import Routed, deployed, every_branch
from gossamer.runtimes.session import first_line

__all__ = ["CONVENTION", "BranchCost", "Cost", "LayerCost", "cost", "default_example"]

CONVENTION = {
    "macs": "executed multiply-accumulates of matrix products, convolutions and attention, per image; "
    "bias, normalisation, softmax and activation functions count 0",
    "additions": "of the same operators, per image: one a MAC, two where differences are summed; multiplications "
    "are the MACs",
    "energy_pj": "estimate for the arithmetic of these operators alone, per image, at the widths declared "
    "(cost.energy: 45 nm, operands at their width, sums of integers in 32 bits); memory is not counted",
    "branches": "of a model that routes its images: every branch counts by the share of the images it was measured to "
    "take, so that all figures per image are means; its own MACs are those of one image that takes it",
    "theoretical_macs": "as the paper counts: a module's own theoretical_macs in place of what it executed",
    "bops": "executed MACs x weight bits x input bits of every layer, first and last included; "
    "attention products: bits of both operands; undeclared widths are those of the floats held",
    "params": "unique parameters, and the weights and biases that quantized layers hold as buffers",
    "weight_bytes": "parameters and persistent buffers as stored; declared widths count bits / 8 per weight",
    "activation_bytes": "sum of what the layers put out, for the batch given; layers are childless modules and "
    "quantized ones as a whole; views count 0",
    "peak_activation_bytes": "largest input plus output of one layer, for the batch given",
    "saved_activation_bytes": "memory kept by a training forward pass for its backward pass, for the batch given; "
    "each memory once, parameters, buffers and autocast's copies of them left out",
    "saved_by_operator": "the same by the operator that saved a memory first",
}
"""What each figure means, by field."""
_BITS_PER_BYTE = 8
_IMAGE_RANK = 4
_METRICS = {
    "macs": "macs",
    "bops": "bops",
    "params": "params",
    "size": "weight_bytes",
    "memory": "memory_bytes",
}


@dataclass(frozen=True)
class LayerCost:
    """Own cost of one module, without that of its children.

    Attributes:
        name: Path of the module; ``""`` is the model itself.
        type: Class of the module.
        macs: Executed MACs per image.
        additions: Additions per image (the multiplications are the MACs).
        energy_pj: Estimated energy of both, per image.
        theoretical_macs: MACs per image as the paper counts; where a module states a count, it
            stands at that module and everything inside has 0.
        bops: Bit operations per image.
        params: Own parameters; a shared one counts where it is met first.
        weight_bytes: Bytes of the own weights.
        activation_bytes: Bytes put out, for the batch given.
        saved_bytes: Bytes it keeps for the backward pass and was the first to keep, for the batch given.
        weight_bits: Width of the weight (or second operand).
        input_bits: Width of the input.
    """

    name: str
    type: str
    macs: int
    additions: int
    energy_pj: float
    theoretical_macs: int
    bops: int
    params: int
    weight_bytes: int
    activation_bytes: int
    saved_bytes: int
    weight_bits: int
    input_bits: int


@dataclass(frozen=True)
class BranchCost:
    """One branch of a model that routes its images.

    Attributes:
        name: What the model calls it.
        share: Share of the images that take it, in [0, 1].
        macs: MACs of an image that takes it, the router left out.
    """

    name: str
    share: float
    macs: int


@dataclass(frozen=True)
class Cost:
    """Cost of a model; ``CONVENTION`` says what each figure means.

    Attributes:
        macs: Executed MACs per image.
        additions: Additions per image (the multiplications are the MACs).
        energy_pj: Estimated energy of both, per image (``cost.energy``).
        theoretical_macs: MACs per image as the paper counts.
        bops: Bit operations per image.
        params: Parameters.
        weight_bytes: Bytes of the stored weights.
        activation_bytes: Bytes of all layer outputs, for the batch.
        peak_activation_bytes: Largest input plus output of a layer, for the batch.
        saved_activation_bytes: Bytes kept for the backward pass, for the batch; ``None`` if not asked for, or if the
            model routes its images (it is not trained in that form, and one image may be too few for its norms).
        saved_by_operator: The same by operator, largest first.
        input_shape: Shape of the example, batch first.
        per_layer: Modules with any cost, in model order.
        branches: Branches that images are routed through, if it has any.
    """

    macs: int
    additions: int
    energy_pj: float
    theoretical_macs: int
    bops: int
    params: int
    weight_bytes: int
    activation_bytes: int
    peak_activation_bytes: int
    saved_activation_bytes: int | None
    saved_by_operator: dict[str, int]
    input_shape: tuple[int, ...]
    per_layer: list[LayerCost]
    branches: list[BranchCost] = field(default_factory=list)

    @property
    def memory_bytes(self) -> int:
        """Bytes that inference needs at least: weights and the widest layer's input and output."""
        return self.weight_bytes + self.peak_activation_bytes

    def metric(self, name: str) -> float:
        """Return the figure that a budget called ``name`` bounds: macs, bops, params, size (bytes), memory (bytes).

        Raises:
            RecipeError: Another name.
        """
        if name not in _METRICS:
            raise RecipeError(f"cost metric {name!r}; allowed are {', '.join(_METRICS)}{nearest(name, _METRICS)}")
        return float(getattr(self, _METRICS[name]))

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON, with the convention."""
        fields = asdict(self)
        fields["input_shape"] = list(self.input_shape)
        return {**fields, "memory_bytes": self.memory_bytes, "convention": dict(CONVENTION)}


def _float_like(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    for x in (*model.parameters(), *model.buffers()):
        if x.is_floating_point():
            return x.device, x.dtype
    return torch.device("cpu"), torch.float32


def _image_size(model: nn.Module) -> tuple[int, int, int]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size")
    embed = getattr(model, "patch_embed", None)
    side = getattr(embed, "img_size", None)
    if side is not None:
        height, width = (side, side) if isinstance(side, int) else side
        size = (size[0] if size else 3, height, width)
    if size is None:
        raise ModelError(
            f"cost of {type(model).__name__}: its input size is not known (no pretrained_cfg, no patch_embed); "
            f"give an example: a tensor [B, C, H, W] or a size (C, H, W)"
        )
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return (first.in_channels if first is not None else size[0], *size[1:])


def default_example(model: nn.Module, size: Sequence[int] | None = None) -> Tensor:
    """Return one zero image [1, C, H, W] on the model's device and in its dtype.

    Args:
        model: A model that states its input size the way timm's do, or any with ``size`` given.
        size: (C, H, W), or (B, C, H, W) for a whole batch.

    Raises:
        ModelError: The size is not known, or not three or four positive numbers.
    """
    shape = tuple(int(n) for n in size) if size is not None else _image_size(model)
    if len(shape) not in (_IMAGE_RANK - 1, _IMAGE_RANK) or min(shape) < 1:
        raise ModelError(f"cost: input size {list(shape)}; allowed are (C, H, W) and (B, C, H, W), all above 0")
    device, dtype = _float_like(model)
    return torch.zeros(shape if len(shape) == _IMAGE_RANK else (1, *shape), device=device, dtype=dtype)


def _inputs(model: nn.Module, example: Tensor | Sequence[Any] | None) -> tuple[Tensor, ...]:
    if isinstance(example, Tensor):
        return (example,)
    if example is not None and any(isinstance(x, Tensor) for x in example):
        return tuple(example)
    return (default_example(model, example),)


def _widths(module: nn.Module, product: bool, bits: tuple[int, int] | None, held: int) -> tuple[int, int]:
    """Return (weight bits, input bits) of a module: declared, else assumed for products, else as held."""
    weight, given = bits if bits is not None and product else (held, held)
    return int(getattr(module, "weight_bits", weight)), int(getattr(module, "input_bits", given))


class _Store:
    """Parameters and stored bytes by module, each memory counted once."""

    def __init__(self, model: nn.Module) -> None:
        persistent = model.state_dict(keep_vars=True)
        self._seen: set[int] = set()
        self._own: dict[str, list[tuple[str, Tensor]]] = {}
        for key, x in persistent.items():
            if isinstance(x, Tensor):
                path, _, name = key.rpartition(".")
                self._own.setdefault(path, []).append((name, x))
        for path, module in model.named_modules():
            listed = {id(x) for _, x in self._own.get(path, [])}
            extra = [(n, p) for n, p in module.named_parameters(recurse=False) if id(p) not in listed]
            self._own.setdefault(path, []).extend(extra)

    def take(self, path: str, module: nn.Module, weight_bits: int) -> tuple[int, int]:
        """Return (params, bytes) of the module's own tensors that no earlier module held."""
        params = size = 0
        declared = getattr(module, "weight_bytes", None)
        for name, x in self._own.get(path, []):
            if id(x) in self._seen:
                continue
            self._seen.add(id(x))
            if isinstance(x, nn.Parameter) or (declared is not None and name in ("weight", "bias")):
                params += x.numel()
            size += self._bytes(name, x, weight_bits)
        return params, size if declared is None else int(declared)

    @staticmethod
    def _bytes(name: str, x: Tensor, weight_bits: int) -> int:
        held = x.element_size() * _BITS_PER_BYTE
        width = min(weight_bits, held) if name == "weight" and x.dim() > 1 else held
        return math.ceil(x.numel() * width / _BITS_PER_BYTE)


def _theoretical(model: nn.Module, executed: dict[nn.Module, int]) -> dict[nn.Module, int]:
    """Return MACs per image with every stated ``theoretical_macs`` in place of its module's subtree."""
    counts = dict(executed)
    for module in model.modules():
        stated = getattr(module, "theoretical_macs", None)
        if stated is not None:
            for inner in module.modules():
                counts[inner] = 0
    outermost: set[nn.Module] = set()
    for module in model.modules():
        stated = getattr(module, "theoretical_macs", None)
        if stated is not None and module not in outermost:
            counts[module] = int(stated)
            outermost.update(m for m in module.modules() if m is not module)
    return counts


def _layers(
    model: nn.Module, found: Trace, kept: Sequence[SavedTensor], batch: int, bits: tuple[int, int] | None, held: int,
    shares: Mapping[nn.Module, float],
) -> list[LayerCost]:  # fmt: skip
    saved: dict[nn.Module, int] = {}
    for s in kept:
        saved[s.module] = saved.get(s.module, 0) + s.bytes
    products: dict[nn.Module, list[Product]] = {}
    for p in found.products:
        products.setdefault(p.module, []).append(p)
    theoretical = _theoretical(model, {m: round(sum(p.macs for p in ps) / batch) for m, ps in products.items()})
    store = _Store(model)
    rows = []
    for path, module in model.named_modules():
        own, share = products.get(module, []), shares.get(module, 1.0)
        per_image = share / batch
        weight, given = _widths(module, bool(own), bits, held)
        macs = round(per_image * sum(p.macs for p in own))
        additions = round(per_image * sum(p.steps * p.kind.additions for p in own))
        energy = per_image * sum(p.steps * energy_pj(p.kind, weight if p.weighted else given, given) for p in own)
        bops = round(per_image * sum(p.macs * given * (weight if p.weighted else given) for p in own))
        params, size = store.take(path, module, weight)
        put_out, held_back = round(share * found.output_bytes.get(module, 0)), saved.get(module, 0)
        expected = round(share * theoretical.get(module, 0))
        if macs or additions or expected or params or size or put_out or held_back:
            kind = type(module).__name__
            rows.append(
                LayerCost(
                    path, kind, macs, additions, energy, expected, bops, params, size, put_out, held_back,
                    weight, given,
                )
            )  # fmt: skip
    return rows


def _branches(model: nn.Module, found: Trace, batch: int) -> list[BranchCost]:
    own: dict[nn.Module, int] = {}
    for p in found.products:
        own[p.module] = own.get(p.module, 0) + p.macs
    return [
        BranchCost(name, share, round(sum(own.get(m, 0) for m in branch.modules()) / batch))
        for routed in model.modules()
        if isinstance(routed, Routed)
        for name, share, branch in zip(routed.names, routed.shares, routed.branches, strict=True)
    ]


def _check_bits(bits: int | Sequence[int] | None) -> tuple[int, int] | None:
    if bits is None:
        return None
    pair = (bits, bits) if isinstance(bits, int) else tuple(bits)
    if len(pair) != 2 or not all(1 <= b <= 64 for b in pair):
        raise RecipeError(f"cost: bits={bits!r}; allowed are one width or (weight, input), each 1..64")
    return int(pair[0]), int(pair[1])


@contextmanager
def _explained(
    model: nn.Module, inputs: tuple[Tensor, ...], remedy: str = "; pass an example it takes"
) -> Iterator[None]:
    """Turn whatever the model raises into one line that names the input."""
    try:
        yield
    except GossamerError:
        raise
    except Exception as err:
        given = ", ".join(str(list(x.shape)) for x in inputs)
        reason = first_line(err)
        raise ModelError(f"cost of {type(model).__name__}: input {given} fails ({reason}){remedy}") from err


def _saved(model: nn.Module, inputs: tuple[Tensor, ...], autocast: torch.dtype | None) -> list[SavedTensor]:
    """Return what the training pass keeps; of one image that is too few for a norm, half of what two keep."""
    try:
        return saved_tensors(model, inputs, autocast)
    except ValueError:
        if len(inputs[0]) > 1:
            raise
        two = tuple(torch.cat([x, x]) for x in inputs)
        return [replace(s, bytes=s.bytes // 2) for s in saved_tensors(model, two, autocast)]


def cost(
    model: nn.Module,
    example: Tensor | Sequence[Any] | None = None,
    *,
    bits: int | Sequence[int] | None = None,
    saved: bool = True,
    autocast: torch.dtype | None = None,
) -> Cost:
    """Return the cost of a model, from one evaluation pass and one training pass.

    The model runs where it is: on the ``meta`` device (``with torch.device("meta")``) large models
    cost nothing. A model that routes its images has the mean cost over the shares it states. Modes,
    buffers and random state are left as they were. MACs come from
    ``torch.utils.flop_counter``, halved; operators of one's own join by its
    ``register_flop_formula``, or by ``ops.steps`` where they do not multiply. A module may declare
    ``weight_bits``, ``input_bits`` (of a product of two activations: second and first operand),
    ``weight_bytes`` and ``theoretical_macs`` (MACs per image of the module with all it contains).

    Args:
        model: Any module.
        example: Input [B, ...], a tuple of inputs, a size (C, H, W) or (B, C, H, W), or ``None``
            for one image of the size the model states.
        bits: Width assumed of every product whose module declares none: one, or (weight, input).
            ``None`` takes the floats the model holds (32).
        saved: Whether to run the training pass for ``saved_activation_bytes``.
        autocast: Run the training pass under autocast to this type.

    Raises:
        ModelError: The input size is not known or wrong.
        RecipeError: ``bits`` out of range.
    """
    model, widths = deployed(model), _check_bits(bits)
    inputs = _inputs(model, example)
    batch = inputs[0].shape[0]
    held = _float_like(model)[1].itemsize * _BITS_PER_BYTE
    with _explained(model, inputs), evaluating(model), every_branch(model) as shares:
        found = trace(model, inputs)
    kept: list[SavedTensor] = []
    saved = saved and not shares
    if saved:
        with _explained(model, inputs, " in training; pass a larger batch, or saved=False to leave it out"):
            kept = [s for s in _saved(model, inputs, autocast) if not s.weight_copy]
    layers = _layers(model, found, kept, batch, widths, held, shares)
    return Cost(
        macs=sum(r.macs for r in layers),
        additions=sum(r.additions for r in layers),
        energy_pj=sum(r.energy_pj for r in layers),
        theoretical_macs=sum(r.theoretical_macs for r in layers),
        bops=sum(r.bops for r in layers),
        params=sum(r.params for r in layers),
        weight_bytes=sum(r.weight_bytes for r in layers),
        activation_bytes=sum(r.activation_bytes for r in layers),
        peak_activation_bytes=found.peak_bytes,
        saved_activation_bytes=sum(s.bytes for s in kept) if saved else None,
        saved_by_operator=by_operator(kept),
        input_shape=tuple(inputs[0].shape),
        per_layer=layers,
        branches=_branches(model, found, batch),
    )
