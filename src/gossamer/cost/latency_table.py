"""Latency tables: measured milliseconds of a block over a grid of its widths, and what lies between.

A table belongs to one device, runtime, precision, thread count, batch and number of tokens, all of which
it states. It is plain JSON, so that it can be measured once, kept in a file and used again.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core.errors import ModelError, StateError
from gossamer.runtimes.device import device_key

__all__ = ["Grid", "LatencyTable", "Setting", "released_grid", "setting_here"]

FORMAT, VERSION = "gossamer-latency-table", 1


@dataclass(frozen=True)
class Grid:
    """Values on a rectangular grid, multilinear in between.

    Attributes:
        axes: Name and rising positions of every axis.
        values: Nested lists (or an array) with one level an axis.
    """

    axes: Mapping[str, Sequence[float]]
    values: Any

    def __post_init__(self) -> None:
        shape = tuple(len(a) for a in self.axes.values())
        if np.shape(self.values) != shape or any(list(a) != sorted(set(a)) for a in self.axes.values()):
            raise ModelError(f"grid of shape {np.shape(self.values)} with axes {dict(self.axes)}; expected rising axes")

    def at(self, point: Mapping[str, float]) -> float:
        """Return the interpolated value; beyond the grid the nearest cell is carried on, never below 0.

        Args:
            point: Position by axis name (others are ignored).
        """
        cells: list[list[tuple[int, float]]] = []
        for name, axis in self.axes.items():
            if len(axis) == 1:
                cells.append([(0, 1.0)])
                continue
            i = min(max(int(np.searchsorted(axis, point[name], side="right")) - 1, 0), len(axis) - 2)
            share = (point[name] - axis[i]) / (axis[i + 1] - axis[i])
            cells.append([(i, 1.0 - share), (i + 1, share)])
        array = np.asarray(self.values, dtype=np.float64)
        return float(
            sum(
                math.prod(w for _, w in corner) * array[tuple(i for i, _ in corner)]
                for corner in itertools.product(*cells)
            )
        )


@dataclass(frozen=True)
class Setting:
    """What a table was measured in.

    Attributes:
        device: ``device_key()`` of the machine.
        runtime: Runtime.
        precision: Dense precision.
        threads: Threads.
        batch: Images a batch.
        tokens: Tokens of a block.
    """

    device: str
    runtime: str
    precision: str
    threads: int
    batch: int
    tokens: int


@dataclass(frozen=True)
class LatencyTable:
    """Latency of a model as a function of the widths of its blocks, in milliseconds a batch.

    Attributes:
        setting: What it was measured in.
        parts: Grids whose sum is the latency of a block.
        rest: Grids whose sum is the latency of what lies outside the blocks.
        scale: Factor on the blocks that makes the dense model come out as measured as a whole.
        trusted: Share of the measured points that the meter trusted, in [0, 1].
        notes: What the meter had to say.
    """

    setting: Setting
    parts: tuple[Grid, ...]
    rest: tuple[Grid, ...] = ()
    scale: float = 1.0
    trusted: float = 1.0
    notes: tuple[str, ...] = field(default=())

    def block(self, point: Mapping[str, float]) -> float:
        """Return the milliseconds of a block of these widths."""
        return self.scale * max(0.0, sum(p.at(point) for p in self.parts))

    def model(self, points: Sequence[Mapping[str, float]]) -> float:
        """Return the milliseconds of a model whose blocks have these widths, in order."""
        return sum(self.block(p) for p in points) + sum(max(0.0, r.at(points[0])) for r in self.rest)

    def describe(self) -> str:
        """Return in a few words what the table was measured in."""
        s = self.setting
        return f"{s.device}, {s.runtime} {s.precision}, {s.threads} threads, batch {s.batch}, {s.tokens} tokens"

    def mismatch(self, setting: Setting) -> str:
        """Return in what the table differs from ``setting``, ``""`` if in nothing."""
        ours, theirs = asdict(self.setting), asdict(setting)
        odd = [f"{k} {ours[k]!r} here {theirs[k]!r}" for k in ours if ours[k] != theirs[k]]
        return "; ".join(odd)

    # -- in and out ------------------------------------------------------------------------------
    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""

        def grids(many: Iterable[Grid]) -> list[dict[str, Any]]:
            return [
                {"axes": {k: list(v) for k, v in g.axes.items()}, "values": np.asarray(g.values).tolist()} for g in many
            ]

        return {
            "format": FORMAT, "version": VERSION, "unit": "ms", **asdict(self.setting), "parts": grids(self.parts),
            "rest": grids(self.rest), "scale": self.scale, "trusted": self.trusted, "notes": list(self.notes),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "latency table") -> LatencyTable:
        """Undo ``to_json``.

        Raises:
            StateError: Not a latency table, damaged, or of a newer format.
        """
        if data.get("format") != FORMAT or not isinstance(data.get("version"), int):
            raise StateError(f"{where}: no latency table (no format {FORMAT!r}); measure one")
        if data["version"] > VERSION:
            raise StateError(f"{where}: format version {data['version']}, this gossamer reads up to {VERSION}; upgrade")
        try:
            setting = Setting(**{k: data[k] for k in Setting.__dataclass_fields__})
            parts, rest = (tuple(Grid(g["axes"], g["values"]) for g in data[k]) for k in ("parts", "rest"))
            return cls(setting, parts, rest, data["scale"], data["trusted"], tuple(data["notes"]))
        except (KeyError, TypeError, ModelError) as err:
            raise StateError(f"{where}: damaged ({err}); measure the table again") from err

    def save(self, path: str | Path) -> None:
        """Write the table as a JSON file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table.

        Raises:
            StateError: The file is missing or holds no table.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
            raise StateError(f"latency table {path}: cannot be read ({err}); measure it again") from err
        if not isinstance(data, dict):
            raise StateError(f"latency table {path}: holds a {type(data).__name__}; measure it again")
        return cls.from_json(data, f"latency table {path}")

    @classmethod
    def here(cls, path: str | Path, setting: Setting) -> tuple[LatencyTable, str]:
        """Read a table and say in one sentence what is wrong with using it in ``setting`` (``""``: nothing)."""
        table = cls.load(path)
        odd = table.mismatch(setting)
        if not odd:
            return table, ""
        what = "was measured on another device or in another way" if "device" in odd else "was measured in another way"
        return table, f"latency table {path} {what} ({odd}): its figures may misrank widths here; measure it again"


