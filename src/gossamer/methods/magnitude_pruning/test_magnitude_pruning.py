"""Magnitude pruning: budgets, scopes, scores, the measured table, bad input."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.core.errors import RecipeError
from gossamer.core.schedule import Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.cost.latency_table import Grid, LatencyTable, Setting
from gossamer.cost.ledger import cost
from gossamer.kits.example import tiny_vit
from gossamer.kits.structure import measuring
from gossamer.methods.magnitude_pruning import MagnitudePruning
from gossamer.models.widths import widths_of

FIGURES = tomllib.loads(
    resources.files("gossamer.methods.magnitude_pruning").joinpath("figures.toml").read_text(encoding="utf-8")
)["figure"]
SMALL = {"emb": 4, "head": 1, "qk": 4, "v": 4, "mlp": 16}


def _pruned(model: nn.Module | None = None, **options: Any) -> nn.Module:
    stack = Stack([MagnitudePruning(group_sizes=SMALL, **options)])
    return stack.prepare(tiny_vit() if model is None else model)


@pytest.mark.parametrize("options", [{}, {"scope": "uniform"}, {"scores": "random"}])
@pytest.mark.parametrize("budget", [{"macs": "55%"}, {"params": "55%"}])
def test_budgets_are_met(options: dict[str, Any], budget: dict[str, str]) -> None:
    metric = next(iter(budget))
    share = getattr(cost(_pruned(**options, **budget), saved=False), metric) / getattr(
        cost(tiny_vit(), saved=False), metric
    )
    assert 0.35 < share <= 0.55


def test_small_weights_go_first() -> None:
    model = tiny_vit()
    with torch.no_grad():
        for row in (3, 50, 77):
            model.get_parameter("blocks.1.mlp.fc1.weight")[row] = 0
            model.get_parameter("blocks.1.mlp.fc1.bias")[row] = 0
    kept = model.get_parameter("blocks.1.mlp.fc1.weight").detach().clone()
    stack = Stack([MagnitudePruning(macs="97%", group_sizes={"mlp": 1}, structures=["mlp"])])
    small = stack.prepare(model).get_parameter("blocks.1.mlp.fc1.weight")
    rows = [r for r in range(len(kept)) if any(torch.equal(kept[r], s) for s in small)]
    assert not {3, 50, 77} & set(rows) and len(rows) == len(small)


def test_uniform_leaves_every_layer_the_same_share() -> None:
    figure = FIGURES[0]
    model = tiny_vit(embed_dim=64, num_heads=4)
    dense = widths_of(model)
    rows = zip(widths_of(_pruned(model, macs="30%", scope="uniform")).points(), dense.points(), strict=True)
    shares = [p[k] / d[k] for p, d in rows for k in ("embed", "heads", "qk", "v", "mlp")]
    assert max(shares) - min(shares) == pytest.approx(figure["value"], abs=figure["tolerance"] + 1e-9)


def test_random_depends_on_its_seed_alone() -> None:
    first, again, other = (_pruned(macs="60%", scores="random", seed=s) for s in (1, 1, 2))
    ours, theirs, others = (m.state_dict() for m in (first, again, other))
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert any(v.shape != others[k].shape or not torch.equal(v, others[k]) for k, v in ours.items())


def test_a_measurement_comes_first_where_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(self: Any, index: int) -> dict[str, Any]:
        point = self.points[index]
        relative = {"model": 9.0, "rest": 1.0}.get(point.part, 0.01 * sum(point.at.values()))
        return {"reference_ms": 1.0, "relative": relative, "reason": ""}

    monkeypatch.setattr(measuring.BlockMeter, "measure", fixed)
    method = MagnitudePruning(latency="80%", group_sizes=SMALL, runtime="torch")
    stack, model = Stack([method]), tiny_vit()
    model = stack.prepare(model)
    phases = stack.phases(Plan([Phase("fit", 1)]))
    assert [p.name for p in phases] == ["magnitude_pruning.measure", "fit"]
    for i in range(phases[0].steps):
        assert phases[0].work is not None
        phases[0].work(model, {}, Step(phases[0].name, "work", i, phases[0].steps))
    model = stack.leave(model, phases[0])
    facts = stack.describe(model)["MagnitudePruning"]["facts"]
    assert facts["latency_share_predicted"] <= 0.8
    assert widths_of(model) != widths_of(tiny_vit())


def test_a_given_table_prunes_at_once() -> None:
    parts = (Grid({"mlp": [0, 128]}, [0.0, 4.0]), Grid({"embed": [32]}, [1.0]))
    table = LatencyTable(Setting("formula", "openvino", "f32", 2, 8, 17), parts).to_json()
    model = _pruned(latency="60%", table=table, structures=["mlp"])
    assert sum(widths_of(model).mlp) / 3 <= 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": "1%"}, "Reachable are"),
        ({}, "no budget"),
        ({"macs": "60%", "scores": "taylor"}, "allowed are magnitude, random"),
        ({"macs": "60%", "scope": "layer"}, "allowed are global, uniform"),
        ({"macs": "60%", "structures": []}, "structures is empty"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        MagnitudePruning(**options).prepare(tiny_vit())
