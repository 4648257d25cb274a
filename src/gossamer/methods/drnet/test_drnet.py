"""DRNet against figures of the release and of the paper, and what must hold of it."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ModelError, PlanError, RecipeError, StateError
from gossamer.core.registry import find
from gossamer.core.schedule import Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.cost.ledger import cost
from gossamer.kits.example import noise
from gossamer.methods.drnet import DRNet
from gossamer.methods.drnet.example import tiny_resnet
from gossamer.methods.drnet.layers import DynamicResolution, give_norms
from gossamer.methods.drnet.maths import (
    budget_shift,
    budget_term,
    credit_term,
    default_sizes,
    predictor_side,
    probe,
    temperature,
)
from gossamer.methods.drnet.predictors import build_predictor, reset
from gossamer.models.build import load_model
from gossamer.ops.routing import Resized, straight_through
from gossamer.ops.switchable import SwitchableNorm
from gossamer.tasks.classification import Classification

HERE = Path(__file__).parent
ORACLE = json.loads((HERE / "oracle.json").read_text())
FIGURES = {f["name"]: f for f in tomllib.loads((HERE / "figures.toml").read_text())["figure"]}
SIZES = (32, 24, 16)


def near(got: float, name: str) -> None:
    figure = FIGURES[name]
    assert abs(got - figure["value"]) <= figure["tolerance"], (name, got)


def wave(shape: tuple[int, ...], k: int, scale: float = 1.0) -> Tensor:
    """Return fixed numbers; the release ran on the same ones."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin((1 + 0.01 * k) * count + k)).float().reshape(shape)


def fill(model: nn.Module) -> nn.Module:
    """Give the model the weights that the oracle run used; every copy of a norm gets numbers of its own."""
    for k, (name, value) in enumerate(sorted(model.state_dict().items())):
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            value.copy_(1 + wave(value.shape, k, 0.3))
        elif value.dim() > 1:
            value.copy_(wave(value.shape, k, 2 / math.sqrt(value[0].numel())))
        else:
            norm = name.endswith("weight")
            value.copy_(wave(value.shape, k, 0.2) + (1 if norm else 0))
    return model


def wrapped(net: nn.Module | None = None, sizes: tuple[int, ...] = SIZES, **options) -> DynamicResolution:
    """Return a small network under training, its norms' copies all different, the predictor in use."""
    net = net or tiny_resnet()
    router = Resized(build_predictor("small", len(sizes), 3), (16, 16))
    model = DynamicResolution(give_norms(net, sizes), router, sizes, 32, **options)
    torch.manual_seed(3)
    for norm in [m for m in model.net.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, std=0.3)
    model.fixed = None
    return model.eval()


def steer(model: DynamicResolution, index: list[int]) -> DynamicResolution:
    """Let the predictor choose ``index`` for the images of a batch, whatever they show."""

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 50.0 * F.one_hot(torch.tensor(index[: len(x)]), len(model.sizes)).float() + 0 * x.mean()

    model.router = Fixed()
    return model


def images(count: int = 6, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(7))


# -- oracles and figures ---------------------------------------------------------------------------
def test_classifier_is_the_released_one() -> None:
    net = fill(give_norms(timm.create_model("resnet50"), (224, 168, 112), shared_shortcuts=True))
    model = DynamicResolution(net, nn.Identity(), (224, 168, 112), 224).eval()
    tolerance = FIGURES["classifier_oracle"]["tolerance"]
    for j, size in enumerate(model.sizes):
        with torch.no_grad():
            got = model.at(j, wave((1, 3, size, size), 5))[0, ::10]
        expected = torch.tensor(ORACLE[f"classifier_{size}"])
        assert (got - expected).abs().max() <= tolerance * expected.abs().max(), size


