"""Calibration images, and what passes through a layer while they run.

Nothing is recorded for longer than one layer needs it: rows are subsampled as they pass, extremes
and means are accumulated over all of them, and a forward pass ends at the layer in question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import DataError, ModelError, RecipeError
from gossamer.core.method import Method
from gossamer.core.schedule import Batch, Loader, Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.ops.quant import QuantConv2d, QuantMatMul, fake_quantize

__all__ = [
    "Captured",
    "Observe",
    "RowPick",
    "TopMagnitudes",
    "Walk",
    "calibrate",
    "calibration_batches",
    "capture_inputs",
    "capture_outputs",
    "mean_quantized_input",
    "operands",
    "result",
]

Observe = Callable[[tuple[Tensor, ...], Tensor | None, int], None]
"""Called with a layer's inputs, its output (``None`` before it ran) and the batch size."""


# -- images ------------------------------------------------------------------------------------------
def calibration_batches(loaders: Mapping[str, Loader], count: int, step: Step) -> list[Tensor]:
    """Return ``count`` calibration images as batches [B, C, H, W], the same at every call.

    Takes fewer where the loader has fewer distinct ids.

    Args:
        loaders: Loaders by name; ``"calibration"`` is read.
        count: Number of images.
        step: Where in the run; phase and seed select the images.

    Raises:
        RecipeError: ``count`` below 1.
        DataError: No calibration loader, or it yields no image.
    """
    if count < 1:
        raise RecipeError(f"calibration: images={count}; calibrating needs at least 1 image. Set images, e.g. 32")
    if "calibration" not in loaders:
        raise DataError("calibration: no images were given; name them (data.calibration) or train on some (data.train)")
    loader = loaders["calibration"]
    found: list[Tensor] = []
    seen: set[str] = set()
    total = 0
    while total < count:
        batch = loader(Step(step.phase, "calibration", len(found), count, step.seed, 0))
        images, ids = batch["image"], batch.get("id")
        if ids is not None:
            fresh = [i for i, name in enumerate(ids) if name not in seen]
            seen.update(ids)
            images = images[fresh]
        images = images[: count - total]
        if len(images) == 0:
            break
        found.append(images)
        total += len(images)
    if not found:
        raise DataError("calibration: the calibration data hold 0 images; give at least 1 (32 are a good number)")
    return found


@torch.no_grad()
def calibrate(method: Method, model: nn.Module, images: Tensor | Sequence[Batch], *, seed: int = 0) -> nn.Module:
    """Carry out a method that only calibrates, without an engine; returns the finished model.

    Args:
        method: A method whose phases all have ``work``.
        model: The float model; it is changed.
        images: [N, C, H, W], preprocessed, or batches of such.
        seed: Seed of the run.

    Raises:
        GossamerError: As ``method`` raises; zero images are a ``DataError``.
    """
    if isinstance(images, Tensor):
        images = [{"image": part} for part in images.split(16)] if len(images) else []
    batches = list(images)

    def loader(step: Step) -> Batch:
        empty = {"image": torch.empty(0)}
        return batches[step.index] if step.index < len(batches) else empty

    was_training = model.training
    stack = Stack([method])
    model = stack.prepare(model).eval()
    for phase in stack.phases(Plan([Phase("fit", 0)])):
        model = stack.enter(model, phase)
        for i in range(phase.steps if phase.work is not None else 0):
            phase.work(model, {"calibration": loader}, Step(phase.name, "work", i, phase.steps, seed))  # type: ignore[misc]
        model = stack.leave(model, phase)
    return stack.finish(model).train(was_training)


# -- running up to a layer -----------------------------------------------------------------------------
class _Reached(Exception):
    """Ends a forward pass."""


