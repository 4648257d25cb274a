"""Budgets: every unit, and one line for every mistake."""

from __future__ import annotations

import pytest

from gossamer.core.errors import RecipeError
from gossamer.cost.budget import METRICS, Budget, Target


@pytest.mark.parametrize(
    ("metric", "text", "dense", "bound"),
    [
        ("macs", "60%", 4.6e9, 2.76e9),
        ("macs", "2.9G", 4.6e9, 2.9e9),
        ("macs", 2900000000, 4.6e9, 2.9e9),
        ("params", "8M", 22e6, 8e6),
        ("params", "8m", 22e6, 8e6),
        ("bops", "1.5T", 4e12, 1.5e12),
        ("latency", "12ms", 40.0, 12.0),
        ("latency", "0.5s", 900.0, 500.0),
        ("latency", "250 us", 40.0, 0.25),
        ("size", "22MB", 88e6, 22e6),
        ("size", "22mb", 88e6, 22e6),
        ("size", "64MiB", 88e6, 64 * 2**20),
        ("memory", "100%", 5.0, 5.0),
    ],
)
def test_values(metric: str, text: str | float, dense: float, bound: float) -> None:
    budget = Budget.parse(metric, text)
    assert budget.resolve(dense) == pytest.approx(bound)
    assert budget.share(dense) == pytest.approx(bound / dense)
    assert budget.relative == str(text).endswith("%")


@pytest.mark.parametrize(
    ("metric", "text", "message"),
    [
        ("mac", "60%", "did you mean 'macs'"),
        ("macs", "sixty", "no budget; allowed are a share like '60%' or an amount like '2.9G'"),
        ("macs", "-60%", "no budget"),
        ("macs", True, "no budget"),
        ("macs", float("nan"), "no budget"),
        ("macs", "0%", "above 0% and at most at 100%"),
        ("macs", "101%", "above 0% and at most at 100%"),
        ("macs", "0", "above 0"),
        ("macs", "12ms", "unit 'ms'; allowed are K, M, G"),
        ("latency", "2.9G", "unit 'G'; allowed are ms, us, s"),
        ("latency", "12", "unit 'missing'"),
        ("size", 22, "unit 'missing'"),
        ("params", "1e999", "above 0"),
    ],
)
def test_mistakes_are_told_in_one_line(metric: str, text: str | float, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        Budget.parse(metric, text)
    assert "\n" not in str(caught.value)


def test_dense_value_must_be_positive() -> None:
    with pytest.raises(RecipeError, match="dense model's macs is 0"):
        Budget.parse("macs", "60%").resolve(0)


def test_target() -> None:
    target = Target.parse({"macs": "60%", "latency": "12ms", "max_drop": 0.5})
    assert set(target.budgets) == {"macs", "latency"} < set(METRICS)
    dense = {"macs": 100.0, "latency": 20.0}
    assert target.missed(dense, {"macs": 60.2, "latency": 12.0, "drop": 0.5}) == []
    missed = target.missed(dense, {"macs": 61.0, "latency": 13.0, "drop": 1.0})
    assert [m.split(":")[0] for m in missed] == ["macs", "latency", "max_drop"]
    assert Target.parse({}).missed(dense, dense) == []
    with pytest.raises(RecipeError, match="did you mean 'max_drop'"):
        Target.parse({"maxdrop": 1})
    for drop in (-1, "0.5", True):
        with pytest.raises(RecipeError, match=r"0\.\.100 points"):
            Target.parse({"max_drop": drop})
