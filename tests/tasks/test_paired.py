"""Paired statistics against closed forms and published examples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.errors import DataError
from gossamer.tasks.paired import bootstrap_difference, compare, mcnemar_exact, mean_kl, wilson


def test_wilson_edges():
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == 1.0
    z2 = 1.959963984540054**2
    assert wilson(0, 10)[1] == pytest.approx(z2 / (10 + z2))
    assert wilson(586, 667) == pytest.approx((0.8516, 0.9012), abs=5e-4)
    with pytest.raises(DataError, match="3 of 2"):
        wilson(3, 2)


def test_mcnemar_is_the_binomial_test():
    assert mcnemar_exact(0, 0) == 1.0 and mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(0, 6) == 2 / 2**6
    assert mcnemar_exact(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar_exact(1000, 1200) == pytest.approx(2.2e-5, rel=0.1)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_symmetric_and_a_probability(a: int, b: int):
    assert mcnemar_exact(a, b) == mcnemar_exact(b, a) and 0 < mcnemar_exact(a, b) <= 1


def test_bootstrap_matches_the_normal_interval():
    right_a = torch.arange(400) < 300
    right_b = (torch.arange(400) >= 20) & (torch.arange(400) < 310)
    low, high = bootstrap_difference(right_a, right_b, rounds=4000)
    mean, var = -10 / 400, (30 / 400) - (10 / 400) ** 2
    half = 1.96 * math.sqrt(var / 400)
    assert (low, high) == pytest.approx((100 * (mean - half), 100 * (mean + half)), abs=0.3)
    assert (low, high) == bootstrap_difference(right_a, right_b, rounds=4000)


def test_kl_closed_form():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    assert mean_kl(p.log(), q.log()) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-6)
    assert mean_kl(p, p + 3.0) == pytest.approx(0.0, abs=1e-12)


def test_compare_counts():
    targets = torch.tensor([0, 0, 0, 0, 0])
    a = torch.eye(3)[torch.tensor([0, 0, 0, 1, 1])]
    b = torch.eye(3)[torch.tensor([0, 1, 0, 0, 2])]
    got = compare(a, b, targets)
    assert (got.both, got.only_a, got.only_b, got.neither) == (2, 1, 1, 1)
    assert (got.top1_a, got.top1_b, got.difference_points, got.agreement) == (0.6, 0.6, 0.0, 0.4)
    assert got.p_value == 1.0 and got.to_json()["interval_points"] == list(got.interval_points)
    same = compare(a, a, targets)
    assert (same.agreement, same.kl, same.interval_points) == (1.0, 0.0, (0.0, 0.0))
    with pytest.raises(DataError, match="cannot pair"):
        compare(a, b[:4], targets)
