"""AutoProg against the release (``oracle.json``: changlin31/AutoProg at e7ecc98) and its own properties."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from timm.models.volo import VOLO
from torch import nn

from gossamer.core.errors import GossamerError, ModelError, PlanError, RecipeError
from gossamer.core.schedule import Phase, Plan
from gossamer.core.stack import Stack
from gossamer.cost.ledger import cost
from gossamer.kits.example import tiny_vit
from gossamer.kits.growth.depth import interpolation, new_blocks
from gossamer.kits.growth.elastic import active_blocks
from gossamer.methods.autoprog import AutoProg, maths
from gossamer.methods.autoprog.plan import place
from gossamer.models.build import load_model
from gossamer.models.growing import growth_layout
from gossamer.ops.positions import resize_grid

FIGURES = {
    f["name"]: f for f in tomllib.loads(Path(__file__).with_name("figures.toml").read_text(encoding="utf-8"))["figure"]
}
ORACLE = json.loads(Path(__file__).with_name("oracle.json").read_text())
SEARCH = {"search_ratio": 0.5, "records": 2, "batches": 2, "cost": "macs", "resolution_step": 8, "stages": 3}
MANUAL = {"search": False, "resolution_step": 8}


def volo(outlookers: int, transformers: int) -> nn.Module:
    torch.manual_seed(0)
    size = {"embed_dims": [16, 32, 32, 32], "num_heads": [1, 2, 2, 2], "stem_hidden_dim": 8}
    return VOLO([outlookers, transformers, 0, 0], num_classes=10, img_size=64, **size).eval()


# -- oracles -------------------------------------------------------------------------------------
def test_rounding_and_schedules_are_the_releases():
    assert all(maths.make_divisible(v, d) == expected for v, d, expected in ORACLE["make_divisible"])
    for case in ORACLE["schedules"]:
        scale, stages = case["scale"], case["stages"]
        assert maths.boundaries(case["epochs"], stages)[:-1] == case["e"]
        assert maths.schedule(scale, stages, 224, 32) == case["r"]
        assert maths.schedule(scale, stages, case["l_max"]) == case["l"]
        magnitudes = [round(9 * s) for s in maths.shares(0.5, stages)]
        assert [f"rand-m{m}-mstd0.5-inc1" for m in magnitudes] == case["aa"]
        for key, most in (("dp", 0.1), ("re", 0.25)):
            assert [most * s for s in maths.shares(0.0, stages)] == pytest.approx(case[key], abs=1e-9)


def test_block_maps_are_the_releases():
    for pair, expected in ORACLE["new_idx"].items():
        assert interpolation(*map(int, pair.split(","))) == [int(v) for v in expected.split()]
    for pair, expected in ORACLE["get_new_layer_idx"].items():
        assert new_blocks(*map(int, pair.split(","))) == [int(v) for v in expected.split()]


def test_subnetworks_are_the_releases():
    layout = growth_layout(volo(4, 14))
    for key, case in ORACLE["set_sample_config"].items():
        least, most, depth = (maths.split_depth(int(v), layout) for v in key.split(","))
        if maths.split_depth(10, layout) in (least, most, depth):
            continue  # its fixed share of 0.23 splits 10 blocks as 4 and 6; 4 of 18 is 2 and 8
        assert depth == case["split"]
        for a, b, n, identity in zip(least, most, depth, case["identity"], strict=True):
            assert sorted(set(range(b)) - set(active_blocks(a, b, n))) == identity


def test_growth_from_the_slow_copy_is_the_releases():
    for key, case in ORACLE["growth"].items():
        old, new = case["split"]
        if key == "6,8":
            continue  # not a split of the full model's share
        model, method = volo(4, 14), AutoProg(growth="mogrow_release", search=False, dims=["depth"])
        stack = Stack([method])
        model = stack.prepare(model)
        start = {"start": sum(old), "depth": sum(old), "least": None, "sizes": [64], "turns": ["main"], "seed": 0}
        start |= {"level": method.level(0), "stage": 0, "kind": "stage", "momentum": 0.9}
        model = method.apply(model, start)
        chains = [method._full.chains[0].containers, method._full.chains[1].containers]
        with torch.no_grad():
            for name, value in method._copies[-1].average.items():
                parts = name.split(".")
                index = 100 * int(parts[1]) + int(parts[2]) if parts[0] == "network" and parts[1] in "02" else 0
                value.fill_(4000.0 + index)
        model = method.apply(model, {**start, "start": None, "depth": sum(new), "stage": 1})
        for containers, expected in zip(chains, case["ema"], strict=True):
            blocks = [b for c in containers for b in model.get_submodule(c)]
            assert [{float(p.detach().mean()) for p in b.parameters()} for b in blocks] == [{v} for v in expected]
        assert [float(model.head.weight.detach().mean())] == case["rest"]


def test_extraction_is_the_releases():
    layout = growth_layout(volo(4, 14))
    for key, case in ORACLE["growth"].items():
        least, most = case["split"]
        for counts, held in case["extract"].values():
            if key == "6,8" or maths.split_depth(sum(counts), layout) != counts:
                continue
            for part in range(2):  # the numbers that the release's blocks were marked with
                expected = [int(v) - 200 * part for v in held[part]]
                assert active_blocks(least[part], most[part], counts[part]) == expected


def test_position_embedding_is_the_releases():
    n = 14 * 14 * 4
    grid = torch.sin(torch.arange(n, dtype=torch.float64) * 0.7).float().reshape(1, 14, 14, 4)
    for side, case in ORACLE["interpolate_pos_encoding"].items():
        ours = resize_grid(grid, (int(side), int(side)), antialias=False, margin=0.1)
        assert ours.flatten()[::37].tolist() == pytest.approx(case["values"], abs=1e-6)
        assert float(ours.double().sum()) == pytest.approx(case["sum"], abs=1e-3)


def test_choice_is_the_releases():
    for case in ORACLE["choice"]:
        exponent, factor = maths.power_law(case["T"], case["L"])
        assert exponent == pytest.approx(case["a1"], abs=1e-5) and factor == pytest.approx(case["a2"], rel=1e-5)
        chosen, weight, _ = maths.choose(case["T"], case["L"])
        assert weight == pytest.approx(case["w"], abs=1e-5)
        if len(set(case["L"])) > 1:  # where all tie, the release takes its first
            assert chosen == case["best"]


# -- the choice ----------------------------------------------------------------------------------
def test_choice_does_not_depend_on_units():
    costs, losses = [0.1, 0.2, 0.35, 0.5], [2.4, 2.1, 2.15, 1.9]
    chosen, weight, scores = maths.choose(costs, losses)
    for c, s in ((3.0, 1.0), (1.0, 7.0), (1e9, 0.1)):
        again = maths.choose([c * v for v in costs], [s * v for v in losses])
        assert again[0] == chosen and again[1] == pytest.approx(weight, abs=1e-6)
    flat = maths.choose(costs, [2.0] * 4)
    assert flat[1] == pytest.approx(0.0, abs=1e-8) and flat[0] == 0
    law = maths.choose(costs, [3 * v**-0.2 for v in costs])[2]
    assert max(law) - min(law) < 1e-8 * max(law) and weight > 0 and len(scores) == 4


def test_depth_that_buys_nothing_is_left_and_resolution_that_does_is_taken():
    """Costs of sizes 20 and 28 with 5, 7 and 8 blocks: the law is fitted through all, the shallow ones lie below it."""
    costs = [6.9, 9.6, 11.0, 14.0, 19.6, 22.4]
    assert maths.choose(costs, [1.73, 1.73, 1.73, 1.71, 1.71, 1.71])[0] == 3
    assert maths.choose(costs, [1.71, 1.72, 1.72, 1.71, 1.72, 1.72])[0] == 0


def test_two_candidates_tie_so_that_the_schedule_decides():
    """A power law goes through any two points: the published rule can never take the dearer of two."""
    costs, losses = [1.0, 2.0], [2.05, 1.55]
    assert maths.choose(costs, losses)[2] == pytest.approx([2.05, 2.05])
    assert [maths.choose(costs, losses, plan)[0] for plan in range(2)] == [0, 1]
    assert [maths.choose(costs, losses[::-1], plan)[0] for plan in range(2)] == [0, 0]


def test_planned_candidate_catches_up_with_the_schedule():
    assert maths.planned([16, 20], 20) == 20 and maths.planned([16, 20], 28) == 20
    assert maths.planned([7, 8], 5) == 7  # already ahead


def test_momentum_is_the_published_one_at_the_published_length():
    assert maths.momentum(2 * 1251) == pytest.approx(0.998, abs=2e-6)
    assert maths.momentum(10_000) == 0.998 and maths.momentum(50) == pytest.approx(0.9) and maths.momentum(1) == 0.0


def test_candidates_begin_with_the_present():
    values = [9, 12, 15, 18]
    assert maths.candidates(values, None, stay=True, most=3) == [9, 15, 18]
    assert maths.candidates(values, 9, stay=True, most=3) == [9, 12, 15]
    assert maths.candidates(values, 9, stay=False, most=3) == [12, 15, 18]
    assert maths.candidates(values, 18, stay=False, most=3) == [18]


@pytest.mark.parametrize("scale", [0.5, 0.4])
def test_stages_cost_what_the_sheet_says(scale):
    """Counted on networks whose blocks are absent and whose inputs are smaller, not computed from a formula."""
    model = load_model("deit_small_patch16_224")
    method = AutoProg(start_scale=scale, search=False)
    model = method.apply(model, method.prepare(model))
    shares = []
    for stage, (depth, size) in enumerate(zip(method.depths(), method.sizes(), strict=True)):
        model = method.apply(model, method.enter(model, Phase(f"fit.stage{stage}", 1)))
        assert len(model.blocks) == depth
        shares.append(cost(model.eval(), torch.zeros(1, 3, size, size)).macs)
    figure = FIGURES[f"deit_small_stage_macs_{scale}"]
    assert [v / shares[-1] for v in shares] == pytest.approx(figure["value"], abs=figure["tolerance"])


# -- the plan ------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [MANUAL, SEARCH, {**SEARCH, "records": 5}, {**MANUAL, "stages": 1}])
@pytest.mark.parametrize("steps", [8, 13, 100])
def test_parts_are_the_training(options, steps):
    """Total optimiser steps are the baseline's, each once, in order; the last stage is always the full network."""
    method = AutoProg(**options)
    plan = method.phases(Plan([Phase("fit", steps, warmup=0.2)]))
    covered = [p.window.offset + i for p in plan if p.work is None for i in range(p.steps)]
    assert covered == list(range(steps)) and all(p.window.total == steps for p in plan if p.work is None)
    assert place(plan[-1], "fit").kind == "stage" and plan[-1].ends_window
    assert len({p.name for p in plan}) == len(plan)
    assert AutoProg(**options).phases(Plan([Phase("fit", 0)])) == (Phase("fit", 0),)