def test_predictor_is_the_released_one() -> None:
    predictor = fill(build_predictor("resnet10", 3, 3)).eval()
    with torch.no_grad():
        got = predictor(wave((2, 3, 128, 128), 6)).flatten()
    expected = torch.tensor(ORACLE["predictor"])
    assert (got - expected).abs().max() <= FIGURES["predictor_oracle"]["tolerance"] * expected.abs().max()


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_costs_at_every_size_are_the_papers(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    sizes = [224, 192, 168, 112, 96] if name == "resnet50" else [224, 168, 112]
    macs = probe(model, sizes, (3, 224, 224))
    for size, got in zip(sizes, macs, strict=True):
        near(got / 1e9, f"{name}_{size}_gmacs")
    if name == "resnet50":
        near(sum(macs[i] for i in (0, 2, 3)) / 3e9, "uniform_routing_gmacs")
        near((macs[0] - macs[3]) / 1e9, "cost_span_gmacs")


def test_parameters_are_the_papers() -> None:
    with torch.device("meta"):
        net, predictor = timm.create_model("resnet50"), build_predictor("resnet10", 3, 3)
    plain, own = (sum(p.numel() for p in m.parameters()) for m in (net, predictor))
    near(own / 1e6, "predictor_mparams")
    near((plain + own) / 1e6, "total_mparams")
    give_norms(net, (224, 168, 112))
    near(sum(p.numel() for p in net.parameters()) - plain, "norm_copies_params")
    near(cost(predictor, (3, 128, 128), saved=False).macs / 1e9, "predictor_128_gmacs")
    near(cost(predictor, (3, 64, 64), saved=False).macs / 1e9, "predictor_64_gmacs")


def test_the_predictor_of_mobile_networks_is_as_small_as_published() -> None:
    with torch.device("meta"):
        predictor = build_predictor("inverted", 3, 3)
    near(sum(p.numel() for p in predictor.parameters()) / 1e6, "inverted_mparams")


# -- properties ------------------------------------------------------------------------------------
def test_one_size_is_the_plain_network() -> None:
    plain, model = tiny_resnet().eval(), DynamicResolution(give_norms(tiny_resnet(), (32,)), nn.Identity(), (32,), 32)
    assert torch.equal(model.eval()(images()), plain(images()))


def test_every_size_is_a_plain_network_with_its_norms() -> None:
    model = wrapped()
    for j, size in enumerate(SIZES):
        plain = tiny_resnet()
        state = {k.replace(f".versions.{j}.", "."): v for k, v in model.net.state_dict().items()}
        plain.load_state_dict({k: state[k] for k in plain.state_dict()})
        small = F.interpolate(images(), (size, size), mode="bilinear", align_corners=False)
        with torch.no_grad(), model.only(j):
            assert torch.equal(model(images()), plain.eval()(small))


def test_groups_give_what_single_images_give_in_the_images_order() -> None:
    model = steer(wrapped(), [2, 0, 1, 0, 2, 2])
    with torch.no_grad():
        whole = model(images())
        for i, j in enumerate([2, 0, 1, 0, 2, 2]):
            torch.testing.assert_close(whole[i : i + 1], model.at(j, images()[i : i + 1]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.deployed()(images()), whole, rtol=1e-5, atol=1e-5)


def test_norms_learn_from_the_images_that_are_routed_to_them_alone() -> None:
    model = steer(wrapped(), [2, 0, 0, 2, 2, 0]).train()
    norms = [m for m in model.net.modules() if isinstance(m, SwitchableNorm)]
    before = [[v.running_mean.clone() for v in n.versions] for n in norms]
    with model.drawing(1.0, lambda: torch.Generator().manual_seed(0)):
        model(images()).square().sum().backward()
    for norm, was in zip(norms, before, strict=True):
        moved = [not torch.equal(v.running_mean, w) for v, w in zip(norm.versions, was, strict=True)]
        assert moved == [True, False, True]
        assert [v.weight.grad is not None for v in norm.versions] == [True, False, True]


def test_the_smallest_parts_leave_the_statistics_alone() -> None:
    model = wrapped(sizes=(32, 4)).train()  # one position in the last map: a single image has no variance there
    steer(model, [1, 0, 0, 0])
    before = {k: v.clone() for k, v in model.net.state_dict().items() if "versions.1" in k}
    with model.drawing(1.0, lambda: torch.Generator().manual_seed(0)):
        out = model(images(4))
    assert out.isfinite().all()
    assert all(torch.equal(v, model.net.state_dict()[k]) for k, v in before.items())
    assert all(m.training for m in model.modules())


def test_the_gradient_reaches_the_predictor_through_the_choice() -> None:
    model = wrapped().train()
    with model.drawing(1.0, lambda: torch.Generator().manual_seed(1)):
        out = model(images())
        choice = model.take_drawn().choice
        assert set(choice.unique().tolist()) == {0.0, 1.0} and choice.sum(1).eq(1).all()
        with torch.no_grad():
            model(images())
        assert torch.equal(model.take_drawn().choice, choice)  # a second pass of the step sees the same choices
        F.cross_entropy(out, torch.arange(6)).backward()
        with pytest.raises(StateError, match="inside drawing"):
            model.take_drawn()
    assert model.router.module[-1].weight.grad.abs().sum() > 0
    scores = torch.randn(5, 3, requires_grad=True)
    (straight_through(scores) * torch.randn(5, 3)).sum().backward()
    torch.testing.assert_close(scores.grad.sum(1), torch.zeros(5), rtol=0, atol=1e-6)


def test_the_dense_form_adds_gradient_and_nothing_else() -> None:
    found = []
    for credit in ("chosen", "dense"):
        model = wrapped().train()
        model.credit = credit
        with model.drawing(1.0, lambda: torch.Generator().manual_seed(1)):
            out = model(images())
            choice = model.take_drawn().choice
            choice.retain_grad()
            F.cross_entropy(out, torch.arange(6)).backward()
        weights = {n: p.grad for n, p in model.net.named_parameters() if p.grad is not None}
        found.append((out.detach(), choice.grad, weights, dict(model.net.named_buffers())))
    (out, grad, weights, buffers), (out2, grad2, weights2, buffers2) = found
    torch.testing.assert_close(out2, out)
    assert (grad != 0).sum(1).tolist() == [1] * 6 and (grad2 != 0).all()
    torch.testing.assert_close(grad2[grad != 0], grad[grad != 0])
    for mine, theirs in ((weights2, weights), (buffers2, buffers)):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value)


def test_the_expected_credit_is_the_gradient_of_the_mean_loss_over_all_draws() -> None:
    scores, said, target = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, 4), torch.tensor([0, 3, 1, 1, 2])
    odds = scores.softmax(1)
    term = credit_term(odds, said, target)
    assert term == 0
    (found,) = torch.autograd.grad(term, scores, retain_graph=True)
    losses = torch.stack([F.cross_entropy(said[:, j], target, reduction="none") for j in range(3)], 1)
    (expected,) = torch.autograd.grad((odds * losses).sum(1).mean(), scores)
    torch.testing.assert_close(found, expected)
    soft = F.one_hot(target, 4).float()
    torch.testing.assert_close(torch.autograd.grad(credit_term(scores.softmax(1), said, soft), scores)[0], expected)


