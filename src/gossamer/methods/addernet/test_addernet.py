"""AdderNet against the release's recorded numbers (``oracle.json``), the sheet's counts and its own promises."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import GossamerError, ModelError, PlanError, RecipeError
from gossamer.core.schedule import Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.cost.ledger import cost
from gossamer.export.exporting import export
from gossamer.kits.example import noise
from gossamer.methods.addernet import AdderNet
from gossamer.methods.addernet.layers import NormedLinear, choose, convert_to_adder
from gossamer.methods.addernet.maths import AdaptiveLRScaler, PNormSchedule, adder_layers, scale_gradient
from gossamer.models.build import load_model
from gossamer.ops.adder import adder_conv2d, adder_linear
from gossamer.ops.adder_layers import AdderConv2d, AdderLinear, Int8AdderConv2d
from gossamer.tasks.classification import Classification

HERE = Path(__file__).parent
ORACLE = json.loads((HERE / "oracle.json").read_text())
FIGURES = {f["name"]: f for f in tomllib.loads((HERE / "figures.toml").read_text())["figure"]}


def wave(shape: tuple[int, ...], seed: float) -> Tensor:
    """Return fixed pseudo-random numbers in [-1, 1] that need no generator."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    v = torch.sin(i * 12.9898 + seed * 78.233) * 43758.5453
    return ((v - v.floor()) * 2 - 1).float().reshape(shape)


def resnet8(**options) -> nn.Module:
    torch.manual_seed(0)
    return load_model("resnet8_cifar", num_classes=10, width=8, **options)


def trained_by_hand(method: AdderNet, steps: int = 4, **options) -> nn.Module:
    """Run the method in a loop of one's own, phases and all."""
    stack, plain = Stack([method]), resnet8(**options)
    model = stack.prepare(plain)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    grads = stack.grads(Classification().loss)
    for phase in stack.phases(Plan([Phase("fit", steps)])):
        model = stack.enter(model, phase)
        for i in range(phase.steps):
            step = Step(phase.name, "main", i, phase.steps)
            if phase.work is not None:
                phase.work(model.eval(), {"train": noise}, step)
                continue
            grads(model.train(), noise(step, 16), step, list(model.parameters()))
            stack.before_step(model, step)
            optimizer.step()
            optimizer.zero_grad()
        model = stack.leave(model, phase)
    return stack.finish(model).eval()


# -- the release -----------------------------------------------------------------------------------
@pytest.mark.parametrize("k", range(len(ORACLE["layers"])))
def test_layer_and_gradients_are_those_of_the_release(k: int) -> None:
    case = ORACLE["layers"][k]
    n, c, side, o, kernel, stride, padding = case["sizes"]
    x = (wave((n, c, side, side), 2 * k) * 3).requires_grad_()
    weight = (wave((o, c, kernel, kernel), 2 * k + 1) * 2).requires_grad_()
    out = adder_conv2d(x, weight, stride, padding)
    out.backward(wave(tuple(out.shape), 100 + k))
    scaled = scale_gradient(weight.grad, 0.2)
    for ours, name in ((out, "out"), (x.grad, "input_grad"), (scaled, "weight_grad")):
        theirs = torch.tensor(case[name]).view_as(ours)
        assert (ours - theirs).abs().max() <= FIGURES["layer_oracle"]["tolerance"] * theirs.abs().max()


def filled(name: str, **options) -> nn.Module:
    """Return the network with the weights that the recorded one had."""
    model = convert_to_adder(load_model(name, num_classes=10, **options)).train()
    for key, p in model.named_parameters():
        v = wave(tuple(p.shape), 200 + sum(map(ord, key)))
        p.data.copy_(1 + 0.5 * v if p.ndim == 1 and key.endswith("weight") else v)
    return model


@pytest.mark.parametrize(("name", "options"), [("resnet20_cifar", {"head_bias": False}), ("resnet50", {})])
def test_networks_are_those_of_the_release(name: str, options: dict) -> None:
    case, model = ORACLE["nets"][name], filled(name, **options)
    assert sum(p.numel() for p in model.parameters()) == case["parameters"]
    with torch.no_grad():
        out = model(wave(tuple(case["shape"]), 7))
    theirs = torch.tensor(case["logits"])
    assert (out - theirs).abs().max() <= FIGURES["network_oracle"]["tolerance"] * theirs.abs().max()