def test_growth_schedule_longer_than_the_training_is_refused():
    with pytest.raises(PlanError, match="4 stages in phase 'fit', which has 3 steps; expected at least 4") as caught:
        AutoProg(search=False).phases(Plan([Phase("fit", 3)]))
    assert "\n" not in str(caught.value)
    with pytest.raises(PlanError, match="expected at least 8 steps"):
        AutoProg().phases(Plan([Phase("fit", 6)]))
    with pytest.raises(PlanError, match="no phase 'pretrain'"):
        AutoProg(phase="pretrain").phases(Plan([Phase("fit", 100)]))
    with pytest.raises(PlanError, match="are all 'fit'"):
        AutoProg().phases(Plan([Phase("fit.a", 100), Phase("fit.b", 100)]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"growth": "mogro"}, "did you mean 'mogrow'"),
        ({"stages": 0}, "stages=0; expected 1"),
        ({"start_scale": 1.5}, "start_scale=1.5"),
        ({"dims": ["width"]}, "dims 'width'"),
        ({"regularisation": {"drop": 0.5}}, "did you mean 'drop_path'"),
        ({"cost": "flops"}, "cost 'flops'"),
        ({"batches": 0}, "batches=0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        AutoProg(**options).prepare(tiny_vit())


def test_models_that_cannot_grow_are_refused():
    with pytest.raises(ModelError, match="growth needs timm's VisionTransformer"):
        AutoProg().prepare(nn.Linear(2, 2))
    method = AutoProg(resolution_step=6)
    method.apply(tiny_vit(), method.prepare(tiny_vit()))
    with pytest.raises(GossamerError, match="a multiple of 8 pixels"):
        method.sizes()


# -- the training --------------------------------------------------------------------------------