def test_the_expected_credit_compares_all_sizes_and_leaves_the_network_to_the_drawn_one() -> None:
    model = wrapped().train()
    model.credit = "expected"
    with model.drawing(1.0, lambda: torch.Generator().manual_seed(1)):
        out = model(images())
        drawn = model.take_drawn()
    index = drawn.choice.argmax(1)
    assert drawn.said is not None and drawn.said.shape == (6, 3, 10) and not drawn.said.requires_grad
    plain = wrapped().train()
    plain.load_state_dict(wrapped().state_dict())
    with plain.drawing(1.0, lambda: torch.Generator().manual_seed(1)):
        torch.testing.assert_close(out, plain(images()))
        assert torch.equal(plain.take_drawn().choice.argmax(1), index)
    for name, value in plain.net.named_buffers():
        torch.testing.assert_close(model.net.get_buffer(name), value)
    F.cross_entropy(out, torch.arange(6)).backward(retain_graph=True)
    assert all(p.grad is None for p in model.router.parameters())
    credit_term(drawn.odds, drawn.said, torch.arange(6)).backward()
    assert model.router.module[-1].weight.grad.abs().sum() > 0


def test_all_sizes_are_asked_under_the_batchs_own_statistics() -> None:
    model = wrapped().train()
    model.credit = "expected"
    with model.drawing(1.0, lambda: torch.Generator().manual_seed(1)):
        model(images())
        said = model.take_drawn().said
    with torch.no_grad():
        expected = torch.stack([wrapped().train().at(j, images()) for j in range(3)], 1)
    torch.testing.assert_close(said, expected)


