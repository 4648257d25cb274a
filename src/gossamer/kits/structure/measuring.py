"""Measure a latency table: a transformer's block, half by half, over a grid of widths, in a runtime.

Attention and MLP take turns, so a block takes as long as both. Attention itself is measured along (embedding,
heads, query width) with full values and along (embedding, heads, value width) with full queries: its
products with queries and with values follow each other as well. Every point is timed against the dense
block, round by round, so that drift and disturbances cancel; the dense model as a whole sets the scale.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, RecipeError
from gossamer.cost.contention import quartiles
from gossamer.cost.latency import Timing, bench
from gossamer.cost.latency_table import Grid, LatencyTable, Setting, setting_here
from gossamer.export.exporting import write_graph
from gossamer.kits.structure.regions import keep_first
from gossamer.kits.structure.vit import EMBED, open_blocks, slice_vit, vit_structures
from gossamer.models.preprocessing import preprocessing
from gossamer.models.timm_adapter import token_view
from gossamer.models.widths import widths_of
from gossamer.runtimes import get
from gossamer.runtimes.session import Session

__all__ = ["BlockMeter", "MeterOptions", "default_axes", "measure_table"]

Axes = dict[str, list[int]]
"""Positions by axis: ``embed``, ``heads``, ``qk``, ``v``, ``mlp``; the last of each is the dense width."""
_QUERIES, _VALUES, _MLP, _MODEL, _REST = "queries", "values", "mlp", "model", "rest"
_CHAIN = 2
"""Times a half is chained in one graph, so that reading input and writing output count less."""
_FORMATS = {"openvino": "openvino", "onnxruntime": "onnx"}


@dataclass(frozen=True)
class MeterOptions:
    """How to measure.

    Attributes:
        runtime: ``"openvino"``, ``"onnxruntime"`` or ``"torch"``.
        precision: Dense precision; ``None`` for the best the machine has in that runtime.
        threads: Threads, 1 or more.
        batch: Images a batch, 1 or more.
        rounds: Rounds of a point, each against the dense block; 3 or more.
        burst_s: Seconds a round aims at.
    """

    runtime: str = "openvino"
    precision: str | None = None
    threads: int = 2
    batch: int = 8
    rounds: int = 5
    burst_s: float = 0.05

    def setting(self, tokens: int) -> Setting:
        """Return the setting on this machine.

        Raises:
            RecipeError: Unknown or missing runtime, or a number out of range.
        """
        engine = get(self.runtime)
        if self.batch < 1 or self.rounds < 3 or self.burst_s < 0:
            given = f"batch={self.batch}, rounds={self.rounds}, burst_s={self.burst_s}"
            raise RecipeError(f"latency table: {given}; allowed are >= 1, >= 3 and >= 0")
        engine.check(self.precision, self.threads)
        precision = self.precision or engine.precisions()[-1]
        return setting_here(self.runtime, precision, self.threads, self.batch, tokens)


def default_axes(widths: Mapping[str, int], floors: Mapping[str, int]) -> Axes:
    """Return a small grid: the smallest width that can be reached, the middle, the dense width.

    Args:
        widths: Dense widths by axis (largest over the blocks).
        floors: Smallest reachable width by axis.
    """

    def spread(low: int, high: int, parts: int) -> list[int]:
        step = low if low > 1 else 1
        inner = [round((low + (high - low) * i / parts) / step) * step for i in range(1, parts)]
        return sorted({min(low, high), high, *(w for w in inner if low < w < high)})

    return {k: spread(floors[k], n, 3 if k == "mlp" else 2) for k, n in widths.items()}


class _Half(nn.Module):
    """``x + scale(part(norm(x)))``, several times over."""

    def __init__(self, norm: nn.Module, part: nn.Module, scale: nn.Module) -> None:
        super().__init__()
        self.norm, self.part, self.scale = norm, part, scale

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(_CHAIN):
            x = x + self.scale(self.part(self.norm(x)))
        return x


@dataclass(frozen=True)
class _Point:
    part: str
    at: dict[str, int]


class BlockMeter:
    """Measures the points of a table one by one, so that a caller can stop and go on.

    Args:
        model: A plain vision transformer with equal blocks; copied, not changed.
        axes: The grid.
        options: How to measure.

    Raises:
        ModelError: The blocks differ in width, or the grid does not end at it.
    """

    def __init__(self, model: nn.Module, axes: Axes, options: MeterOptions) -> None:
        self._model = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
        self.view = token_view(self._model)
        widths = widths_of(self._model)
        top = {"embed": widths.embed, **{k: max(getattr(widths, k)) for k in ("heads", "qk", "v", "mlp")}}
        if {k: a[-1] for k, a in axes.items()} != top:
            raise ModelError(f"latency table: axes {axes}; expected each to end at the dense width {top}")
        self.axes, self.top, self.depth = axes, top, widths.depth
        self._points = [p.copy() for p in widths.points()]
        self.options, self.setting = options, options.setting(self.view.num_tokens)
        self._one = self._first_block()
        self._folder = tempfile.TemporaryDirectory()
        self._reference: tuple[Session, np.ndarray] | None = None
        self.points = self._plan()

    def _plan(self) -> list[_Point]:
        a, top = self.axes, self.top

        def grid(part: str, names: Sequence[str], lists: Sequence[Sequence[int]]) -> list[_Point]:
            return [_Point(part, {**top, **dict(zip(names, c, strict=True))}) for c in itertools.product(*lists)]

        return [
            _Point(_MODEL, dict(top)),
            _Point(_REST, dict(top)),
            *grid(_QUERIES, ("embed", "heads", "qk"), (a["embed"], a["heads"], a["qk"])),
            *grid(_VALUES, ("embed", "heads", "v"), (a["embed"], a["heads"], a["v"][:-1])),
            *grid(_MLP, ("embed", "mlp"), (a["embed"], a["mlp"])),
        ]

    def _first_block(self) -> nn.Module:
        """Return the model with its widest block alone, opened."""
        one = copy.deepcopy(self._model)
        open_blocks(one)
        blocks = one.get_submodule(self.view.blocks[0].name.rpartition(".")[0])
        for i in reversed(range(1, len(self.view.blocks))):
            del blocks[i]  # type: ignore[operator]  # a Sequential or ModuleList
        return one

    def _half(self, point: _Point) -> nn.Module:
        one = copy.deepcopy(self._one)
        structures = vit_structures(one)
        name = self.view.blocks[0].name
        counts = {EMBED: point.at["embed"], f"{name}.head": point.at["heads"]}
        counts.update({f"{name}.{k}": point.at[k] for k in ("qk", "v", "mlp")})
        slice_vit(one, structures, keep_first(structures, counts))
        block: Any = one.get_submodule(name)
        if point.part == _MLP:
            return _Half(block.norm2, block.mlp, block.ls2)
        return _Half(block.norm1, block.attn, block.ls1)

    def _loaded(self, module: nn.Module, shape: tuple[int, ...], name: str) -> tuple[Session, np.ndarray]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        source: Any = module.eval()
        if self.options.runtime in _FORMATS:
            folder = Path(self._folder.name) / name
            folder.mkdir()
            source = write_graph(source, x, folder, _FORMATS[self.options.runtime])
        s = self.setting
        return get(s.runtime).load(source, precision=s.precision, threads=s.threads), x.numpy()

    def _session(self, point: _Point, name: str) -> tuple[Session, np.ndarray]:
        batch = self.options.batch
        if point.part in (_MODEL, _REST):
            model = copy.deepcopy(self._model)
            if point.part == _REST:
                blocks = model.get_submodule(self.view.blocks[0].name.rpartition(".")[0])
                for i in reversed(range(len(self.view.blocks))):
                    del blocks[i]  # type: ignore[operator]
            return self._loaded(model, (batch, *preprocessing(self._model).size), name)
        return self._loaded(self._half(point), (batch, self.view.num_tokens, point.at["embed"]), name)

    def measure(self, index: int) -> dict[str, Any]:
        """Time point ``index`` against the dense block's MLP; returns plain JSON for ``table``."""
        if self._reference is None:
            self._reference = self._session(_Point(_MLP, dict(self.top)), "reference")
        session, x = self._session(self.points[index], f"p{index}-{len(list(Path(self._folder.name).iterdir()))}")
        (ref_session, ref_x), o = self._reference, self.options
        timings = bench([ref_session, session], [ref_x, x], rounds=o.rounds, burst_s=o.burst_s)
        return _record(timings)

    def table(self, records: Sequence[Mapping[str, Any]]) -> LatencyTable:
        """Return the table made of the records of all points, in order.

        Raises:
            ModelError: Records are missing.
        """
        if len(records) != len(self.points):
            raise ModelError(f"latency table: {len(records)} records for {len(self.points)} points; measure them all")
        unit = statistics.median(r["reference_ms"] for r in records)
        ms = {(p.part, tuple(p.at.values())): unit * r["relative"] for p, r in zip(self.points, records, strict=True)}
        for key in ms:
            if key[0] not in (_MODEL, _REST):
                ms[key] /= _CHAIN
        parts = (self._grid(_QUERIES, ms), self._value_grid(ms), self._grid(_MLP, ms))
        top = tuple(self.top.values())
        rest = Grid({"embed": [0, self.top["embed"]]}, [0.0, ms[_REST, top]])
        plain = LatencyTable(self.setting, parts)
        dense = ms[_MODEL, top] - ms[_REST, top]
        notes = sorted({r["reason"] for r in records if r["reason"]})
        return LatencyTable(
            self.setting, parts, (rest,), dense / plain.model(self._points),
            sum(not r["reason"] for r in records) / len(records), tuple(notes[:5]),
        )  # fmt: skip

    def _cell(self, part: str, ms: Mapping[Any, float], **at: int) -> float:
        return ms[part, tuple({**self.top, **at}.values())]

    def _grid(self, part: str, ms: Mapping[Any, float]) -> Grid:
        names = ("embed", "heads", "qk") if part == _QUERIES else ("embed", "mlp")
        axes = {n: self.axes[n] for n in names}
        cells = [self._cell(part, ms, **dict(zip(names, c, strict=True))) for c in itertools.product(*axes.values())]
        return Grid(axes, np.reshape(cells, [len(a) for a in axes.values()]))

    def _value_grid(self, ms: Mapping[Any, float]) -> Grid:
        """Return what narrower values change, at full queries (0 at full values)."""
        axes = {n: self.axes[n] for n in ("embed", "heads", "v")}
        cells = []
        for e, h, v in itertools.product(*axes.values()):
            full = self._cell(_QUERIES, ms, embed=e, heads=h)
            cells.append(0.0 if v == self.top["v"] else self._cell(_VALUES, ms, embed=e, heads=h, v=v) - full)
        return Grid(axes, np.reshape(cells, [len(a) for a in axes.values()]))


