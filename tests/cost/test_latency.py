"""The meter: pairing, interleaving, and its verdict on made-up and on real bursts."""

from __future__ import annotations

import json
import statistics
import time

import numpy as np
import pytest
from torch import nn

from gossamer import runtimes
from gossamer.core.errors import RecipeError
from gossamer.cost.contention import Burst, ProcessorClock, judge, quartiles
from gossamer.cost.latency import bench, ratio


def bursts(times: list[float], *, busy: float = 0.4, wall: float = 0.2, own: float = 0.4) -> list[Burst]:
    return [Burst(ms, wall, own, busy, 2) for ms in times]


def test_a_quiet_machine_is_trusted() -> None:
    verdict = judge(bursts([10.0, 10.2, 10.1, 9.9]))
    assert verdict.trusted and verdict.reason == "" and verdict.foreign_share == 0.0
    assert verdict.spread == pytest.approx(0.0149, abs=1e-3)


def test_foreign_time_is_distrusted() -> None:
    verdict = judge(bursts([10.0, 10.1, 10.0], own=0.3, busy=0.4))
    assert not verdict.trusted
    assert verdict.foreign_share == pytest.approx(0.25)
    assert "other processes took 25% of the processors" in verdict.reason


def test_a_single_disturbed_round_is_outvoted() -> None:
    assert judge([*bursts([10.0, 10.0, 10.0, 10.0]), *bursts([30.0], own=0.1)]).trusted


def test_spread_is_distrusted() -> None:
    verdict = judge(bursts([10.0, 14.0, 18.0, 10.0, 17.0]))
    assert not verdict.trusted and "spread by" in verdict.reason and "other" not in verdict.reason


def test_too_few_rounds_are_distrusted() -> None:
    assert "only 2 of at least 3 rounds" in judge(bursts([1.0, 1.0])).reason


def test_below_the_systems_clock_nothing_is_told() -> None:
    verdict = judge(bursts([1.0] * 3, wall=0.01, own=0.0, busy=0.02))
    assert verdict.foreign_share is None and verdict.trusted
    pooled = judge(bursts([1.0] * 9, wall=0.01, own=0.0, busy=0.02))
    assert pooled.foreign_share == pytest.approx(1.0)


def test_foreign_share_stays_in_range() -> None:
    assert Burst(1.0, 0.2, 0.5, 0.4, 2).foreign_share == 0.0
    assert Burst(1.0, 0.2, 0.0, 9.0, 2).foreign_share == 1.0
    assert Burst(1.0, 0.0, 0.0, 9.0, 2).foreign_share == 0.0


def test_own_work_is_not_foreign() -> None:
    clock = ProcessorClock()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    own, busy, cores = clock.read()
    assert own >= 0.1 and busy >= 0 and cores >= 1


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_rounds_are_interleaved_in_turning_order() -> None:
    calls: list[str] = []
    done: list[int] = []
    bench(
        [lambda x: calls.append("a"), lambda x: calls.append("b"), lambda x: calls.append("c")],
        np.zeros(1),
        rounds=4,
        warmup=1,
        burst_s=0.0,
        tick=done.append,
    )
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert done == [1, 2, 3, 4]


def test_ratio_is_entry_0_over_the_other() -> None:
    def slow(x: np.ndarray) -> None:
        time.sleep(0.03)

    def fast(x: np.ndarray) -> None:
        time.sleep(0.01)

    timings = bench([slow, fast], np.zeros((4, 1)), rounds=5, warmup=0, burst_s=0.0, names=["slow", "fast"])
    assert [t.name for t in timings] == ["slow", "fast"]
    assert timings[0].ratio == 1.0 and timings[0].ratio_quartiles == (1.0, 1.0)
    assert 1.5 < timings[1].ratio < 4
    assert timings[1].ratio == ratio(timings[0], timings[1])[1]
    assert ratio(timings[1], timings[0])[1] < 1
    assert timings[0].batch == 4 and len(timings[0].samples_ms) == 5
    assert timings[1].images_per_s == pytest.approx(4e3 / timings[1].median_ms)
    assert timings[0].median_ms == statistics.median(timings[0].samples_ms)
    text = timings[1].to_json()
    assert json.loads(json.dumps(text)) == text


def test_a_model_is_as_fast_as_itself() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 512), nn.ReLU(), nn.Linear(512, 512))
    sessions = [runtimes.get("torch").load(model, threads=1) for _ in range(2)]
    x = np.random.default_rng(0).standard_normal((16, 3, 32, 32), dtype=np.float32)
    first, again = bench(sessions, x, rounds=9, burst_s=0.05)
    assert 0.6 < again.ratio < 1.67
    assert (first.runtime, first.precision, first.threads, first.batch) == ("torch", "f32", 1, 16)
    assert first.name == "Sequential"


def test_each_entry_may_have_its_own_input() -> None:
    shapes: list[int] = []
    entries = [lambda x: shapes.append(len(x)), lambda x: shapes.append(len(x))]
    timings = bench(entries, [np.zeros((1, 2)), np.zeros((8, 2))], rounds=1, warmup=0, burst_s=0.0)
    assert shapes == [1, 8] and [t.batch for t in timings] == [1, 8]
    assert not timings[0].trusted


def test_errors_say_what_to_do() -> None:
    with pytest.raises(RecipeError, match="0 entries"):
        bench([], np.zeros(1))
    with pytest.raises(RecipeError, match="2 inputs for 1 entries"):
        bench([len], [1, 2])
    with pytest.raises(RecipeError, match="rounds=0"):
        bench([len], np.zeros(1), rounds=0)
    a = bench([len], np.zeros(1), rounds=1, burst_s=0.0)[0]
    b = bench([len], np.zeros(1), rounds=2, burst_s=0.0)[0]
    with pytest.raises(RecipeError, match="only entries of one bench are paired"):
        ratio(a, b)
