"""The latency meter: models side by side, round by round, with a verdict on the figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gossamer.core.errors import RecipeError
from gossamer.cost.contention import Burst, ProcessorClock, judge, quartiles
from gossamer.runtimes.session import Session

__all__ = ["Timing", "bench", "ratio"]

Entry = Session | Callable[[Any], Any]


@dataclass(frozen=True)
class Timing:
    """Latency of one entry.

    Attributes:
        name: What was timed.
        runtime: Runtime, ``""`` for a plain callable.
        precision: Dense precision, ``""`` for a plain callable.
        threads: Threads of the session, ``None`` for a plain callable.
        batch: Images per batch.
        samples_ms: Milliseconds per batch of every round (median of the round's burst), paired with
            the same rounds of the other entries.
        median_ms: Median over rounds.
        iqr_ms: Inter-quartile range over rounds.
        ratio: Entry 0 over this entry, median of the rounds' ratios: above 1 is faster than entry 0.
        ratio_quartiles: First and third quartile of the rounds' ratios.
        spread: Inter-quartile range over the median.
        foreign_share: Median share of the machine that others took, ``None`` where not told.
        trusted: Whether the figures can be trusted.
        reason: Why not, ``""`` if they can.
    """

    name: str
    runtime: str
    precision: str
    threads: int | None
    batch: int
    samples_ms: tuple[float, ...]
    median_ms: float
    iqr_ms: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    spread: float
    foreign_share: float | None
    trusted: bool
    reason: str

    @property
    def images_per_s(self) -> float:
        """Images per second at the median."""
        return self.batch / self.median_ms * 1e3

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        fields = asdict(self)
        fields["samples_ms"] = list(self.samples_ms)
        fields["ratio_quartiles"] = list(self.ratio_quartiles)
        return {**fields, "images_per_s": self.images_per_s}


def ratio(base: Timing, other: Timing) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile of base / other over the paired rounds.

    Above 1: ``other`` is faster.

    Raises:
        RecipeError: The two were not timed in the same run.
    """
    if len(base.samples_ms) != len(other.samples_ms):
        raise RecipeError(
            f"ratio: {len(base.samples_ms)} and {len(other.samples_ms)} rounds; only entries of one bench are paired"
        )
    return quartiles([a / b for a, b in zip(base.samples_ms, other.samples_ms, strict=True)])


def _call(entry: Entry) -> Callable[[Any], Any]:
    return entry.run if isinstance(entry, Session) else entry


def _burst(call: Callable[[Any], Any], x: Any, burst_s: float, clock: ProcessorClock) -> Burst:
    """Call once or, within ``burst_s``, more often."""
    times: list[float] = []
    clock.restart()
    start = now = time.perf_counter()
    while not times or (now - start) + times[-1] < burst_s:
        before = now
        call(x)
        now = time.perf_counter()
        times.append(now - before)
    own, busy, cores = clock.read()
    return Burst(statistics.median(times) * 1e3, now - start, own, busy, cores)


def _check(entries: Sequence[Entry], inputs: Sequence[Any], rounds: int, warmup: int, burst_s: float) -> None:
    if not entries:
        raise RecipeError("bench: 0 entries; give at least one session or callable")
    if len(inputs) != len(entries):
        raise RecipeError(f"bench: {len(inputs)} inputs for {len(entries)} entries; give one for all or one each")
    if rounds < 1 or warmup < 0 or burst_s < 0:
        raise RecipeError(f"bench: rounds={rounds}, warmup={warmup}, burst_s={burst_s}; allowed are >= 1, >= 0, >= 0")


def bench(
    entries: Sequence[Entry],
    inputs: np.ndarray | Sequence[Any],
    *,
    rounds: int = 9,
    warmup: int = 2,
    burst_s: float = 0.2,
    names: Sequence[str] | None = None,
    tick: Callable[[int], None] = lambda done: None,
) -> list[Timing]:
    """Time entries against each other.

    In every round each entry runs one burst, in an order that turns from round to round, so that
    drift and disturbances fall on all alike; ratios are taken round by round. During each burst the
    processor time of other processes is watched.

    Args:
        entries: Sessions, or callables taking the input; ratios are to the first.
        inputs: One input for all (an array [B, C, H, W]), or a list or tuple with one per entry.
        rounds: Number of rounds; below 3 nothing is trusted.
        warmup: Calls of every entry before the first round.
        burst_s: Aimed-at length of a burst; an entry runs at least once.
        names: What to call the entries.
        tick: Told the number of finished rounds.

    Returns:
        One timing per entry, in order.

    Raises:
        RecipeError: No entries, or numbers out of range.
    """
    each = list(inputs) if isinstance(inputs, list | tuple) else [inputs] * len(entries)
    _check(entries, each, rounds, warmup, burst_s)
    calls = [_call(entry) for entry in entries]
    for call, x in zip(calls, each, strict=True):
        for _ in range(warmup):
            call(x)
    clock = ProcessorClock()
    bursts: list[list[Burst]] = [[] for _ in entries]
    for done in range(rounds):
        for k in range(len(entries)):
            i = (k + done) % len(entries)
            bursts[i].append(_burst(calls[i], each[i], burst_s, clock))
        tick(done + 1)
    return [_timing(i, entries, each[i], bursts, names) for i in range(len(entries))]


def _timing(
    i: int, entries: Sequence[Entry], x: Any, bursts: Sequence[Sequence[Burst]], names: Sequence[str] | None
) -> Timing:
    entry, samples = entries[i], tuple(b.ms for b in bursts[i])
    low, median, high = quartiles(samples)
    first, middle, third = quartiles([a.ms / b.ms for a, b in zip(bursts[0], bursts[i], strict=True)])
    verdict = judge(bursts[i])
    where = entry.where if isinstance(entry, Session) else getattr(entry, "__name__", type(entry).__name__)
    return Timing(
        name=names[i] if names is not None else where,
        runtime=getattr(entry, "runtime", ""),
        precision=getattr(entry, "precision", ""),
        threads=getattr(entry, "threads", None),
        batch=int(x.shape[0]) if hasattr(x, "shape") and len(x.shape) else 1,
        samples_ms=samples,
        median_ms=median,
        iqr_ms=high - low,
        ratio=middle,
        ratio_quartiles=(first, third),
        spread=verdict.spread,
        foreign_share=verdict.foreign_share,
        trusted=verdict.trusted,
        reason=verdict.reason,
    )