@pytest.mark.parametrize(
    ("name", "side", "options"),
    [("resnet20_cifar", 32, {"head_bias": False}), ("resnet32_cifar", 32, {"head_bias": False}), ("resnet50", 224, {})],
)
def test_counts(name: str, side: int, options: dict) -> None:
    classes = 10 if side == 32 else 1000
    model = convert_to_adder(load_model(name, num_classes=classes, **options))
    found = cost(model.to("meta"), torch.zeros(1, 3, side, side, device="meta"), saved=False)
    assert found.params == FIGURES[f"{name}_parameters"]["value"]
    assert (found.additions - found.macs) // 2 == FIGURES[f"{name}_pairs"]["value"]
    macs = FIGURES[f"{name}_macs"]
    assert abs(found.macs - macs["value"]) <= macs["tolerance"]


# -- adaptive rate and schedule --------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scaled_gradients_have_eta_as_their_rms_whatever_the_loss_s_scale(scale: float) -> None:
    grad = scale * wave((8, 4, 3, 3), 1)
    assert scale_gradient(grad, 0.2).square().mean().sqrt() == pytest.approx(0.2, rel=1e-5)
    assert torch.equal(scale_gradient(torch.zeros(3), 0.2), torch.zeros(3))


def test_only_adder_filters_are_scaled_and_once_complete() -> None:
    model = convert_to_adder(resnet8())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = AdaptiveLRScaler(model, optimizer, eta=0.3)
    images = wave((4, 3, 32, 32), 2)
    for part in images.split(2):  # two accumulated halves
        F.cross_entropy(model.train()(part), torch.tensor([1, 2])).backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    filters = {f"{n}.weight" for n in adder_layers(model)}
    assert filters
    for name, p in model.named_parameters():
        if name in filters:
            assert p.grad.square().mean().sqrt() == pytest.approx(0.3, rel=1e-5)
            torch.testing.assert_close(F.normalize(p.grad.flatten(), dim=0), F.normalize(plain[name].flatten(), dim=0))
        else:
            assert torch.equal(p.grad, plain[name])
    scaler.remove()
    optimizer.step()


def test_schedule_falls_from_two_to_one_and_stays() -> None:
    for shape in ("linear", "cosine"):
        values = [PNormSchedule(shape=shape)(k / 100) for k in range(101)]
        assert values[0] == 2 and values[75:] == [1.0] * 26 and values == sorted(values, reverse=True)
    assert PNormSchedule()(0.375) == pytest.approx(1.5) and PNormSchedule(until=1.0)(0.5) == pytest.approx(1.5)


def test_exponent_follows_the_step_and_ends_at_one() -> None:
    stack = Stack([AdderNet(gradient="lp", p_until=0.5)])
    model = stack.prepare(resnet8())
    grads, seen = stack.grads(Classification().loss), []
    for i in range(4):
        step = Step("fit", "main", i, 4)
        grads(model.train(), noise(step), step, list(model.parameters()))
        seen.append({layer.p for layer in adder_layers(model).values()})
    assert seen == [{2.0}, {1.5}, {1.0}, {1.0}]


def test_layers_can_change_after_the_products_are_trained() -> None:
    before, fit = Phase("pretrain", 3), Phase("fit", 6)
    stack = Stack([AdderNet(phase="fit", fresh=False)])
    model = stack.prepare(resnet8())
    stack.phases(Plan([before, fit]))
    model = stack.enter(model, before)
    assert not adder_layers(model) and type(model.fc) is nn.Linear
    trained = model.layer1[0].conv1.weight.detach().clone()
    model = stack.enter(model, fit.part("fit.a", 0, 3))
    assert len(adder_layers(model)) == 8 and torch.equal(model.layer1[0].conv1.weight, trained)
    stack.enter(model, fit.part("fit.b", 3, 3))
    assert len(stack.edits) == 1


