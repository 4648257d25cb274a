"""What every runtime offers: loading a model into a session, running it, asking where time went."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core.errors import ModelError, RecipeError, StateError, nearest
from gossamer.runtimes.device import best_dense_precisions

__all__ = ["OpClock", "OpTime", "Runtime", "Session", "first_line", "int8_share"]


@dataclass(frozen=True)
class OpTime:
    """Time of one operator of a graph.

    Attributes:
        name: Node name in the runtime's graph.
        type: Operator type (``"FullyConnected"``, ``"QLinearMatMul"``, ``"aten::addmm"``).
        kernel: Kernel that ran (``"brgemm_avx512_i8"``); the type where the runtime does not tell.
        precision: Arithmetic it ran in: ``"i8"``, ``"bf16"``, ``"f16"``, ``"f32"``; ``""`` if not told.
            A fused group is as wide as its widest input, so a share of int8 is never overstated.
        ms: Mean milliseconds per run.
        product: Whether it is a matrix product or convolution (or a fused group that holds one).
    """

    name: str
    type: str
    kernel: str
    precision: str
    ms: float
    product: bool = False


def int8_share(ops: Iterable[OpTime], *, by: str = "time") -> float:
    """Return the share of products and convolutions executed by int8 kernels, 0..1 (0 without any).

    Args:
        ops: A profile.
        by: ``"time"`` weighs by milliseconds, ``"count"`` counts operators.

    Raises:
        RecipeError: ``by`` is neither.
    """
    if by not in ("time", "count"):
        raise RecipeError(f"int8_share: by={by!r}; allowed are 'time' and 'count'")
    weights = [(op.ms if by == "time" else 1.0, op.precision == "i8") for op in ops if op.product]
    total = sum(weight for weight, _ in weights)
    return sum(weight for weight, is_int8 in weights if is_int8) / total if total else 0.0


class OpClock:
    """Adds up operator times over runs; the first run is left out once there are others."""

    def __init__(self) -> None:
        self._runs: list[dict[OpTime, float]] = []

    def add(self, ops: Iterable[OpTime]) -> None:
        """Take the operators of one run; several of one name and type are summed."""
        run: dict[OpTime, float] = defaultdict(float)
        for op in ops:
            run[OpTime(op.name, op.type, op.kernel, op.precision, 0.0, op.product)] += op.ms
        self._runs.append(dict(run))

    def mean(self) -> list[OpTime]:
        """Return the mean times, in the order of execution.

        Raises:
            StateError: Nothing was run.
        """
        if not self._runs:
            raise StateError("profile: 0 runs recorded; call run(x) at least once (twice leaves out the warm-up)")
        runs = self._runs[1:] or self._runs
        keys = dict.fromkeys(key for run in runs for key in run)
        return [
            OpTime(k.name, k.type, k.kernel, k.precision, sum(r.get(k, 0.0) for r in runs) / len(runs), k.product)
            for k in keys
        ]


class Session(ABC):
    """A model loaded into a runtime.

    Attributes:
        runtime: Name of the runtime.
        precision: Dense precision in use; int8 parts of a graph run as int8 under any.
        threads: Number of threads.
        input_shape: Shape of the input, ``None`` for a free dimension (and as a whole where any shape goes).
        where: What was loaded, for messages.
    """

    runtime: str
    precision: str
    threads: int
    where: str
    input_shape: tuple[int | None, ...] | None = None

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the first output for the images ``x`` [B, C, H, W], float32.

        Raises:
            ModelError: The graph takes another shape.
        """
        x = np.ascontiguousarray(x, dtype=np.float32)
        want = self.input_shape
        if want is not None and (
            len(want) != x.ndim or any(n not in (None, m) for n, m in zip(want, x.shape, strict=True))
        ):
            allowed = ["any" if n is None else n for n in want]
            raise ModelError(
                f"{self.runtime} {self.where}: input of shape {list(x.shape)}; the graph takes {allowed}. "
                f"Change the batch or export with batch='dynamic'"
            )
        return self._run(x)

    @abstractmethod
    def _run(self, x: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def profile(self) -> list[OpTime]:
        """Return the mean time of every operator over the runs so far (load with ``profile=True``).

        Raises:
            StateError: Not loaded for profiling, or nothing was run.
        """


class Runtime(ABC):
    """One way to run a finished model.

    Attributes:
        name: Name in recipes and on the command line.
        package: Importable package it needs.
        suffixes: Kinds of file it reads; empty if it takes modules.
        prefers_fixed: Whether a graph compiled for a number of images runs faster than one for any number.
    """

    name: str
    package: str
    suffixes: tuple[str, ...] = ()
    prefers_fixed = False

    def available(self) -> bool:
        """Return whether its package is installed."""
        return importlib.util.find_spec(self.package) is not None

    def require(self) -> None:
        """Check that its package is installed.

        Raises:
            RecipeError: It is not; names the command that installs it.
        """
        if not self.available():
            raise RecipeError(f"runtime {self.name!r} is not installed; install it with: pip install {self.package}")

    def precisions(self) -> tuple[str, ...]:
        """Return the dense precisions this machine runs natively."""
        return best_dense_precisions(self.name)

    def load(self, source: Any, *, precision: str | None = None, threads: int = 2, profile: bool = False) -> Session:
        """Load a model.

        Args:
            source: Graph file, or folder that holds ``model.<suffix>`` or a routed model; for torch a module.
            precision: One of ``precisions()``; ``None``: bf16 in OpenVINO where that is native, else f32.
            threads: Threads to run on, at least 1.
            profile: Record operator times (slower; do not time such a session).

        Raises:
            RecipeError: Package missing, or precision or threads not allowed.
            ModelError: The model cannot be read.
        """
        from gossamer.runtimes.routed import RoutedSession, is_routing, read_routing  # which builds on this module

        self.check(precision, threads)
        if not is_routing(source):
            return self._load(source, precision, threads, profile)
        routing, folder = read_routing(source)

        def load(graph: str, batch: int | None) -> Session:
            return self._load(folder / graph, precision, threads, profile, batch)

        return RoutedSession(routing, folder.name, load, fixed=self.prefers_fixed)

    @abstractmethod
    def _load(
        self, source: Any, precision: str | None, threads: int, profile: bool, batch: int | None = None
    ) -> Session:
        """Load a model; one that ``prefers_fixed`` gets to know the ``batch`` that a graph for any number will see."""

    def check(self, precision: str | None, threads: int) -> None:
        """Refuse options this machine cannot run, and a missing package."""
        self.require()
        allowed = self.precisions()
        if precision is not None and precision not in allowed:
            hint = nearest(precision, allowed)
            raise RecipeError(f"{self.name}: precision={precision!r}; this machine runs {', '.join(allowed)}{hint}")
        if threads < 1:
            raise RecipeError(f"{self.name}: threads={threads}; allowed are 1 and more")

    def find(self, source: Any) -> Path:
        """Return the graph file meant by ``source``.

        Raises:
            ModelError: No such file, or not one this runtime reads.
        """
        kinds = " or ".join(self.suffixes)
        if not isinstance(source, str | Path):
            raise ModelError(
                f"{self.name}: got a {type(source).__name__}; it loads {kinds} files. Export the model first"
            )
        path = Path(source)
        if path.is_dir():
            inside = [path / f"model{suffix}" for suffix in self.suffixes if (path / f"model{suffix}").is_file()]
            if not inside:
                raise ModelError(f"{self.name}: folder {path} holds no model{kinds.replace(' or .', ' or model.')}")
            return inside[0]
        if path.suffix not in self.suffixes:
            raise ModelError(f"{self.name}: {path.name!r} ends in {path.suffix!r}; it loads {kinds} files")
        if not path.is_file():
            raise ModelError(f"{self.name}: no file {path}; export the model first")
        return path


def first_line(error: Exception, limit: int = 300) -> str:
    """Return the last line of a runtime's error, for a one-line message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:limit]
