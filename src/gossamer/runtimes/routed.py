"""A routed model as several graphs: a router, one graph a branch, and ``routing.json`` that ties them together.

Graphs have fixed shapes but for the number of images, so every runtime compiles each branch for what it sees; the
images of a call are grouped by the branch that the router chooses, and each branch runs once for its group.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core.errors import ModelError, StateError
from gossamer.runtimes.session import OpTime, Session

__all__ = [
    "ROUTING", "BranchGraph", "RoutedSession", "Routing", "as_recorded", "is_routing", "read_routing", "write_routing",
]  # fmt: skip

ROUTING = "routing.json"
"""File that describes a routed model; what a runtime is asked to load."""
KIND, VERSION = "gossamer-routing", 1
_PIECE = 32
"""Largest number of images that a graph is compiled for where a call has no stated number."""


@dataclass(frozen=True)
class BranchGraph:
    """One branch.

    Attributes:
        name: What the model calls it.
        graph: Its graph file, relative to the folder.
        share: Share of the images it was measured to take, in [0, 1].
        macs: MACs of one image that takes it, the router left out.
    """

    name: str
    graph: str
    share: float
    macs: int


@dataclass(frozen=True)
class Routing:
    """What ``routing.json`` says.

    Attributes:
        router: Graph file of the router, relative to the folder: images to scores [B, m].
        branches: The branches, in the order of the scores.
        batch: Images of a call, or ``"dynamic"``.
        router_macs: MACs of the router for one image.
    """

    router: str
    branches: tuple[BranchGraph, ...]
    batch: int | str
    router_macs: int

    @property
    def graphs(self) -> list[str]:
        """All graph files, the router's first."""
        return [self.router, *(b.graph for b in self.branches)]

    @property
    def mean_macs(self) -> float:
        """MACs per image under the recorded shares, the router included."""
        return self.router_macs + sum(b.share * b.macs for b in self.branches)


def is_routing(source: Any) -> bool:
    """Whether ``source`` is the description of a routed model, or a folder that holds one."""
    if not isinstance(source, str | Path):
        return False
    path = Path(source)
    return path.name == ROUTING or (path.is_dir() and (path / ROUTING).is_file())


def write_routing(routing: Routing, folder: Path) -> Path:
    """Write the description; returns the file."""
    plain = {"kind": KIND, "version": VERSION, "rule": "largest score", **asdict(routing)}
    file = folder / ROUTING
    file.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    return file


def read_routing(source: str | Path) -> tuple[Routing, Path]:
    """Return the description and the folder that its files lie in.

    Raises:
        ModelError: It cannot be read, or a graph is missing.
        StateError: Written by a newer gossamer.
    """
    path = Path(source)
    file = path / ROUTING if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        kind, version = data["kind"], int(data["version"])
        if kind == KIND and version > VERSION:
            raise StateError(f"{file}: version {version}; this gossamer reads up to {VERSION}. Update gossamer")
        branches = tuple(BranchGraph(**b) for b in data["branches"])
        found = Routing(data["router"], branches, data["batch"], int(data["router_macs"]))
    except (OSError, ValueError, KeyError, TypeError) as err:
        reason = f"{type(err).__name__}: {err}"
        raise ModelError(f"{file}: not a description of a routed model ({reason}); export it again") from err
    if kind != KIND or not branches:
        raise ModelError(f"{file}: kind {kind!r}, {len(branches)} branches; expected {KIND!r} with 1 or more")
    for graph in found.graphs:
        if not (file.parent / graph).is_file():
            raise ModelError(f"{file}: {graph} is missing; export the model again")
    return found, file.parent


