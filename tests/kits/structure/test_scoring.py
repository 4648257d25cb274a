"""Scores and ranking: properties of the criteria, groups, thresholds, budgets."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.core.errors import RecipeError
from gossamer.cost.latency_table import Grid, LatencyTable, Setting
from gossamer.cost.ledger import cost
from gossamer.kits.structure.budget import WidthCosts, bounds, parse_budgets
from gossamer.kits.structure.ranking import form_groups, prune_below, prune_until, smallest
from gossamer.kits.structure.regions import Region, Structure, enforce, keep_all
from gossamer.kits.structure.scoring import gradient_scores, magnitude_scores, random_scores
from gossamer.kits.structure.vit import counts_of, open_blocks, slice_vit, vit_structures

ROWS = Structure("rows", "row", (Region("w", 0, (3,)),), (Region("w", 0, (3,)),))


def _opened(name: str = "deit_tiny_distilled_patch16_224") -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    model = timm.create_model(name, **shape).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    open_blocks(model)
    return model


def _grads(model: nn.Module, factor: float = 1.0) -> dict[str, Tensor]:
    model.zero_grad()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (factor * model(x).square().sum()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_quadratic_loss_rises_by_the_score() -> None:
    """For per-sample gradients g_n with E[g g^T] = H, zeroing a unit costs w^T H w = mean (w . g_n)^2."""
    torch.manual_seed(0)
    w, per_sample = torch.randn(3, 4), torch.randn(500, 3, 4)
    scores = [gradient_scores({"w": w}, {"w": g}, [ROWS], "fisher_group")["rows"] for g in per_sample]
    hessian = torch.einsum("nij,nkl->ijkl", per_sample, per_sample) / len(per_sample)
    for unit in range(3):
        gone = torch.zeros(3, 4)
        gone[unit] = w[unit]
        rise = torch.einsum("ij,ijkl,kl->", gone, hessian, gone)
        assert torch.stack(scores)[:, unit].mean().item() == pytest.approx(rise.item(), rel=1e-4)


def test_group_and_element_criteria_differ_by_the_cross_terms() -> None:
    w, g = torch.tensor([[1.0, 2.0], [1.0, 1.0], [0.0, 0.0]]), torch.tensor([[3.0, -1.0], [1.0, 1.0], [5.0, 5.0]])
    group = gradient_scores({"w": w}, {"w": g}, [ROWS], "fisher_group")["rows"]
    element = gradient_scores({"w": w}, {"w": g}, [ROWS], "taylor_elem")["rows"]
    assert group.tolist() == [1.0, 4.0, 0.0]
    assert element.tolist() == [13.0, 2.0, 0.0]  # a unit of zeros matters not, whatever its gradient


@pytest.mark.parametrize("criterion", ["fisher_group", "taylor_elem"])
def test_scores_do_not_see_the_scale_of_weights(criterion: str) -> None:
    model = _opened()
    structures = vit_structures(model)
    weights = dict(model.named_parameters())
    grads = _grads(model)
    ours = gradient_scores(weights, grads, structures, criterion)
    other = gradient_scores(
        {n: 8 * w for n, w in weights.items()}, {n: g / 8 for n, g in grads.items()}, structures, criterion
    )
    for name, values in ours.items():
        torch.testing.assert_close(values, other[name])


def test_overflow_counts_as_nothing_and_the_criterion_is_checked() -> None:
    g = torch.tensor([[float("inf"), 0.0], [1.0, 0.0], [float("nan"), 0.0]])
    scores = gradient_scores({"w": torch.ones(3, 2)}, {"w": g}, [ROWS], "fisher_group")["rows"]
    assert scores.tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(RecipeError, match="did you mean 'fisher_group'"):
        gradient_scores({"w": g}, {"w": g}, [ROWS], "fisher")


def test_function_preserving_rescaling_changes_magnitude_not_saliency() -> None:
    """LayerNorm gain up, the rows that read it down: the same function, so the same units must go."""
    model = _opened("vit_tiny_patch16_224")
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for block in scaled.blocks:
            for t in (block.norm2.weight, block.norm2.bias):
                t.mul_(20.0)
            block.mlp.fc1.weight.div_(20.0)
    structures = [s for s in vit_structures(model) if s.kind == "mlp"]
    without_bias = [Structure(s.name, s.kind, s.removes, s.scores[:1]) for s in structures]
    ours, theirs = (
        gradient_scores(dict(m.named_parameters()), _grads(m), without_bias, "fisher_group") for m in (model, scaled)
    )
    big, small = (magnitude_scores(dict(m.named_parameters()), without_bias) for m in (model, scaled))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(big[name], 400 * small[name])


def test_magnitude_and_chance() -> None:
    w = {"w": torch.tensor([[1.0, 2.0], [0.0, 3.0], [1.0, 0.0]])}
    assert magnitude_scores(w, [ROWS])["rows"].tolist() == [2.5, 4.5, 0.5]
    assert magnitude_scores(w, [ROWS], mean=False)["rows"].tolist() == [5.0, 9.0, 1.0]
    draws = [random_scores([ROWS], torch.Generator().manual_seed(i))["rows"] for i in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# -- ranking ----------------------------------------------------------------------------------------


def test_groups_are_runs_of_the_sorted_units() -> None:
    scores = {"a": torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])}
    last, first = form_groups(scores, {"a": 2}), form_groups(scores, {"a": 2}, odd_first=True)
    assert [(g.units, g.score) for g in last[0]] == [((1, 3), 3.0), ((4, 2), 7.0), ((0,), 5.0)]
    assert [(g.units, g.score) for g in first[0]] == [((1,), 1.0), ((3, 4), 5.0), ((2, 0), 9.0)]
    assert [g.last for g in last[0]] == [False, False, True]
    structure = Structure("a", "row", (Region("w", 0, (5,)),), ())
    assert smallest([structure], {"a": 2}) == {"a": 1} and smallest([structure], {"a": 2}, odd_first=True) == {"a": 2}
    assert smallest([structure], {"a": 16}) == {"a": 5}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_zeroed_groups_after_a_round(seed: int) -> None:
    """Without a latency term round i (from 0) leaves max(1, 2 i) groups zeroed (release)."""
    draw = torch.Generator().manual_seed(seed)
    structures = [Structure(n, "row", (Region(n, 0, (u,)),), ()) for n, u in (("a", 40), ("b", 24), ("c", 12))]
    sizes = {"a": 8, "b": 8, "c": 4}
    keep = keep_all(structures)
    for i in range(5):
        scores = {k: v * keep[k] for k, v in random_scores(structures, draw).items()}
        keep = prune_below(form_groups(scores, sizes), keep, i * 2 - 1)
        zeroed = sum(int((~m).sum()) // sizes[k] for k, m in keep.items())
        left_over = sum(all(not m.any() for m in [keep[k]]) for k in keep)
        assert left_over == 0
        assert zeroed <= max(1, 2 * i)
        if all(c > sizes[k] for k, c in counts_of(keep).items()):
            assert zeroed == max(1, 2 * i)


def test_pruning_until_it_fits_takes_the_fewest_groups_and_leaves_one() -> None:
    structures = [Structure(n, "row", (Region(n, 0, (8,)),), ()) for n in "ab"]
    scores = {"a": torch.arange(8.0), "b": torch.arange(8.0) + 2.5}
    groups, keep = form_groups(scores, {"a": 2, "b": 2}), keep_all(structures)
    kept = prune_until(groups, keep, lambda k: sum(counts_of(k).values()) <= 11)
    assert counts_of(kept) == {"a": 4, "b": 6}
    assert counts_of(prune_until(groups, kept, lambda k: False)) == {"a": 2, "b": 2}
    assert counts_of(prune_until(groups, kept, lambda k: True)) == counts_of(kept)


# -- costs ------------------------------------------------------------------------------------------


def _table() -> LatencyTable:
    axes = {"embed": [8, 32], "mlp": [16, 128]}
    heads = Grid({"heads": [1, 4], "qk": [2, 8], "v": [2, 8]}, [[[1.0, 1.0], [1.0, 1.0]], [[4.0, 4.0], [4.0, 4.0]]])
    setting = Setting("here", "openvino", "f32", 2, 8, 17)
    return LatencyTable(setting, (Grid(axes, [[1.0, 2.0], [2.0, 4.0]]), heads), scale=0.5)


def test_costs_are_those_of_the_ledger() -> None:
    model = _opened()
    structures = vit_structures(model)
    costs = WidthCosts(model, structures)
    keep = keep_all(structures)
    for s in structures:
        keep[s.name][: s.units // 4] = False
    counts = counts_of(keep)
    dense = cost(model, saved=False)
    assert (costs.macs(costs.full), costs.params(costs.full)) == (dense.macs, dense.params)
    small = cost(slice_vit(model, structures, keep), saved=False)
    assert (costs.macs(counts), costs.params(counts)) == (small.macs, small.params)


def test_latency_falls_with_every_width_and_gains_stop_at_the_last_group() -> None:
    model = _opened()
    structures = vit_structures(model)
    costs = WidthCosts(model, structures, _table())
    assert costs.latency(costs.full) == pytest.approx(2 * 0.5 * (4 + 4))
    gains = costs.gains("latency", costs.full, {s.name: 1 for s in structures})
    assert gains["emb"] == pytest.approx(2 * 2 / 24 / 16)  # both blocks gain
    assert gains["blocks.0.head"] == pytest.approx(1 / 16)
    assert gains["blocks.0.qk"] == 0.0
    assert set(costs.gains("macs", costs.full, costs.full).values()) == {0.0}


def test_a_budget_out_of_reach_names_the_range() -> None:
    model = _opened()
    structures = vit_structures(model)
    costs = WidthCosts(model, structures, _table())
    lowest = {s.name: 1 for s in structures}
    found = bounds(costs, parse_budgets({"macs": "60%", "latency": "5ms"}, "x"), lowest, "x")
    assert found.metric == "latency" and found.limits["latency"] == 5.0
    assert not found.met(costs.full) and found.met(costs.full, progress=0.0) and found.met(lowest)
    with pytest.raises(RecipeError, match=r"x: params='0.01%' is .* Reachable are .* M to .* M \(.*% to 100%"):
        bounds(costs, parse_budgets({"params": "0.01%"}, "x"), lowest, "x")
    with pytest.raises(RecipeError, match="no budget"):
        parse_budgets({"macs": None}, "x")
    with pytest.raises(RecipeError, match="no table"):
        WidthCosts(model, structures).latency(lowest)


def test_removed_units_stay_zero() -> None:
    model = _opened()
    structures = vit_structures(model)
    keep = keep_all(structures)
    keep["blocks.0.mlp"][3] = False
    enforce(dict(model.named_parameters()), structures, keep)
    assert not model.get_parameter("blocks.0.mlp.fc1.weight")[3].any()
    assert not model.get_parameter("blocks.0.mlp.fc2.weight")[:, 3].any()
    assert model.get_parameter("blocks.0.mlp.fc1.weight")[2].any()
