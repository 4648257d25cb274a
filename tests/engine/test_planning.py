"""The plan as data, its estimate, learning rates and logs."""

import json

import pytest
import torch
from engine_toys import Data, Task, make_loop, net, stack

from gossamer.core.errors import PlanError
from gossamer.core.schedule import Phase, Plan, Turn
from gossamer.engine.optim import Optimisers, rate_factor
from gossamer.engine.planning import describe_plan, estimate
from gossamer.recipe import TrainSettings


def test_plan_is_described_without_training():
    methods = stack("two_pass+duel+rates+average")
    rows = describe_plan(net(), methods, [Phase("fit", 6)])
    assert [r["phase"] for r in rows] == ["rates.search", "fit"]
    assert rows[0]["turns"][0]["trains"] == [{"group": "arch", "parameters": 5, "lr": 0.1}]
    assert [t["name"] for t in rows[1]["turns"]] == ["disc", "main"]
    assert rows[1]["turns"][1]["wrapped_by"] == ["TwoPass"]
    assert json.loads(json.dumps(rows)) == rows
    assert methods.edits == [(0, {"at": 1})]


def test_estimate_times_turns_and_leaves_work_open():
    methods = stack("grow+nmask+rates+calibrate")
    model = methods.prepare(net())
    found = estimate(model, methods, methods.phases(Plan([Phase("fit", 6)])), Task().loss, {"train": Data()})
    assert found["seconds"]["calibrate.blocks"] is None
    assert found["seconds"]["fit.grown"] > 0
    assert found["seconds_known"] > 0
    assert found["disk_bytes"] > 3 * 4 * sum(p.numel() for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_rate_warms_up_and_falls_to_its_floor():
    phase = Phase("fit", 100, warmup=0.1, min_lr_ratio=0.05)
    factors = [rate_factor(phase, i) for i in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.05 <= factors[-1] < 0.06
    assert rate_factor(Phase("fit", 10, schedule="constant"), 9) == 1.0
    linear = Phase("fit", 100, schedule="linear", warmup=0.1, hold=0.5, min_lr_ratio=0.0)
    found = [rate_factor(linear, i) for i in (9, 10, 54, 55, 77, 99)]
    assert found == pytest.approx([10 / 11, 1, 1, 1, 1 - 22 / 45, 1 / 45])
    with pytest.raises(PlanError, match="cosine"):
        rate_factor(Phase("fit", 10, schedule="step"), 1)


def names(model):
    return {p: n for n, p in model.named_parameters()}


def test_biases_and_norms_do_not_decay():
    model = net(norm=True)
    optimisers = Optimisers(TrainSettings(weight_decay=0.1))
    optimisers.enter(model, Phase("fit", 1), {"weights": list(model.parameters())}, names(model))
    groups = optimisers.active["weights"].param_groups
    assert {(p.ndim > 1, g["weight_decay"]) for g in groups for p in g["params"]} == {(True, 0.1), (False, 0.0)}


def test_layer_decay_lowers_the_rate_of_early_layers():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=32, num_heads=2, num_classes=3)
    optimisers = Optimisers(TrainSettings(layer_decay=0.5, lr=1.0))
    phase = Phase("fit", 1, schedule="constant")
    optimisers.enter(model, phase, {"weights": list(model.parameters())}, names(model))
    assert optimisers.set_rates(phase, 0, ["weights"]) == {"weights": 1.0}
    rate = {id(p): g["lr"] for g in optimisers.active["weights"].param_groups for p in g["params"]}
    assert rate[id(model.head.weight)] == 1.0
    assert rate[id(model.patch_embed.proj.weight)] < rate[id(model.blocks[0].mlp.fc1.weight)] < 1.0
    assert len(rate) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["sgd", "lamb", "adam"])
def test_counters_of_optimisers_survive_a_phase(name):
    model = net()
    optimisers = Optimisers(TrainSettings(optimizer=name))
    groups = {"weights": list(model.parameters())}
    for phase in ("one", "two"):
        optimisers.enter(model, Phase(phase, 1), groups, names(model))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimisers.active["weights"].step()
    saved = optimisers.state_dict()
    other = Optimisers(TrainSettings(optimizer=name))
    other.load_state_dict(saved, names(model))
    other.enter(model, Phase("three", 1), groups, names(model))
    again = other.state_dict()
    assert again["counters"] == saved["counters"]
    assert again["parameters"].keys() == saved["parameters"].keys()


def test_run_folder_holds_rows_edits_and_a_board(tmp_path):
    make_loop("rates", tmp_path, checkpoint_every=2).run(net())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0].keys() == {"phase", "turn", "step", "terms", "lr", "seconds", "grad_norm"}
    assert [r["phase"] for r in rows if r.get("event") == "end"] == ["rates.search", "fit"]
    edits = json.loads((tmp_path / "edits.json").read_text())["edits"]
    assert [e["edit"] for e in edits][:2] == [{"at": 1}, {"soft": True}]
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert len(list((tmp_path / "checkpoints").glob("0*"))) == 2


def test_progress_bars_do_not_touch_standard_output(capfd):
    from gossamer.engine.loop import RunOptions

    make_loop(options=RunOptions(quiet=False)).run(net())
    out, err = capfd.readouterr()
    assert out == ""
    assert "fit" in err


def test_a_phase_may_give_a_group_its_own_optimiser():
    model = net()
    first, rest = list(model.parameters())[:2], list(model.parameters())[2:]
    optimisers = Optimisers(TrainSettings(optimizer="sgd"))
    turns = (Turn(trains=("weights", "policy")),)
    own = {"policy": {"opt": "adam", "betas": [0.5, 0.999], "weight_decay": 5e-4}}
    phase = Phase("search", 1, turns, lr={"policy": 0.3}, optimizer=own)
    optimisers.enter(model, phase, {"weights": rest, "policy": first}, names(model))
    assert type(optimisers.active["weights"]) is torch.optim.SGD
    policy = optimisers.active["policy"]
    assert type(policy) is torch.optim.Adam
    assert (policy.param_groups[0]["lr"], policy.param_groups[0]["weight_decay"]) == (0.3, 5e-4)
    assert tuple(policy.param_groups[0]["betas"]) == (0.5, 0.999)