class _Part:
    """One graph, run on any number of images: at once, or in pieces of fixed numbers, each compiled when first used."""

    def __init__(self, load: Callable[[int | None], Session], sizes: Sequence[int]) -> None:
        self._load, self._sizes = load, sorted(sizes, reverse=True)
        self._sessions: dict[int | None, Session] = {}
        self._calls: dict[int | None, int] = {}

    def session(self, size: int | None = None) -> Session:
        """Return the session for pieces of ``size`` images."""
        if size not in self._sessions:
            self._sessions[size] = self._load(size)
        return self._sessions[size]

    def _call(self, size: int | None, x: np.ndarray) -> np.ndarray:
        self._calls[size] = self._calls.get(size, 0) + 1
        return self.session(size).run(x)

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the outputs for ``x`` [B, C, H, W]."""
        if not self._sizes:
            return self._call(None, x)
        outs, start = [], 0
        for size in self._sizes:
            while len(x) - start >= size:
                outs.append(self._call(size, x[start : start + size]))
                start += size
        return outs[0] if len(outs) == 1 else np.concatenate(outs)

    def profile(self) -> list[OpTime]:
        """Return the time of every operator, summed over all calls."""
        return [replace(op, ms=op.ms * n) for size, n in self._calls.items() for op in self.session(size).profile()]


class RoutedSession(Session):
    """Router and branches loaded into one runtime.

    Attributes:
        names: Names of the branches.
        shares: Share of the images that each branch was measured to take.
        taken: Images that each branch has run so far.
        chosen: Index of the branch of every image of the last call, [B].
        recorded: Assign images by ``shares``, whatever the router says (it still runs): for timing on inputs that
            stand for no image, such as noise.
    """

    def __init__(
        self, routing: Routing, where: str, load: Callable[[str, int | None], Session], *, fixed: bool = False
    ) -> None:
        """Load the graphs of ``routing``.

        Args:
            routing: The description.
            where: Name for messages.
            load: Loads one of its graphs, for a number of images or (``None``) for as many as it was exported for.
            fixed: Compile the graphs for fixed numbers of images (powers of two and that of a whole call), which
                groups of any size are put together from: less time than graphs for any number, more memory.
        """
        free = routing.batch != 1
        most = routing.batch if isinstance(routing.batch, int) else _PIECE
        sizes = {most, *(2**k for k in range(most.bit_length()))} if fixed and free else ()
        self._router, *self._branches = [_Part(partial(load, graph), sorted(sizes)) for graph in routing.graphs]
        first = self._router.session(max(sizes) if sizes else None)
        self.runtime, self.where = first.runtime, where
        self.precision, self.threads = first.precision, first.threads
        self.names = tuple(b.name for b in routing.branches)
        self.shares = tuple(b.share for b in routing.branches)
        self.taken = [0] * len(self.names)
        self.chosen = np.zeros(0, dtype=np.int64)
        self.recorded = False
        self._num_runs = 0
        self.input_shape = (None if free else 1, *(first.input_shape or ())[1:])

    def _run(self, x: np.ndarray) -> np.ndarray:
        self._num_runs += 1
        self.chosen = self._router.run(x).argmax(1)
        if self.recorded:
            self.chosen = np.repeat(np.arange(len(self.shares)), apportion(self.shares, len(x)))
        out: np.ndarray | None = None
        for j, branch in enumerate(self._branches):
            rows = np.flatnonzero(self.chosen == j)
            if not len(rows):
                continue
            self.taken[j] += len(rows)
            part = branch.run(x if len(rows) == len(x) else x[rows])
            if out is None:
                out = np.empty((len(x), *part.shape[1:]), part.dtype)
            out[rows] = part
        assert out is not None  # noqa: S101 - every image has a branch
        return out

    def profile(self) -> list[OpTime]:
        """See ``Session.profile``; means over the calls of the whole, so that rare branches weigh little."""
        if not self._num_runs:
            raise StateError("profile: 0 runs recorded; call run(x) at least once (twice leaves out the warm-up)")
        parts = zip(("router", *self.names), (self._router, *self._branches), strict=True)
        return [
            replace(op, name=f"{name}/{op.name}", ms=op.ms / self._num_runs) for name, p in parts for op in p.profile()
        ]


def apportion(shares: Sequence[float], count: int) -> list[int]:
    """Return whole numbers that add up to ``count`` in proportion to ``shares`` (largest remainders)."""
    exact = [s * count / sum(shares) for s in shares]
    whole = [int(e) for e in exact]
    rest = sorted(range(len(shares)), key=lambda j: whole[j] - exact[j])
    for j in rest[: count - sum(whole)]:
        whole[j] += 1
    return whole


def as_recorded(session: Session) -> Session:
    """Let a routed session assign images by its recorded shares (see ``RoutedSession``); others stay as they are."""
    if isinstance(session, RoutedSession):
        session.recorded = True
    return session
