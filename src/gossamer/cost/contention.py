"""Who else used the processor while we were timing, and whether the figures can be trusted."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from gossamer.runtimes.device import num_cores

__all__ = ["MAX_FOREIGN", "MAX_SPREAD", "Burst", "ProcessorClock", "Verdict", "judge", "quartiles"]

MAX_FOREIGN = 0.10
"""Largest trusted median share of the machine that other processes took during the bursts."""
MAX_SPREAD = 0.15
"""Largest trusted inter-quartile range, as a share of the median."""
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
_TICK_S = 0.01
_MIN_TICKS = 5


@dataclass(frozen=True)
class Burst:
    """One uninterrupted stretch of timing.

    Attributes:
        ms: Median milliseconds per batch within it.
        wall_s: Its length.
        own_s: Processor seconds of this process.
        busy_s: Processor seconds of the whole machine, steal by other guests included.
        cores: Processors of the machine.
    """

    ms: float
    wall_s: float
    own_s: float
    busy_s: float
    cores: int

    @property
    def foreign_share(self) -> float:
        """Share of the machine, 0..1, that others took."""
        if self.wall_s <= 0:
            return 0.0
        return min(1.0, max(0.0, self.busy_s - self.own_s) / (self.wall_s * self.cores))


class ProcessorClock:
    """Reads processor time of this process and of the machine."""

    def __init__(self) -> None:
        self._machine = os.cpu_count() or num_cores()
        self.restart()

    def restart(self) -> None:
        """Start counting now."""
        self._own, self._busy = _own_seconds(), _busy_seconds()

    def read(self) -> tuple[float, float, int]:
        """Return (own, busy) processor seconds since the start and the number of processors."""
        return _own_seconds() - self._own, _busy_seconds() - self._busy, self._machine


def _own_seconds() -> float:
    return time.process_time()


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(getattr(times, name, 0.0) for name in _BUSY))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile (linear interpolation) of one or more values."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


@dataclass(frozen=True)
class Verdict:
    """Whether a series of bursts can be trusted.

    Attributes:
        trusted: Yes or no.
        reason: Why not, in one sentence; ``""`` if trusted.
        foreign_share: Median share of the machine that others took, ``None`` where bursts were too
            short for the system's clock to tell.
        spread: Inter-quartile range over the median.
    """

    trusted: bool
    reason: str
    foreign_share: float | None
    spread: float


def judge(bursts: Sequence[Burst]) -> Verdict:
    """Judge the bursts of one entry, one per round.

    Distrusted are: fewer than three bursts, others' processor time above ``MAX_FOREIGN``, a spread
    above ``MAX_SPREAD``. The system counts processor time in ticks of 10 ms, so that the share is
    told only if the bursts together last five ticks.
    """
    low, median, high = quartiles([b.ms for b in bursts])
    spread = (high - low) / median if median else 0.0
    told = sum(b.wall_s for b in bursts) >= _MIN_TICKS * _TICK_S
    foreign = _foreign_share(bursts) if told else None
    reasons = []
    if len(bursts) < 3:
        reasons.append(f"only {len(bursts)} of at least 3 rounds")
    if foreign is not None and foreign > MAX_FOREIGN:
        reasons.append(f"other processes took {foreign:.0%} of the processors (at most {MAX_FOREIGN:.0%} is trusted)")
    if spread > MAX_SPREAD:
        reasons.append(f"the rounds spread by {spread:.0%} of the median (at most {MAX_SPREAD:.0%} is trusted)")
    return Verdict(not reasons, "; ".join(reasons), foreign, spread)


def _foreign_share(bursts: Sequence[Burst]) -> float:
    """Return the median over bursts, or the pooled share where single bursts are below the clock's tick."""
    if min(b.wall_s for b in bursts) >= _MIN_TICKS * _TICK_S:
        return statistics.median(b.foreign_share for b in bursts)
    total = Burst(0.0, sum(b.wall_s for b in bursts), sum(b.own_s for b in bursts), sum(b.busy_s for b in bursts),
                  bursts[0].cores)  # fmt: skip
    return total.foreign_share