class Walk:
    """Runs calibration images through a model, as far as a layer of interest.

    Args:
        model: Model in evaluation mode.
        batches: Images [B, C, H, W].
        replay: Whether blocks may be run on their own on the arguments they once received. Not
            where blocks share state during a forward pass (token tracks).
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], *, replay: bool = True) -> None:
        self.model, self.batches, self.replay = model, batches, replay
        self._start: tuple[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any]]]] | None = None
        self.calls: dict[str, int] = {}

    @property
    def num_images(self) -> int:
        """Number of calibration images."""
        return sum(len(b) for b in self.batches)

    @torch.no_grad()
    def order(self, layers: Mapping[str, nn.Module]) -> list[str]:
        """Return the names of the layers in the order in which a forward pass first reaches them.

        Layers that no forward pass reaches are missing from it.
        """
        self.calls = {}

        def note(name: str) -> Callable[..., None]:
            return lambda module, args: self.calls.update({name: self.calls.get(name, 0) + 1})

        with _hooks(m.register_forward_pre_hook(note(n)) for n, m in layers.items()):
            self.model(self.batches[0][:1])
        return list(self.calls)

    @torch.no_grad()
    def start_at(self, name: str) -> None:
        """Let later runs start at the module ``name`` with the arguments it receives now.

        Without effect where ``replay`` is off, the name is empty or the module runs more than
        once a pass.
        """
        self._start = None
        if not self.replay or not name:
            return
        module, calls = self.model.get_submodule(name), []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))
            raise _Reached

        with _hooks([module.register_forward_pre_hook(note, with_kwargs=True)]):
            for batch in self.batches:
                with _until_reached():
                    self.model(batch)
        if len(calls) == len(self.batches):
            self._start = (module, calls)

    def start_over(self) -> None:
        """Let later runs start at the images."""
        self._start = None

    @torch.no_grad()
    def run(self, observers: Mapping[str, Observe], *, outputs: bool) -> None:
        """Run all images and hand what passes the named layers to their observers.

        Args:
            observers: One per layer; all layers must come after the module of ``start_at``.
            outputs: Whether the observers want outputs; if not, a pass ends before the last layer runs.
        """
        left = 0

        def hook(name: str, size: int) -> Callable[..., None]:
            def reached(module: nn.Module, args: tuple[Tensor, ...], out: Tensor | None = None) -> None:
                nonlocal left
                observers[name](args, out, size)
                left -= 1
                if left == 0:
                    raise _Reached

            return reached

        for i, batch in enumerate(self.batches):
            left = sum(self.calls.get(n, 1) for n in observers)
            kind = "register_forward_hook" if outputs else "register_forward_pre_hook"
            with _hooks(getattr(self.model.get_submodule(n), kind)(hook(n, len(batch))) for n in observers):
                with _until_reached():
                    if self._start is None:
                        self.model(batch)
                    else:
                        module, calls = self._start
                        module(*calls[i][0], **calls[i][1])


@contextmanager
def _hooks(handles: Any) -> Iterator[None]:
    held = []
    try:
        held.extend(handles)
        yield
    finally:
        for handle in held:
            handle.remove()


@contextmanager
def _until_reached() -> Iterator[None]:
    try:
        yield
    except _Reached:
        pass


# -- what passes a layer ---------------------------------------------------------------------------------
def _split(name: str, x: Tensor, batch: int) -> Tensor:
    """Return ``x`` [B * windows, ...] as [B, windows, ...]; windows of one image are neighbours."""
    if x.shape[0] % batch:
        raise ModelError(f"layer {name!r}: first axis {x.shape[0]} for {batch} images; expected a multiple of it")
    return x.reshape(batch, x.shape[0] // batch, *x.shape[1:])


def operands(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """Return a layer's inputs by sample.

    Returns:
        A linear layer: [S, windows, tokens, in]. A convolution: unfolded patches
        [S, 1, patches, in * kernel]. A product: [S, windows, ..., M, K] and [S, windows, ..., K, N].
    """
    if isinstance(layer, QuantMatMul):
        return _split(name, inputs[0], batch), _split(name, inputs[1], batch)
    if isinstance(layer, QuantConv2d):
        size = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return (F.unfold(inputs[0], *size).transpose(1, 2).unsqueeze(1),)  # type: ignore[arg-type]
    x = _split(name, inputs[0], batch)
    return (x.reshape(x.shape[0], x.shape[1], -1, x.shape[-1]),)


def result(name: str, layer: nn.Module, out: Tensor, batch: int) -> Tensor:
    """Return a layer's output by sample, rows as in ``operands``."""
    if isinstance(layer, QuantConv2d):
        return out.flatten(2).transpose(1, 2).unsqueeze(1)
    x = _split(name, out, batch)
    return x if isinstance(layer, QuantMatMul) else x.reshape(x.shape[0], x.shape[1], -1, x.shape[-1])