def test_shifted_scores_meet_the_target() -> None:
    scores, macs = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)), [100.0, 60.0, 20.0]
    for target in (25.0, 40.0, 55.0):
        shift = budget_shift(scores, macs, target)
        spent = torch.tensor(macs)[(scores + torch.tensor(shift)).argmax(1)].mean()
        assert target - 0.2 <= spent <= target
        assert shift == pytest.approx([shift[0] * c / 100 for c in macs])
    assert budget_shift(scores, macs, 90.0) == [0.0, 0.0, 0.0]  # they cost 60 as they are


def test_a_calibrated_model_meets_its_budget_by_the_largest_score() -> None:
    method = DRNet(
        predictor="small", macs="60%", count_predictor=False, calibrate=True, credit="expected", count_batches=9
    )
    _, after, stack, rows = run(method)
    plan, last = stack.edits[0][1], stack.edits[-1][1]
    mean = sum(s * m for s, m in zip(last["shares"], plan["macs"], strict=True))
    assert mean <= plan["target"] and "drnet.credit" in rows[-1][1]
    batches = torch.cat([noise(Step("drnet.count", "work", i, 9))["image"] for i in range(9)])
    with torch.no_grad():
        taken = torch.bincount(after.router(batches).argmax(1), minlength=3) / len(batches)
    torch.testing.assert_close(taken, torch.tensor(last["shares"]))


def test_the_budget_term_is_a_hinge_between_0_and_1() -> None:
    macs, scores = [100.0, 60.0, 20.0], torch.zeros(4, 3)
    for index, target, expected in (
        ([2, 2, 2, 2], 20.0, 0.0),
        ([0, 0, 0, 0], 20.0, 1.0),
        ([0, 0, 2, 2], 60.0, 0.0),
        ([0, 0, 0, 2], 60.0, 20 / 80),
    ):
        choice = straight_through(scores + 9 * F.one_hot(torch.tensor(index), 3))
        assert float(budget_term(choice, macs, target)) == pytest.approx(expected, abs=1e-6)
    undecided = torch.tensor([[0.34, 0.33, 0.33]] * 4, requires_grad=True)  # on average cheap, in fact all dear
    term = budget_term(straight_through(undecided), macs, 60.0)
    term.backward()
    assert term.item() == pytest.approx(0.5) and undecided.grad[:, 0].gt(0).all() and undecided.grad[:, 2].lt(0).all()


def test_temperature_falls_by_equal_factors() -> None:
    assert [temperature(2.0, None, i, 5) for i in (0, 4)] == [2.0, 2.0]
    falling = [temperature(4.0, 0.25, i, 5) for i in range(5)]
    assert falling == pytest.approx([4.0, 2.0, 1.0, 0.5, 0.25])


def test_published_sizes() -> None:
    assert default_sizes(224) == [224, 168, 112] and default_sizes(32) == [32, 24, 16]
    assert [predictor_side(224, s) for s in (128 / 224, 64 / 224)] == [128, 64] and predictor_side(32, 0.5) == 16


def test_the_predictor_starts_from_the_runs_seed() -> None:
    first, second = (build_predictor("inverted", 3, 3) for _ in range(2))
    for predictor, seed in ((first, 0), (second, 0)):
        reset(predictor, Step("a", "b", 0, 1, seed).generator("drnet.predictor"))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    conv = first[0].weight.detach()
    assert conv.std().item() == pytest.approx((2 / (9 * 16)) ** 0.5, rel=0.1)