def setting_here(runtime: str, precision: str, threads: int, batch: int, tokens: int) -> Setting:
    """Return a setting on this machine."""
    return Setting(device_key(), runtime, precision, threads, batch, tokens)


def released_grid(measured: Mapping[str, Any]) -> Grid:
    """Read the table format of NViT's release (keys ``EMB_e``, ``QK_h_q``, ``V_v``, ``MLP_m``; seconds of a block).

    A block of embedding width 0 takes no time; an MLP of width 0 stands for 1 (release).

    Args:
        measured: The parsed JSON.

    Raises:
        ModelError: A point of the grid is missing.
    """
    axes = {
        "embed": [0, *sorted(int(k.partition("_")[2]) for k in measured)],
        "heads": (1, 3, 6, 9, 12),
        "qk": (1, 16, 32, 48, 64),
        "v": (1, 16, 32, 48, 64),
        "mlp": tuple(128 * i for i in range(25)),
    }
    values = np.zeros([len(a) for a in axes.values()])
    try:
        for at in itertools.product(*(enumerate(a) for a in axes.values())):
            (_, e), (_, h), (_, q), (_, v), (_, m) = at
            if e:
                values[tuple(i for i, _ in at)] = measured[f"EMB_{e}"][f"QK_{h}_{q}"][f"V_{v}"][f"MLP_{m or 1}"]
    except KeyError as err:
        raise ModelError(f"released latency table: no entry {err}; expected the full grid of 9375 points") from err
    return Grid(axes, values)