class RowPick:
    """Which windows and rows of a sample are kept: the same for all images, inputs and outputs.

    Windows are kept whole as far as the limit allows.

    Args:
        limit: Rows per sample, or ``None`` for all. A few rows can miss the very tokens that carry
            a transformer's largest activations; prefer fewer ``images``.
        key: Seed of the choice.
        images: Samples, counted from the first, or ``None`` for all.
    """

    def __init__(self, limit: int | None, key: int, images: int | None = None) -> None:
        self.limit, self.key, self.images = limit, key, images

    def samples(self, x: Tensor, before: int) -> Tensor:
        """Return the samples of ``x`` [S, ...] to keep when ``before`` of the same layer are kept already."""
        return x if self.images is None else x[: max(0, self.images - before)]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the kept part of ``x`` [S, windows, ..., rows, C]."""
        if self.limit is None:
            return x
        rows = self._choice(x.shape[-2], self.limit, x.device)
        return self.windows(x, x.shape[-2]).index_select(-2, rows)

    def windows(self, x: Tensor, per_window: int) -> Tensor:
        """Return ``x`` [S, windows, ...] in the windows kept where each has ``per_window`` rows."""
        if self.limit is None or x.shape[1] == 1:
            return x
        return x.index_select(1, self._choice(x.shape[1], max(1, self.limit // per_window), x.device))

    def _choice(self, size: int, keep: int, device: torch.device) -> Tensor:
        if size <= keep:
            return torch.arange(size, device=device)
        draw = torch.randperm(size, generator=torch.Generator().manual_seed(self.key + size))
        return draw[:keep].sort().values.to(device)

    def complete(self, x: Tensor) -> bool:
        """Return whether nothing of ``x`` [S, windows, ..., rows, C] would be left out."""
        return self.limit is None or x.shape[1] * x.shape[-2] <= self.limit


@dataclass
class Captured:
    """What was seen at one layer.

    Attributes:
        parts: Kept operands: one tensor for a linear layer, two for a product.
        top: Largest magnitude of each operand, over everything that passed.
        out: Kept outputs.
        mean: Mean output per channel over everything that passed [out] (not for products).
        complete: Whether ``parts`` hold everything that passed.
    """

    parts: tuple[Tensor, ...] = ()
    top: tuple[Tensor, ...] = ()
    out: Tensor | None = None
    mean: Tensor | None = None
    complete: bool = True


@dataclass
class _Sums:
    total: Tensor | float = 0.0
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Add all rows of ``x`` [..., C]."""
        flat = x.reshape(-1, x.shape[-1])
        self.total = self.total + flat.sum(0, dtype=torch.float64)
        self.count += flat.shape[0]

    def mean(self) -> Tensor:
        """Return the mean row [C] in double precision."""
        return torch.as_tensor(self.total) / max(1, self.count)