def _record(timings: Sequence[Timing]) -> dict[str, Any]:
    """Return the lower quartiles of the rounds: what disturbs a point only ever adds to it."""
    reference, point = timings
    (ours, _, _), (theirs, _, _) = quartiles(reference.samples_ms), quartiles(point.samples_ms)
    return {
        "reference_ms": ours,
        "relative": theirs / ours,
        "reason": point.reason or reference.reason,
    }


def measure_table(
    model: nn.Module, *, axes: Axes | None = None, floors: Mapping[str, int] | None = None,
    options: MeterOptions | None = None, path: str | Path | None = None,
) -> LatencyTable:  # fmt: skip
    """Measure a model's latency table on this machine; about a second a point.

    Args:
        model: A plain vision transformer with equal blocks.
        axes: The grid; by default a small one from ``floors`` to the dense widths.
        floors: Smallest width of interest by axis; by default 16 channels and one head.
        options: Runtime, precision, threads, batch.
        path: Where to keep the table.
    """
    widths = widths_of(model)
    top = {"embed": widths.embed, **{k: max(getattr(widths, k)) for k in ("heads", "qk", "v", "mlp")}}
    low = dict(floors) if floors is not None else {k: 1 if k == "heads" else min(16, n) for k, n in top.items()}
    meter = BlockMeter(model, axes or default_axes(top, low), options or MeterOptions())
    table = meter.table([meter.measure(i) for i in range(len(meter.points))])
    if path is not None:
        table.save(path)
    return table
