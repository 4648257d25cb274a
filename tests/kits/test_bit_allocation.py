"""kits.bit_allocation: the exact allocator against enumeration, budgets, sizes."""

from __future__ import annotations

import itertools
import random

import pytest

from gossamer.core.errors import RecipeError
from gossamer.kits.bit_allocation import allocate_bits, budget_bits, size_mb

WIDTHS = (4, 5, 6, 7, 8)


def _toy(seed, modules=4, equal_sizes=False):
    draw = random.Random(seed)
    sizes = {f"m{i}": 100 if equal_sizes else draw.randrange(20, 200) for i in range(modules)}
    costs = {}
    for name in sizes:
        values = sorted((draw.random() * 10 ** draw.randrange(3) for _ in WIDTHS), reverse=True)
        costs[name] = dict(zip(WIDTHS, values, strict=True))
    return costs, sizes


def _total(costs, widths):
    return sum(costs[m][b] for m, b in widths.items())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("mean", [4.3, 5.0, 6.0, 7.9])
def test_equals_enumeration(seed, mean):
    costs, sizes = _toy(seed, equal_sizes=seed % 2 == 0)
    budget = budget_bits(f"{mean}bit", sum(sizes.values()), 0)
    found = allocate_bits(costs, sizes, budget)
    names = sorted(costs)
    best = min(
        sum(costs[n][b] for n, b in zip(names, c, strict=True))
        for c in itertools.product(WIDTHS, repeat=len(names))
        if sum(sizes[n] * b for n, b in zip(names, c, strict=True)) <= budget
    )
    assert _total(costs, found) == pytest.approx(best, rel=1e-12)
    assert sum(sizes[n] * found[n] for n in names) <= budget


def test_relaxing_the_budget_never_raises_the_cost():
    costs, sizes = _toy(3, modules=10)
    count = sum(sizes.values())
    totals = [_total(costs, allocate_bits(costs, sizes, int(count * b / 10))) for b in range(40, 85, 3)]
    assert totals == sorted(totals, reverse=True)


def test_one_candidate_width_gives_a_uniform_model():
    costs = {f"m{i}": {6: float(i)} for i in range(5)}
    assert set(allocate_bits(costs, dict.fromkeys(costs, 10), 300).values()) == {6}


def test_scales_to_a_large_model():
    costs, sizes = _toy(5, modules=96)
    sizes = {m: (4, 8)[i % 2] * 1024 * 1024 for i, m in enumerate(sizes)}
    found = allocate_bits(costs, sizes, 6 * sum(sizes.values()))
    assert sum(sizes[m] * b for m, b in found.items()) <= 6 * sum(sizes.values())


def test_impossible_budget_names_the_range():
    costs, sizes = _toy(0)
    with pytest.raises(RecipeError, match=r"3\.00 bits a weight; the candidate widths reach 4\.00\.\.8\.00"):
        allocate_bits(costs, sizes, 3 * sum(sizes.values()))


def test_budget_forms():
    assert budget_bits("6bit", 1000, 999) == 6000
    assert budget_bits("16.5MB", 1000, 32_000_000) == 100_000_000
    with pytest.raises(RecipeError, match="budget='lots'"):
        budget_bits("lots", 1, 0)


@pytest.mark.parametrize(
    ("millions", "bits", "expected"),
    [(86, 32, 344), (86, 6, 64.5), (86, 8, 86), (307, 32, 1228), (307, 6, 230.25), (307, 8, 307),
     (22, 32, 88), (22, 6, 16.5), (22, 8, 22), (41, 32, 164), (41, 6, 30.75), (41, 8, 41)],
)  # fmt: skip
def test_sizes_of_the_papers_table(millions, bits, expected):
    assert size_mb(millions * 10**6, bits) == pytest.approx(expected)