# -- the method ------------------------------------------------------------------------------------
def run(method: DRNet, net: nn.Module | None = None, steps: int = 3) -> tuple[nn.Module, nn.Module, Stack, list]:
    """Train by hand; returns the model before and after finish, the stack and the logged terms."""
    stack = Stack([method])
    model, rows = stack.prepare(net or tiny_resnet()), []
    for phase in stack.phases(Plan((Phase("fit", steps),))):
        model = stack.enter(model, phase)
        for i in range(phase.steps):
            if phase.work is not None:
                phase.work(model, {"train": noise}, Step(phase.name, "work", i, phase.steps))
                continue
            groups = stack.groups(model)
            params = [p for g in phase.turns[0].trains for p in groups[g]]
            grads, step = stack.grads(Classification().loss, phase.turns[0]), Step(phase.name, "main", i, phase.steps)
            rows.append((phase.name, grads(model.train(), noise(step, 8), step, params)))
            torch.optim.SGD(params, 0.01).step()
            model.zero_grad()
        model = stack.leave(model, phase)
    return model, stack.finish(model).eval(), stack, rows


def test_first_all_sizes_then_the_predictors_choice() -> None:
    before, after, stack, rows = run(DRNet(predictor="small", macs="60%", count_predictor=False, count_batches=3))
    assert [name for name, _ in rows] == ["drnet.multires"] * 2 + ["fit"] * 3  # 0.7 of three steps
    assert float(rows[0][1]["task"]) > 2 * float(rows[-1][1]["task"])  # a sum over three sizes
    assert "drnet.budget" in rows[-1][1] and "drnet.budget" not in rows[0][1]
    shares = stack.edits[-1][1]["shares"]
    assert sum(shares) == pytest.approx(1) and after.shares == tuple(shares)
    found = cost(after, saved=False)
    per_size = {b.name: b.macs for b in found.branches}
    router = stack.edits[0][1]["predictor_macs"]
    mean = sum(s * m for s, m in zip(shares, per_size.values(), strict=True)) + router
    assert found.macs == pytest.approx(mean, rel=1e-3)
    assert list(per_size.values()) == stack.edits[0][1]["macs"]
    described = stack.describe(after)["DRNet"]
    assert described["facts"]["mean MACs of an image"] == pytest.approx(mean, rel=1e-3)
    # weights of all sizes are the same tensors; each size has its own norms
    first, last = (dict(after.branches[j].named_parameters()) for j in (0, 2))
    assert first["conv.weight"] is last["module.conv.weight"]
    assert first["bn.weight"] is not last["module.bn.weight"]
    assert cost(after, saved=False).params == sum(p.numel() for p in before.parameters())


def test_inference_takes_the_largest_score_and_draws_nothing() -> None:
    _, after, _, _ = run(DRNet(predictor="small", multires_steps=1, count_batches=1), steps=1)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        assert torch.equal(after(images()), after(images()))
    assert torch.equal(state, torch.random.get_rng_state())


def test_ablations_and_options() -> None:
    before, _, stack, _ = run(DRNet(predictor="small", resolution_norm=False, count_batches=1), steps=1)
    assert not any(isinstance(m, SwitchableNorm) for m in before.modules())
    net = load_model("resnet18", num_classes=10)
    shared = give_norms(net, (64, 32), shared_shortcuts=True)
    assert isinstance(shared.layer2[0].downsample[1], nn.BatchNorm2d) and isinstance(shared.bn1, SwitchableNorm)
    assert isinstance(give_norms(load_model("resnet18"), (64, 32)).layer2[0].downsample[1], SwitchableNorm)
    plan = Stack([DRNet(predictor_lr=0.01, joint_lr=0.02, multires_steps=5, predictor_decay=0.3)]).phases(
        Plan((Phase("fit", 10),))
    )
    assert [(p.name, p.steps) for p in plan] == [
        ("drnet.multires", 5), ("drnet.predictor", 1), ("fit", 10), ("drnet.count", 8),
    ]  # fmt: skip
    fit = plan[2]
    assert (
        fit.lr == {"predictor": 0.01, "weights": 0.02}
        and fit.optimizer == {"predictor": {"weight_decay": 0.3}}
        and fit.fresh
    )
    assert fit.turns[0].trains == ("weights", "predictor") and plan[0].turns[0].trains == ("weights",)


