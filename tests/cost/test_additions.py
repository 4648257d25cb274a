"""Additions and energy in the ledger: products count one of each, differences two additions and no multiplication."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.cost.energy import PICOJOULES, energy_pj, operation_table
from gossamer.cost.ledger import cost
from gossamer.ops.adder_layers import AdderConv2d, AdderLinear, Int8AdderConv2d, SharedGrid
from gossamer.ops.steps import StepKind


def net(eight: bool = False) -> nn.Module:
    adder = AdderConv2d(4, 6, 3, padding=1)
    layer = Int8AdderConv2d.of(adder, SharedGrid(0.1, 100)) if eight else adder
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), layer, nn.Flatten(), nn.Linear(6 * 25, 2))


CONV, ADDER, HEAD = 3 * 4 * 25, 4 * 6 * 9 * 25, 6 * 25 * 2


@pytest.mark.parametrize("batch", [1, 3])
def test_differences_are_no_macs(batch: int) -> None:
    found = cost(net(), torch.zeros(batch, 3, 5, 5), saved=False)
    assert found.macs == CONV + HEAD and found.additions == CONV + HEAD + 2 * ADDER
    assert {r.name: (r.macs, r.additions) for r in found.per_layer if r.additions} == {
        "0": (CONV, CONV), "1": (0, 2 * ADDER), "3": (HEAD, HEAD)
    }  # fmt: skip
    assert found.energy_pj == pytest.approx((CONV + HEAD) * 4.6 + ADDER * 1.8)


def test_a_training_pass_and_the_meta_device_work() -> None:
    assert cost(net(), torch.zeros(2, 3, 5, 5)).saved_activation_bytes
    with torch.device("meta"):
        assert cost(net(), torch.zeros(1, 3, 5, 5), saved=False).additions == CONV + HEAD + 2 * ADDER


def test_eight_bits_cost_less() -> None:
    found = cost(net(eight=True), torch.zeros(1, 3, 5, 5), saved=False)
    row = next(r for r in found.per_layer if r.name == "1")
    assert row.additions == 2 * ADDER and row.energy_pj == pytest.approx(ADDER * 0.13)
    assert row.weight_bytes == 4 * 6 * 9 + 2 * 4 * 6  # codes, gains and shifts


def test_linear_counts_too() -> None:
    assert cost(nn.Sequential(AdderLinear(7, 5)), torch.zeros(2, 7), saved=False).additions == 2 * 35


def test_steps_cost_what_the_table_says() -> None:
    assert energy_pj(StepKind(1, 1), 32, 32) == PICOJOULES["float32"]["multiplication"] + 0.9
    assert energy_pj(StepKind(0, 2), 32, 32) == pytest.approx(1.8)
    assert energy_pj(StepKind(1, 1), 8, 4) == pytest.approx(0.3) and energy_pj(StepKind(0, 2), 8, 8) == pytest.approx(
        0.13
    )
    assert energy_pj(StepKind(1, 1), 16, 16) == pytest.approx(1.5)


def test_table_of_operations() -> None:
    found = cost(net(), torch.zeros(1, 3, 5, 5), saved=False)
    wide, narrow = operation_table([("small", found)])
    assert wide["multiplications"] == CONV + HEAD and wide["additions"] == found.additions
    assert wide["energy_uj"] == pytest.approx(found.energy_pj * 1e-6, abs=1e-3)
    assert narrow["energy_uj"] == pytest.approx(((CONV + HEAD) * 0.3 + ADDER * 0.13) * 1e-6, abs=1e-3)
