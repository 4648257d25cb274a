"""kits: calibration walk, row picking, streaming extremes, scale search, layout."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from gossamer.core.errors import DataError, ModelError, RecipeError
from gossamer.core.schedule import Step
from gossamer.kits.calibration import (
    RowPick,
    TopMagnitudes,
    Walk,
    calibration_batches,
    capture_inputs,
    capture_outputs,
    mean_quantized_input,
)
from gossamer.kits.quant_layout import (
    WidthOptions,
    find_layout,
    finish_layers,
    layer_specs,
    open_layout,
    quant_layers,
    wrap_layers,
)
from gossamer.kits.scale_search import LinearProblem, ProductProblem, SearchOptions, Similarity, search_scales
from gossamer.ops.quant import max_scale

SMALL = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 7}
STEP = Step("ptq.calibrate", "work", 0, 1)


def _vit(seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **options}).eval()


def _wrapped(model, **options):
    layout = find_layout(model)
    open_layout(model, layout)
    return wrap_layers(model, layer_specs(model, layout, WidthOptions(**options))), layout


# -- similarity ---------------------------------------------------------------------------------------
def test_pearson_is_torchs_correlation():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 4, 30, generator=draw), torch.randn(5, 4, 30, generator=draw)
    b = 0.7 * a + 0.3 * b
    expected = torch.stack(
        [torch.corrcoef(torch.stack((x.flatten(), y.flatten())))[0, 1] for x, y in zip(a, b, strict=True)]
    )
    assert torch.allclose(1 - Similarity(a).losses(b), expected, atol=1e-6)


def test_pearson_is_blind_to_positive_affine_maps_and_the_others_are_not():
    x = torch.randn(3, 50)
    assert Similarity(x).loss(2.5 * x + 3) < 1e-6
    assert Similarity(x).loss(-x) == pytest.approx(2, abs=1e-5)
    assert Similarity(x, "cosine").loss(2.5 * x) < 1e-6 < Similarity(x, "cosine").loss(x + 3)
    assert Similarity(x, "mse").loss(2 * x) == pytest.approx(1, abs=1e-5)


def test_samples_are_averaged_not_pooled():
    target = torch.tensor([[0.0, 1.0, 2.0], [100.0, 101.0, 102.0]])
    out = torch.tensor([[2.0, 1.0, 0.0], [102.0, 101.0, 100.0]])
    assert Similarity(target).loss(out) == pytest.approx(2, abs=1e-4)


def test_constant_targets_do_not_divide_by_zero():
    flat = torch.ones(2, 5)
    assert Similarity(flat).loss(flat) == 0
    assert Similarity(flat).loss(torch.randn(2, 5)) == 1


# -- search -------------------------------------------------------------------------------------------
def test_grid_holds_the_initial_step():
    for count in (1, 7, 40, 100):
        factors = SearchOptions(n_candidates=count).factors()
        assert 1.0 in factors and len(factors) == count
    grid = SearchOptions(n_candidates=100).factors()
    assert grid[0] == 0.5 and grid[-1] == pytest.approx(1.2)


def _linear_problem(bits=4, **options):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(6, 12, 16, generator=draw) * (1 + 4 * torch.rand(16, generator=draw))
    layer = nn.Linear(16, 9)
    with torch.no_grad():
        out = layer(x)
    rows = layer.weight.detach().abs().reshape(3, -1).amax(1)
    initial = (max_scale(rows, bits), max_scale(x.abs().max().reshape(1), bits))
    return LinearProblem(
        x, out, layer.weight.detach(), layer.bias.detach(), bits=(bits, bits), initial=initial, groups=3, **options
    )


@pytest.mark.parametrize("metric", ["pearson", "cosine", "mse"])
@pytest.mark.parametrize("coarse", [False, True])
def test_search_never_gets_worse_and_stays_in_the_interval(metric, coarse):
    problem = _linear_problem(metric=metric, correct_bias=True)
    start = problem.settle()
    result = search_scales(problem, SearchOptions(n_candidates=30, coarse=coarse))
    assert result.losses == sorted(result.losses, reverse=True)
    assert result.losses[-1] < start
    assert problem.settle() == pytest.approx(result.losses[-1], rel=1e-5)
    for name, step in problem.scales.items():
        assert 0.5 - 1e-6 <= float(step / problem.initial[name]) <= 1.2 + 1e-6
    if coarse:
        rounds = len(result.losses)
        assert result.evaluations < 0.8 * 30 * 4 * rounds


def test_line_search_finds_the_best_of_all_candidates():
    problem = _linear_problem()
    options = SearchOptions(n_candidates=15, max_iter=1)
    problem.settle()
    loss_of = problem.vary("weight.0")
    best = min(float(loss_of(problem.initial["weight.0"] * f)) for f in options.factors())
    search_scales(problem, options)
    fresh = _linear_problem()
    fresh.scales["weight.0"] = problem.scales["weight.0"]
    assert loss_of(problem.scales["weight.0"]) == pytest.approx(best)


def test_pearson_search_still_gives_a_small_l2_error():
    """Pearson cannot see a gain; the interval around max-abs keeps it near one all the same."""
    problem = _linear_problem(bits=6, correct_bias=True)
    search_scales(problem, SearchOptions(n_candidates=30))
    got, target = torch.cat(problem.outputs(), -1), torch.cat(problem.targets, -1)
    assert ((got - target).square().sum() / target.square().sum()) < 0.01


def test_bias_correction_zeroes_the_mean_error_and_is_idempotent():
    problem = _linear_problem(bits=3, correct_bias=True)
    search_scales(problem, SearchOptions(n_candidates=10))
    error = (torch.cat(problem.outputs(), -1) - torch.cat(problem.targets, -1)).mean((0, 1))
    assert error.abs().max() < 1e-5
    bias = problem.bias().clone()
    problem.settle()
    assert torch.allclose(problem.bias(), bias, atol=1e-6)
    fine = _linear_problem(bits=16, correct_bias=True)
    before = fine.bias().clone()
    fine.settle()
    assert torch.allclose(fine.bias(), before, atol=1e-3)


def test_product_search_improves():
    draw = torch.Generator().manual_seed(2)
    a, b = torch.randn(4, 2, 10, 8, generator=draw), torch.randn(4, 2, 8, 10, generator=draw)
    a[0, 0, 0, 0] = 12
    initial = tuple(max_scale(t.abs().max().reshape(1), 4) for t in (a, b))
    result = search_scales(ProductProblem(a, b, a @ b, bits=(4, 4), initial=initial), SearchOptions(n_candidates=30))
    assert result.losses[-1] < 0.95 * result.losses[0]


def test_search_options_are_checked():
    for bad in ({"alpha": 0.0}, {"alpha": 2.0}, {"n_candidates": 0}, {"early_stop": 1.0}):
        with pytest.raises(RecipeError, match="ptq"):
            SearchOptions(**bad).check("ptq")


# -- images and walk ------------------------------------------------------------------------------------
def _loader(total, size=4):
    images = torch.randn(total, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def loader(step):
        index = [(step.index * size + i) % total for i in range(size)] if total else []
        return {"image": images[index], "id": [str(i) for i in index]}

    return loader


def test_batches_are_counted_and_repeat_no_image():
    got = calibration_batches({"calibration": _loader(100)}, 10, STEP)
    assert [len(b) for b in got] == [4, 4, 2]
    again = calibration_batches({"calibration": _loader(100)}, 10, STEP)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert sum(len(b) for b in calibration_batches({"calibration": _loader(6)}, 32, STEP)) == 6


def test_zero_images_are_one_clear_error():
    with pytest.raises(DataError, match="0 images"):
        calibration_batches({"calibration": _loader(0)}, 8, STEP)
    with pytest.raises(RecipeError, match="images=0"):
        calibration_batches({"calibration": _loader(8)}, 0, STEP)
    with pytest.raises(DataError, match="no images were given"):
        calibration_batches({}, 8, STEP)


def test_order_is_that_of_execution_and_replay_equals_the_full_run():
    model, layout = _wrapped(_vit())
    batches = [torch.randn(3, 3, 32, 32), torch.randn(2, 3, 32, 32)]
    walk = Walk(model, batches)
    order = walk.order(quant_layers(model))
    attention = [f"blocks.0.attn.{n}" for n in ("qkv", "scores", "values", "proj")]
    assert order[:6] == ["patch_embed.proj", *attention, "blocks.0.mlp.fc1"]
    assert order[-1] == "head" and set(order) == set(quant_layers(model))
    full = capture_inputs(walk, "blocks.1.mlp.fc2", RowPick(3, 0))
    walk.start_at("blocks.1")
    replayed = capture_inputs(walk, "blocks.1.mlp.fc2", RowPick(3, 0))
    assert torch.equal(full.parts[0], replayed.parts[0]) and full.parts[0].shape == (5, 1, 3, 128)
    assert not full.complete


def test_captures_agree_with_the_layer():
    model, layout = _wrapped(_vit())
    walk = Walk(model, [torch.randn(4, 3, 32, 32)])
    name, pick = "blocks.0.attn.qkv", RowPick(2, 5)
    seen, out = capture_inputs(walk, name, pick), capture_outputs(walk, {name: pick})[name]
    layer = model.get_submodule(name)
    assert torch.allclose(layer(seen.parts[0]), out.out, atol=1e-5)
    everything = capture_inputs(walk, name, RowPick(None, 0))
    assert everything.complete and everything.parts[0].shape == (4, 1, 5, 32)
    assert torch.equal(everything.top[0], everything.parts[0].abs().max().reshape(1))
    assert torch.allclose(out.mean.float(), layer(everything.parts[0]).mean((0, 1, 2)), atol=1e-5)
    plain, _ = mean_quantized_input(walk, name)
    assert torch.allclose(plain.float(), everything.parts[0].mean((0, 1, 2)), atol=1e-5)


def test_a_convolution_is_seen_as_unfolded_patches():
    model, _ = _wrapped(_vit())
    walk = Walk(model, [torch.randn(2, 3, 32, 32)])
    name, pick = "patch_embed.proj", RowPick(None, 0)
    seen, out = capture_inputs(walk, name, pick), capture_outputs(walk, {name: pick})[name]
    layer = model.get_submodule(name)
    rebuilt = seen.parts[0] @ layer.weight.flatten(1).T + layer.bias
    assert torch.allclose(rebuilt, out.out, atol=1e-4)


def test_windows_are_kept_whole():
    pick, x = RowPick(10, 3), torch.arange(2 * 6 * 4).reshape(2, 6, 4, 1).float()
    kept = pick(x)
    assert kept.shape == (2, 2, 4, 1)
    assert torch.equal(kept, pick.windows(x, 4))
    assert torch.equal(kept[1], kept[0] + 24)


@pytest.mark.parametrize("percentile", [100.0, 99.9, 99.0, 50.0])
def test_streamed_percentile_is_exact(percentile):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(4))
    top = TopMagnitudes(percentile, 0.25)
    for part in x.chunk(4):
        top.add(part)
    ordered = np.sort(x.abs().numpy())
    expected = ordered[len(ordered) - 1 - int(np.floor((1 - percentile / 100) * len(ordered)))]
    assert float(top.value()) == pytest.approx(float(expected), rel=1e-6)


# -- layout ----------------------------------------------------------------------------------------------
def test_layout_of_vit_deit_and_swin():
    layout = find_layout(_vit())
    assert layout.heads == ("head",) and len(layout.units) == 4
    assert layout.modules["blocks.0.attn"] == [f"blocks.0.attn.{n}" for n in ("qkv", "proj", "scores", "values")]
    assert layout.modules["blocks.0.mlp"] == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    assert type(layout).from_json(layout.to_json()) == layout
    deit = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL)
    assert find_layout(deit).heads == ("head", "head_dist")
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(1, 2), embed_dim=16)
    names = {n for u in find_layout(swin).units.values() for n in u}
    assert "layers.1.downsample.reduction" in names and "layers.1.blocks.0.attn.scores" in names
    assert len(find_layout(swin).modules) == 4


def test_fused_projections_get_three_steps():
    model, _ = _wrapped(_vit())
    assert len(model.blocks[0].attn.qkv.weight_scale) == 3
    assert len(_wrapped(_vit(), per_channel=True)[0].blocks[0].attn.qkv.weight_scale) == 96


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_models_without_attention_are_refused(name):
    with pytest.raises(ModelError, match="holds no attention; expected a vision transformer"):
        find_layout(timm.create_model(name))


def test_unknown_attention_is_refused_by_name():
    with pytest.raises(ModelError, match="attention at .*expected timm's Attention"):
        find_layout(timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=2))


def test_a_quantized_model_is_refused():
    with pytest.raises(ModelError, match="already quantized"):
        find_layout(_wrapped(_vit())[0])


def test_wrapping_changes_nothing_and_can_be_undone():
    model, x = _vit(), torch.randn(2, 3, 32, 32)
    keys = set(model.state_dict())
    expected = model(x)
    model, _ = _wrapped(model)
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert keys <= set(model.state_dict())
    model = finish_layers(model, dict.fromkeys(quant_layers(model), "float"))
    assert set(model.state_dict()) == keys
    assert torch.allclose(model(x), expected, atol=1e-5)
