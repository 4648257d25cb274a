"""PTQ for ViT: the paper's formulas against brute force, and the properties of a calibrated model."""

from __future__ import annotations

import copy
import json
import tomllib
from importlib import resources

import pytest
import timm
import torch
from torch import nn

from gossamer.core.errors import DataError, ModelError, RecipeError, StateError
from gossamer.core.registry import build, options_of
from gossamer.core.schedule import Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.kits.bit_allocation import size_mb
from gossamer.kits.calibration import calibrate
from gossamer.kits.example import tiny_vit
from gossamer.kits.quant_layout import quant_layers
from gossamer.methods.ptq_vit import PTQViT
from gossamer.methods.ptq_vit.maths import (
    RankingLoss,
    ScoreView,
    all_pairs,
    nuclear_norm,
    ranking_loss,
    sample_pairs,
    sensitivity,
)
from gossamer.ops.int8 import Int8Conv2d, Int8Linear, Int8MatMul
from gossamer.ops.quant import fake_quantize, max_scale

FAST = {"n_candidates": 8, "max_iter": 2}


def _images(count=6, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def quantized():
    """A calibrated W6A6 model before its final forms, its float twin and the method."""
    model, images = tiny_vit().eval(), _images()
    plain = copy.deepcopy(model)
    method = PTQViT(w_bits=6, a_bits=6, head_bits=6, **FAST)
    return calibrate(method, model, images), plain, method, images


# -- ranking loss --------------------------------------------------------------------------------------
def _brute(scores, target, theta):
    total, count = 0.0, 0
    rows, keys = scores.shape
    for k in range(rows):
        for i in range(keys):
            for j in range(i + 1, keys):
                sign = float(torch.sign(target[k, i] - target[k, j]))
                if sign:
                    total += max(0.0, theta - float(scores[k, i] - scores[k, j]) * sign)
                    count += 1
    return total, count


def _scores(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, 5, generator=draw), torch.randn(1, 4, 5, generator=draw)


def test_ranking_loss_equals_a_double_loop():
    scores, target = _scores()
    target[0, 1, 2] = target[0, 1, 3]  # one tie
    total, count = _brute(scores[0], target[0], 0.2)
    assert count == 4 * 10 - 1
    assert float(ranking_loss(scores, target, 0.2, "sum")) == pytest.approx(total, rel=1e-6)
    assert float(ranking_loss(scores, target, 0.2)) == pytest.approx(total / count, rel=1e-6)


def test_sum_is_averaged_over_samples_only():
    scores, target = _scores()
    two = torch.cat((scores, scores)), torch.cat((target, target))
    assert torch.allclose(ranking_loss(*two, 0.2, "sum"), ranking_loss(scores, target, 0.2, "sum"))


def test_ranking_loss_is_zero_only_with_margin():
    target = torch.tensor([[[0.0, 1.0, 2.0]]])
    assert ranking_loss(target, target, 0.2) == 0
    assert ranking_loss(0.1 * target, target, 0.2) > 0
    assert ranking_loss(-target, target, 0.2) > 0


def test_ranking_loss_properties():
    scores, target = _scores(3)
    base = ranking_loss(scores, target)
    shifted = scores + torch.randn(1, 4, 1)
    assert torch.allclose(ranking_loss(shifted, target), base, atol=1e-6)
    losses = [float(ranking_loss(scores, target, theta)) for theta in (0.0, 0.1, 0.2, 0.5, 1.0)]
    assert losses == sorted(losses)
    order = torch.randperm(5)
    assert torch.allclose(ranking_loss(scores[..., order], target[..., order]), base, atol=1e-6)


def test_sampled_pairs_estimate_the_mean():
    scores, target = _scores(4)
    some = sample_pairs(5, 4, key=0)
    assert some.shape == (2, 4) and (some[0] < some[1]).all()
    assert torch.equal(sample_pairs(5, None, 0), all_pairs(5))
    estimates = [float(ranking_loss(scores, target, pairs=sample_pairs(5, 4, key))) for key in range(400)]
    assert sum(estimates) / 400 == pytest.approx(float(ranking_loss(scores, target)), rel=0.05)


def test_pair_order_is_kendalls_tau():
    target = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    order = RankingLoss(target).agreement
    assert order(target) == 1 and order(-target) == -1
    assert order(torch.tensor([[[2.0, 1.0, 3.0, 4.0]]])) == pytest.approx(4 / 6)
    assert RankingLoss(target).agreement(torch.zeros_like(target)) == 0


def test_score_views():
    scores = torch.randn(2, 3, 3)
    assert torch.allclose(ScoreView("scores", 0.125)(scores), scores * 8)
    assert torch.allclose(ScoreView("attention", 0.125)(scores).sum(-1), torch.ones(2, 3))
    assert ScoreView("scaled_scores", 0.125)(scores) is scores


# -- sensitivity ------------------------------------------------------------------------------------------
def test_nuclear_norm_is_torchs():
    y = torch.randn(3, 2, 7, 5)
    assert torch.allclose(nuclear_norm(y), torch.linalg.matrix_norm(y, ord="nuc"), rtol=1e-5)


def test_sensitivity_formula():
    y = torch.randn(4, 6, 5)
    out = y + 0.1
    expected = torch.linalg.matrix_norm(y, ord="nuc").mean() * (0.01 * 30)
    assert sensitivity(y, out) == pytest.approx(float(expected), rel=1e-4)
    assert sensitivity(10 * y, 10 * out, relative=True) == pytest.approx(sensitivity(y, out, relative=True), rel=1e-4)
    steps = [sensitivity(y, fake_quantize(y, max_scale(y.abs().max(), b), b)) for b in (4, 5, 6, 7, 8)]
    assert steps == sorted(steps, reverse=True)


# -- a calibrated model -----------------------------------------------------------------------------------
def test_search_beats_max_abs(quantized):
    done, plain, _, images = quantized
    start = calibrate(
        PTQViT(w_bits=6, a_bits=6, head_bits=6, max_iter=0, bias_correction=False), copy.deepcopy(plain), images
    )
    with torch.no_grad():
        expected = plain(images)
        errors = [float((m(images) - expected).square().mean()) for m in (done, start)]
    assert errors[0] < 0.9 * errors[1]


def test_fused_projections_have_three_weight_steps(quantized):
    layers = quant_layers(quantized[0])
    assert all(len(m.weight_scale) == 3 for n, m in layers.items() if n.endswith("qkv"))
    assert all(len(m.weight_scale) == 1 for n, m in layers.items() if n.endswith(("proj", "fc1", "fc2", "head")))


def test_steps_stay_between_alpha_and_beta(quantized):
    _, _, method, _ = quantized
    for record in method.state_dict()["records"]:
        assert all(0.5 - 1e-6 <= f <= 1.2 + 1e-6 for f in record["factors"].values())


def test_only_biases_change(quantized):
    done, plain, _, _ = quantized
    ours = done.state_dict()
    for name, value in plain.state_dict().items():
        if not name.endswith("bias") or "norm" in name:
            assert torch.equal(ours[name], value), name
    assert any(not torch.equal(ours[n], v) for n, v in plain.state_dict().items() if n.endswith("fc1.bias"))


@pytest.mark.parametrize("rows", [None, 4])
def test_mean_error_is_zero_on_deployed_inputs(rows):
    """Over all rows of all images, whatever share of them the search saw."""
    model, images = tiny_vit().eval(), _images()
    plain = copy.deepcopy(model)
    done = calibrate(PTQViT(w_bits=5, a_bits=5, rows=rows, **FAST), model, images)
    seen = {}

    def note(which):
        return lambda m, a, o: seen.__setitem__(which, o.double().flatten(0, -2).mean(0))

    for name in ("blocks.0.mlp.fc1", "blocks.2.attn.proj", "blocks.1.attn.qkv", "head"):
        handles = [m.get_submodule(name).register_forward_hook(note(k)) for k, m in (("q", done), ("f", plain))]
        with torch.no_grad():
            done(images), plain(images)
        [h.remove() for h in handles]
        assert (seen["q"] - seen["f"]).abs().max() < 1e-5


def test_sixteen_bits_are_the_float_model():
    model, images = tiny_vit().eval(), _images()
    plain = copy.deepcopy(model)
    done = calibrate(PTQViT(w_bits=16, a_bits=16, head_bits=16, **FAST), model, images)
    with torch.no_grad():
        expected = plain(images)
        assert (done(images) - expected).abs().max() < 1e-3 * expected.abs().max()


def test_eight_bits_become_integer_layers_of_the_same_function():
    model, images = tiny_vit().eval(), _images()
    method = PTQViT(**FAST)
    stack = Stack([method])
    model = stack.prepare(model)
    for phase in stack.phases(Plan([Phase("fit", 0)])):
        model = stack.enter(model, phase)
        for i in range(phase.steps if phase.work else 0):
            phase.work(
                model,
                {"calibration": lambda s: {"image": images, "id": list("abcdef")}},
                Step(phase.name, "work", i, phase.steps),
            )
        model = stack.leave(model, phase)
    with torch.no_grad():
        simulated = model(images)
        real = stack.finish(model)(images)
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(Int8MatMul) == 6 and kinds.count(Int8Conv2d) == 1 and Int8Linear in kinds
    assert not quant_layers(model)
    assert torch.allclose(real, simulated, atol=2e-3 * float(simulated.abs().max()))


def test_low_widths_are_simulated_and_said_so(quantized):
    done, _, method, _ = quantized
    facts = method.describe(done)["facts"]
    assert (
        facts["layers only simulated in float (no kernel at their width)"] == 20 and facts["layers in real 8 bit"] == 0
    )
    carried = calibrate(PTQViT(w_bits=6, a_bits=6, low_bits="int8", **FAST), tiny_vit().eval(), _images())
    assert not quant_layers(carried)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"])
def test_other_architectures(name):
    options = {"img_size": 56, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16} if "swin" in name else {
        "img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    images = _images(4, options["img_size"])
    with torch.no_grad():
        expected = model(images)
        done = calibrate(PTQViT(**FAST), model, images)
        error = (done(images) - expected).square().sum() / expected.square().sum()
    assert error < 0.05 and not quant_layers(done)
    heads = ("head", "head_dist") if "deit" in name else ("head.fc",)
    assert all(isinstance(done.get_submodule(h), Int8Linear) for h in heads)


class _Own(nn.Module):
    """A user's own module of timm blocks, with a branch that is never run."""

    def __init__(self):
        super().__init__()
        from timm.models.vision_transformer import Block

        self.stem = nn.Linear(12, 16)
        self.unused = nn.Linear(16, 16)
        self.body = nn.ModuleList(Block(16, 2, qkv_bias=True) for _ in range(2))
        self.classifier = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(2, 3).permute(0, 2, 1, 3).flatten(2))
        for block in self.body:
            x = block(x)
        return self.classifier(x.mean(1))


def test_own_module_and_layers_never_reached():
    torch.manual_seed(0)
    done = calibrate(PTQViT(**FAST), _Own().eval(), _images(4, 8))
    assert isinstance(done.classifier, Int8Linear) and isinstance(done.stem, Int8Linear)
    assert type(done.unused) is nn.Linear


@pytest.mark.parametrize("inputs", ["float", "local"])
def test_other_sources_of_inputs(inputs):
    model, images = tiny_vit().eval(), _images()
    plain = copy.deepcopy(model)
    done = calibrate(PTQViT(inputs=inputs, **FAST), model, images)
    with torch.no_grad():
        expected = plain(images)
        assert (done(images) - expected).square().sum() / expected.square().sum() < 0.05


def test_stronger_ranking_does_not_lower_the_pair_order():
    taus = []
    for gamma in (0.0, 10.0):
        method = PTQViT(w_bits=4, a_bits=4, rank_gamma=gamma, rank_rows=None, rank_pairs=None, n_candidates=15)
        calibrate(method, tiny_vit().eval(), _images())
        scores = [r["tau"] for r in method.state_dict()["records"] if r["tau"] is not None]
        taus.append(sum(scores) / len(scores))
    assert taus[1] > taus[0] - 0.01


# -- extensions ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["vit", "swin_tiny_patch4_window7_224"])
def test_equalisation_keeps_the_float_function_and_tames_outliers(name):
    model = tiny_vit().eval()
    if name != "vit":
        torch.manual_seed(0)
        model = timm.create_model(
            name, num_classes=5, img_size=56, depths=(1, 1), num_heads=(1, 2), embed_dim=16
        ).eval()
    images = _images(4, 56 if name != "vit" else 32)
    with torch.no_grad():
        blocks = [m for m in model.modules() if hasattr(m, "norm1")]
        for block in blocks:
            block.norm1.weight[3] *= 40  # an outlier channel, as trained transformers have
            block.attn.qkv.weight[:, 3] /= 40
        expected = model(images)
        plain = copy.deepcopy(model)
        errors = {}
        for strength in (None, 0.8):
            done = calibrate(PTQViT(w_bits=6, a_bits=6, equalise=strength, **FAST), copy.deepcopy(plain), images)
            errors[strength] = float((done(images) - expected).square().mean())
        assert errors[0.8] < (0.5 if name == "vit" else 0.8) * errors[None]
        fine = calibrate(PTQViT(w_bits=16, a_bits=16, head_bits=16, equalise=0.8, **FAST), plain, images)
        assert (fine(images) - expected).abs().max() < 2e-3 * expected.abs().max()


def test_unsigned_softmax_halves_the_step():
    layers = [
        quant_layers(calibrate(PTQViT(a_bits=6, unsigned_softmax=u, max_iter=0), tiny_vit().eval(), _images()))
        for u in (False, True)
    ]
    ratio = layers[0]["blocks.0.attn.values"].a_scale / layers[1]["blocks.0.attn.values"].a_scale
    assert float(ratio) == pytest.approx(63 / 31, rel=0.05)


# -- mixed precision --------------------------------------------------------------------------------------
def _mixed(**mixed):
    method = PTQViT(w_bits=6, a_bits=6, head_bits=None, mixed=mixed, **FAST)
    return calibrate(method, tiny_vit().eval(), _images()), method


def _size(model):
    return sum(
        m.weight.numel() * m.bits[0]
        for n, m in quant_layers(model).items()
        if n.startswith("blocks") and hasattr(m, "weight")
    )


@pytest.mark.parametrize("granularity", ["msa_mlp", "layer"])
def test_mixed_precision_keeps_the_budget(granularity):
    done, method = _mixed(bits=(4, 6, 9), budget="6bit", granularity=granularity)
    layers = quant_layers(done)
    weights = sum(m.weight.numel() for n, m in layers.items() if n.startswith("blocks") and hasattr(m, "weight"))
    assert _size(done) <= 6 * weights
    if granularity == "msa_mlp":
        assert len({m.bits for m in layers.values()}) > 1
    state = method.state_dict()
    assert len(state["omegas"]) == (6 if granularity == "msa_mlp" else 12)
    assert all(o["4"] >= o["9"] for o in state["omegas"].values())
    for name, width in state["widths"].items():
        if granularity == "msa_mlp":
            prefix = name.removesuffix("mlp") if name.endswith("mlp") else name
            inside = [
                m.bits for n, m in layers.items() if n.startswith(name if name.endswith("attn") else prefix + "mlp")
            ]
            assert set(inside) == {(width, width)}


def test_one_candidate_width_is_uniform():
    done, _ = _mixed(bits=(5,), budget="6bit")
    assert {m.bits for n, m in quant_layers(done).items() if n.startswith("blocks")} == {(5, 5)}


def test_impossible_budget_names_the_range():
    with pytest.raises(RecipeError, match="the candidate widths reach 4.00..8.00"):
        _mixed(budget="3bit")


def test_search_space_of_the_paper():
    assert f"{5.0**24:.1e}" == "6.0e+16"


# -- protocol ------------------------------------------------------------------------------------------------
def test_options_survive_json():
    method = PTQViT(w_bits=6, mixed={"bits": [4, 6], "budget": "5bit"})
    assert build("ptq_vit", json.loads(json.dumps(options_of(method)))).mixed["budget"] == "5bit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": 1}, "w_bits=1; allowed are 2..16"),
        ({"images": 0}, "images=0; calibrating needs at least 1"),
        ({"metric": "l1"}, "metric='l1'; allowed are pearson"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"equalise": 2.0}, "equalise=2.0; allowed are 0..1"),
        ({"rank_gamma": -1.0}, "rank_gamma=-1.0"),
        ({"mixed": {"bit": (4,)}}, "option 'bit' is unknown"),
        ({"mixed": {"bits": (1,)}}, "mixed.bits"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(RecipeError, match=message):
        PTQViT(**options).prepare(tiny_vit())


def test_refusals():
    with pytest.raises(DataError, match="0 images"):
        calibrate(PTQViT(), tiny_vit(), _images(0))
    with pytest.raises(ModelError, match="holds no attention"):
        PTQViT().prepare(timm.create_model("resnet10t"))
    stack = Stack([PTQViT()])
    model = stack.prepare(tiny_vit())
    with pytest.raises(StateError, match="no layer is calibrated"):
        stack.finish(model)


# -- figures ---------------------------------------------------------------------------------------------------
def _figures(prefix):
    text = resources.files("gossamer.methods.ptq_vit").joinpath("figures.toml").read_text(encoding="utf-8")
    return [f for f in tomllib.loads(text)["figure"] if f["name"].startswith(prefix)]


@pytest.mark.parametrize("figure", _figures("size_"), ids=lambda f: f["name"])
def test_published_sizes(figure):
    millions, bits = (int(t) for t in figure["name"].split("_")[1:3])
    assert size_mb(millions * 10**6, bits) == pytest.approx(figure["value"], abs=figure["tolerance"])