def test_the_states_to_evaluate_are_the_sizes() -> None:
    model, method = wrapped(), DRNet()
    found = method.variants(model)
    assert list(found) == ["drnet.32", "drnet.24", "drnet.16"]
    with found["drnet.16"], torch.no_grad():
        assert torch.equal(model(images()), model.at(2, images()))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "mobilenetv2_cifar", "preact_resnet20"])
def test_networks(name: str) -> None:
    side = 32 if "cifar" in name or "preact" in name else 64
    model = load_model(name, num_classes=5)
    if side == 64:
        model.gossamer_source = None
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    method = DRNet(predictor="small", count_batches=1)
    edit = method._decide(model)
    assert edit["sizes"] == default_sizes(side) and edit["macs"] == sorted(edit["macs"], reverse=True)
    routed = method.apply(method.apply(model, edit), {"do": "route"})
    with torch.no_grad():
        assert routed.eval()(torch.randn(3, 3, side, side)).shape == (3, 5)


# -- bad input -------------------------------------------------------------------------------------
class Summed(nn.Module):
    """A network with a bridge over its stride, which odd maps do not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 32, 32)}
        self.down = nn.Conv2d(3, 8, 3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.side = nn.Conv2d(3, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (F.interpolate(self.norm(self.down(x)), scale_factor=8) + self.side(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sizes": [32, 24, 2]}, "divides its input by 4, so an image of 2 pixels leaves no position"),
        ({"sizes": [16, 24]}, "largest first"),
        ({"sizes": [64, 32]}, "own input is 32 pixels"),
        ({"sizes": [16]}, "two or more to choose from"),
        ({"sizes": []}, "largest first"),
        ({"macs": "10%"}, "reach .* M to .* M"),
        ({"macs": "much"}, "is no budget"),
        ({"tau": 0.0}, "tau=0.0; expected a number above 0"),
        ({"eta": -1.0}, "eta=-1.0; expected 0 or more"),
        ({"credit": "all"}, "credit='all'; expected one of chosen, dense, expected"),
        ({"calibrate": True}, "calibrate=True without macs"),
        ({"predictor": "resnet1O"}, "allowed are resnet10, inverted, small and timm models; did you mean 'resnet10'"),
    ],
)
def test_bad_options(options: dict, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        DRNet(**{"predictor": "small", **options}).prepare(tiny_resnet())


def test_networks_that_cannot_take_a_size_are_refused() -> None:
    assert DRNet(sizes=[32, 16], predictor="small").prepare(Summed()) is None
    with pytest.raises(RecipeError, match="does not run at 20 pixels: .* take multiples of 8"):
        DRNet(sizes=[32, 20], predictor="small").prepare(Summed())
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16 * 16, 2))
    fixed.pretrained_cfg = {"input_size": (3, 32, 32)}  # type: ignore[assignment]
    with pytest.raises(RecipeError, match="must end in a global pooling"):
        DRNet(predictor="small").prepare(fixed)
    with pytest.raises(ModelError, match="no batch norm .* or resolution_norm=False"):
        DRNet(predictor="small").prepare(load_model("convnext_atto", num_classes=2))


def test_misuse_is_refused() -> None:
    with pytest.raises(PlanError, match="when structure change it needs 'per_branch_structure'"):
        Stack([DRNet(), find("magnitude_pruning")()])
    method = DRNet(predictor="small")
    with pytest.raises(PlanError, match="expected 'fit'"):
        method.phases(Plan())
    with pytest.raises(StateError, match="no shares were counted"):
        method.finish(tiny_resnet())