@dataclass
class _InputObserver:
    name: str
    layer: nn.Module
    pick: RowPick
    kept: list[tuple[Tensor, ...]] = field(default_factory=list)
    top: list[Tensor] = field(default_factory=list)
    complete: bool = True
    samples: int = 0

    def __call__(self, inputs: tuple[Tensor, ...], out: Tensor | None, batch: int) -> None:
        parts = operands(self.name, self.layer, inputs, batch)
        tops = [p.abs().amax().reshape(1) for p in parts]
        self.top = tops if not self.top else [torch.maximum(a, b) for a, b in zip(self.top, tops, strict=True)]
        few = tuple(self.pick.samples(p, self.samples) for p in parts)
        self.complete = self.complete and self.pick.complete(parts[0]) and len(few[0]) == len(parts[0])
        parts = few
        # the right operand of a product is needed whole: every kept row meets all of it
        whole = [self.pick.windows(p, parts[0].shape[-2]).clone() for p in parts[1:]]
        self.kept.append((self.pick(parts[0]).clone(), *whole))
        self.samples += len(parts[0])


def capture_inputs(walk: Walk, name: str, pick: RowPick) -> Captured:
    """Record what enters the layer ``name`` as the model stands now."""
    seen = _InputObserver(name, walk.model.get_submodule(name), pick)
    walk.run({name: seen}, outputs=False)
    parts = tuple(torch.cat(p) for p in zip(*seen.kept, strict=True))
    return Captured(parts=parts, top=tuple(seen.top), complete=seen.complete)


def capture_outputs(walk: Walk, picks: Mapping[str, RowPick]) -> dict[str, Captured]:
    """Record what several layers put out as the model stands now, in one pass."""
    kept: dict[str, list[Tensor]] = {n: [] for n in picks}
    sums = {n: _Sums() for n in picks}

    def observer(name: str) -> Observe:
        layer = walk.model.get_submodule(name)

        def observe(inputs: tuple[Tensor, ...], out: Tensor | None, batch: int) -> None:
            assert out is not None  # noqa: S101 - a forward hook always has one
            by_sample = result(name, layer, out, batch)
            few = picks[name].samples(by_sample, sum(map(len, kept[name])))
            kept[name].append(picks[name](few).clone())
            if not isinstance(layer, QuantMatMul):
                sums[name].add(by_sample)

        return observe

    walk.run({n: observer(n) for n in picks}, outputs=True)
    return {
        n: Captured(out=torch.cat(kept[n]), mean=sums[n].mean() if sums[n].count else None) for n in picks if kept[n]
    }


def mean_quantized_input(walk: Walk, name: str) -> tuple[Tensor, Tensor]:
    """Return the mean rows [in] of a weight layer's input, plain and on its grid, over everything that passes."""
    layer: Any = walk.model.get_submodule(name)
    plain, grid = _Sums(), _Sums()

    def observe(inputs: tuple[Tensor, ...], out: Tensor | None, batch: int) -> None:
        (x,) = operands(name, layer, inputs, batch)
        plain.add(x)
        grid.add(fake_quantize(x, layer.input_scale, layer.bits[1], layer.signed))

    walk.run({name: observe}, outputs=False)
    return plain.mean(), grid.mean()


class TopMagnitudes:
    """Exact high percentile of |x| over a stream of known length, in the memory of its tail.

    Args:
        percentile: In (0, 100]; 100 is the maximum.
        share_seen: Share of the whole stream that the first ``add`` brings, in (0, 1].
    """

    def __init__(self, percentile: float, share_seen: float = 1.0) -> None:
        if not 0 < percentile <= 100:
            raise RecipeError(f"percentile={percentile}; allowed are 0 < percentile <= 100")
        self._tail, self._share, self._keep = 1 - percentile / 100, share_seen, 0
        self._top = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Take in the magnitudes of ``x`` (any shape)."""
        flat = x.detach().abs().flatten()
        if self._keep == 0:
            self._keep = math.floor(self._tail * flat.numel() / self._share) + 1
            self._top = flat.new_empty(0)
        flat = torch.cat((self._top, flat.topk(min(self._keep, flat.numel())).values))
        self._top = flat.topk(min(self._keep, flat.numel())).values

    def value(self) -> Tensor:
        """Return the percentile [1]: the largest magnitude that at most the tail exceeds."""
        return self._top[-1:].clone()