def test_a_pretraining_needs_to_know_when_layers_change() -> None:
    plan = Plan([Phase("pretrain", 3), Phase("fit", 3)])
    with pytest.raises(PlanError, match="set phase: fit"):
        AdderNet().phases(plan)
    with pytest.raises(PlanError, match="phase='tune'; allowed are null and pretrain, fit"):
        AdderNet(phase="tune").phases(plan)


# -- layers ----------------------------------------------------------------------------------------
def test_first_layer_and_classifier_stay() -> None:
    model = convert_to_adder(load_model("resnet18", num_classes=7))
    kinds = {n: type(m) for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() > 1}
    assert kinds.pop("conv1") is nn.Conv2d and kinds.pop("fc") is NormedLinear
    assert set(kinds.values()) == {AdderConv2d} and len(kinds) == 19  # shortcuts among them
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_what_cannot_change_is_named() -> None:
    found = choose(load_model("mobilenetv2_035", num_classes=5))
    assert "groups=" in found.left["blocks.0.0.conv_dw"] and "blocks.1.0.conv_pw" in found.layers
    skipped = choose(resnet8(), skip=["*downsample*"])
    assert skipped.left["layer2.0.downsample.0"] == "skipped"


def test_filters_are_normal_and_depend_on_seed_and_place_alone() -> None:
    plain = resnet8()
    state = torch.get_rng_state()
    first = convert_to_adder(plain, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    again = convert_to_adder(load_model("resnet8_cifar", num_classes=10, width=8), seed=3)
    ours, theirs = adder_layers(first), adder_layers(again)
    assert all(torch.equal(ours[n].weight, theirs[n].weight) for n in ours)
    assert not torch.equal(ours["layer1.0.conv1"].weight, ours["layer1.0.conv2"].weight)
    pooled = torch.cat([m.weight.detach().flatten() for m in ours.values()])
    assert abs(pooled.mean()) < 0.05 and abs(pooled.std() - 1) < 0.05
    plain = resnet8()
    kept = adder_layers(convert_to_adder(resnet8(), seed=None))
    assert all(torch.equal(m.weight, plain.get_submodule(n).weight) for n, m in kept.items())


@pytest.mark.parametrize(
    "options", [{}, {"gradient": "sign"}, {"clip": False}, {"adaptive": False}, {"fresh": False}, {"p_start": 1.5}]
)
def test_every_part_can_be_switched(options: dict) -> None:
    base, other = trained_by_hand(AdderNet()), trained_by_hand(AdderNet(**options))
    images = wave((4, 3, 32, 32), 3)
    assert torch.isfinite(other(images)).all()
    assert torch.equal(base(images), other(images)) == (not options)


def test_training_learns_and_statistics_are_taken_at_one() -> None:
    torch.manual_seed(0)
    model = convert_to_adder(resnet8())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    AdaptiveLRScaler(model, optimizer)
    batch, losses = noise(Step("fit", "main", 0, 1), 16), []
    for _ in range(12):
        loss = F.cross_entropy(model.train()(batch["image"]), batch["target"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# -- finish ----------------------------------------------------------------------------------------
def test_bytes_take_the_norms_and_stay_close() -> None:
    wide, eight = trained_by_hand(AdderNet()), trained_by_hand(AdderNet(bits=8))
    kinds = [type(m) for m in eight.modules()]
    assert AdderConv2d not in kinds and kinds.count(Int8AdderConv2d) == 8 and kinds.count(nn.BatchNorm2d) == 1
    images = wave((16, 3, 32, 32), 3)
    with torch.no_grad():
        exact, ours = wide(images), eight(images)
    assert (ours - exact).norm() < 0.1 * exact.norm()
    saved = cost(eight, (3, 32, 32), saved=False)
    assert saved.weight_bytes < 0.4 * cost(wide, (3, 32, 32), saved=False).weight_bytes
    assert saved.energy_pj < 0.3 * cost(wide, (3, 32, 32), saved=False).energy_pj


def test_report_states_operations_and_energy() -> None:
    method = AdderNet()
    model = Stack([method]).prepare(resnet8())
    found = method.describe(model)
    rows = found["tables"][0]["rows"]
    products, differences = rows[0], rows[2]
    assert products["multiplications"] == products["additions"] > 10 * differences["multiplications"]
    assert differences["energy_uj"] < products["energy_uj"] and "stays a product: conv1" in found["facts"]


def test_no_runtime_has_an_adder_kernel_and_large_layers_say_so(tmp_path: Path) -> None:
    model = convert_to_adder(resnet8()).eval()
    with pytest.raises(GossamerError, match="no runtime has an adder kernel.*Run the model in torch"):
        export(model, tmp_path / "big", format="onnx", example=torch.zeros(1, 3, 2048, 2048))


def test_small_layers_are_written_out_in_standard_operators(tmp_path: Path) -> None:
    model = convert_to_adder(nn.Sequential(*list(resnet8().children())[:4])).eval()  # ONNX: the conformance suite
    model.default_cfg = model.pretrained_cfg = resnet8().pretrained_cfg
    proof = export(model, tmp_path, format="openvino", batch=2).parity
    assert proof["relative"] <= proof["tolerance"]


# -- universal approximation (2105.14202, section 4) -----------------------------------------------
def test_one_hidden_layer_spans_piecewise_linear_functions() -> None:
    draw = torch.Generator().manual_seed(0)
    knots = torch.linspace(-1, 1, 12, dtype=torch.float64)
    heights = torch.randn(12, generator=draw, dtype=torch.float64)
    x = torch.linspace(-1, 1, 400, dtype=torch.float64)
    left = torch.searchsorted(knots, x, right=True).clamp(1, 11) - 1
    target = heights[left] + (x - knots[left]) / (knots[1] - knots[0]) * (heights[left + 1] - heights[left])
    hidden = torch.cat([adder_linear(x[:, None], knots[:, None]), torch.ones(400, 1, dtype=torch.float64)], 1)
    error = hidden @ torch.linalg.lstsq(hidden, target[:, None], driver="gelsd").solution - target[:, None]
    assert error.abs().max() < FIGURES["piecewise_linear"]["tolerance"]


def test_the_error_on_a_smooth_function_falls_with_the_square_of_the_knots() -> None:
    x = torch.linspace(0, 1, 2000, dtype=torch.float64)
    target, errors = torch.sin(7 * x)[:, None], []
    for units in (8, 16, 32):
        knots = torch.linspace(0, 1, units, dtype=torch.float64)
        hidden = torch.cat([adder_linear(x[:, None], knots[:, None]), torch.ones(2000, 1, dtype=torch.float64)], 1)
        fit = hidden @ torch.linalg.lstsq(hidden, target, driver="gelsd").solution
        errors.append(float((fit - target).abs().max()))
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3 and errors[2] < 5e-3


def test_a_trained_toy_network_approximates_a_function_of_two_variables() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(AdderLinear(2, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 1))
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    x = torch.rand(512, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    target = (torch.sin(3 * x[:, :1]) * x[:, 1:]).detach()
    for _ in range(250):
        loss = F.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05 * float(target.var())


# -- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient": "exact"}, ModelError, "allowed are full, lp, sign"),
        ({"eta": 0.0}, RecipeError, "eta=0.0"),
        ({"bits": 4}, RecipeError, "bits=4.*allowed are 8 and 32"),
        ({"p_start": 3.0}, RecipeError, "from 3.0 to 1.0"),
        ({"p_until": 0.0}, RecipeError, "a share above 0"),
        ({"p_shape": "step"}, RecipeError, "allowed are linear, cosine"),
        ({"skip": ["*"]}, ModelError, "none of .* can become an adder layer"),
        ({"skip": ["layer9*"]}, ModelError, "skip='layer9\\*' fits no convolution or linear layer"),
    ],
)
def test_wrong_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Stack([AdderNet(**options)]).prepare(resnet8())


def test_a_transformer_is_refused() -> None:
    model = load_model("vit_tiny_patch16_224", img_size=32, patch_size=16, depth=1, num_classes=4)
    with pytest.raises(ModelError):
        Stack([AdderNet()]).prepare(model)


def test_bytes_need_their_ranges() -> None:
    stack = Stack([AdderNet(bits=8)])
    model = stack.prepare(resnet8())
    with pytest.raises(ModelError, match="addernet.ranges"):
        stack.finish(model)
