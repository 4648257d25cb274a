"""DCD against figures of the release, and what must hold of it."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError, ModelError, PlanError, RecipeError
from gossamer.core.schedule import Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.cost.ledger import cost
from gossamer.kits.example import picture_pairs, tiny_generator
from gossamer.methods.dcd import DCD, maths
from gossamer.models.build import load_model
from gossamer.models.discriminators import PatchDiscriminator
from gossamer.models.source import create
from gossamer.ops.adversarial import fooling_loss, gram, judging_loss
from gossamer.tasks.image_translation import ImageTranslation

HERE = Path(__file__).parent
ORACLE = json.loads((HERE / "oracle.json").read_text())
FIGURES = {f["name"]: f for f in tomllib.loads((HERE / "figures.toml").read_text())["figure"]}
STEP, FIT = Step("fit", "main", 0, 4), Phase("fit", 4)
PLAIN = {"lambda_style": 0.0, "lambda_feature": 0.0, "layers": 1, "ndf": 4}


# -- oracles ---------------------------------------------------------------------------------------
def seeded(net: nn.Module, seed: int) -> nn.Module:
    """Draw a network's state in the order of its names, as the oracle did."""
    draw, state = torch.Generator().manual_seed(seed), net.state_dict()
    for name in sorted(state):
        if state[name].is_floating_point():
            value = torch.randn(state[name].shape, generator=draw, dtype=torch.float64) * 0.2
            state[name] = value.abs() + 0.5 if name.endswith("running_var") else value
    net.double().load_state_dict(state)
    return net


def pictures(shape: tuple[int, ...], seed: int) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def entries(out: Tensor) -> list[float]:
    flat = out.detach().flatten()
    return [float(flat.mean()), float(flat.std()), *(float(flat[i * len(flat) // 7]) for i in range(7))]


def agrees(name: str, got: list[float], figure: str = "networks_oracle") -> bool:
    return got == pytest.approx(ORACLE[name], abs=FIGURES[figure]["tolerance"], rel=FIGURES[figure]["tolerance"])


def test_generators_are_the_releases() -> None:
    x = pictures((2, 3, 32, 32), 1)
    assert agrees("mobile_resnet_9", entries(seeded(load_model("mobile_resnet_9blocks", width=4), 2).train()(x)))
    assert agrees("resnet_9", entries(seeded(load_model("resnet_9blocks", width=4), 3).train()(x)))
    batch = load_model("resnet_9blocks", width=4, norm="batch")
    assert agrees("resnet_9_batch", entries(seeded(batch, 4).eval()(x)))
    unet = load_model("unet_128", width=2, norm="batch")
    assert agrees("unet_128", entries(seeded(unet, 5).eval()(pictures((1, 3, 128, 128), 6))))


def test_discriminators_are_the_releases() -> None:
    x = pictures((2, 3, 32, 32), 1)
    assert agrees("patch", entries(seeded(PatchDiscriminator(6, 4, 3), 7)(pictures((2, 6, 48, 48), 8))))
    assert agrees("patch_1", entries(seeded(PatchDiscriminator(3, 4, 1, "batch"), 9).eval()(x)))
    assert agrees("pixel", entries(seeded(PatchDiscriminator(3, 4, 0), 10)(x)))


@pytest.mark.parametrize("kind", ["lsgan", "vanilla", "hinge"])
def test_adversarial_losses_are_the_releases(kind: str) -> None:
    s = pictures((2, 1, 5, 5), 11) * 3
    found = [judging_loss(s, real=True, kind=kind), judging_loss(s, real=False, kind=kind), fooling_loss(s, kind)]
    assert agrees(f"gan_{kind}", [float(f) for f in found])


def test_gram_is_the_releases() -> None:
    assert agrees("gram", entries(gram(pictures((2, 5, 6, 7), 60))))


def test_feature_loss_is_the_releases() -> None:
    wide, narrow = 8, 4
    teacher = seeded(load_model("mobile_resnet_9blocks", width=wide), 20).train()
    student = seeded(load_model("mobile_resnet_9blocks", width=narrow, img_size=128), 21).train()
    method = DCD(teacher, paired=False, ndf=4, lambda_style=0.0, lambda_feature=0.0, lambda_gan=0.0, schedule="joint")
    stack = Stack([method])
    model = stack.prepare(student)
    (phase,) = stack.phases(Plan([FIT]))
    for i in range(4):
        seeded(method.extra["teacher_connectors"][i], 30 + i)
        seeded(method.extra["connectors"][i], 40 + i)
    seeded(method.game.judge, 22)
    model = stack.enter(model, phase)
    batch = {"image": pictures((2, 3, 128, 128), 50), "target": pictures((2, 3, 128, 128), 51), "id": ["a", "b"]}
    terms = method.loss(model, batch, model.train()(batch["image"]), STEP)
    assert set(terms) == {"dcd"}
    assert agrees("dcd", [float(terms["dcd"].detach())], "dcd_oracle")


@pytest.mark.parametrize(("who", "width"), [("teacher", 64), ("student", 16)])
def test_published_sizes(who: str, width: int) -> None:
    with torch.device("meta"):
        found = cost(create("mobile_resnet_9blocks", {"width": width}, None).eval(), saved=False)
    assert found.params == FIGURES[f"{who}_params"]["value"]
    for name, value in ((f"{who}_gmacs", found.macs), (f"{who}_gmacs_literature", found.theoretical_macs)):
        assert value / 1e9 == pytest.approx(FIGURES[name]["value"], abs=FIGURES[name]["tolerance"])


@pytest.mark.parametrize(
    ("name", "channels", "width"), [("discriminator_params", 3, 64), ("conditional_discriminator_params", 6, 128)]
)
def test_published_discriminators(name: str, channels: int, width: int) -> None:
    with torch.device("meta"):
        judge = PatchDiscriminator(channels, width)
        assert judge.features(torch.zeros(1, channels, 64, 64)).shape == (1, 8 * width, 7, 7)
        assert judge(torch.zeros(1, channels, 256, 256)).shape == (1, 1, 30, 30)
    assert sum(p.numel() for p in judge.parameters()) == FIGURES[name]["value"]


# -- properties ------------------------------------------------------------------------------------
def ready(model: nn.Module | None = None, **options) -> tuple[DCD, Stack, nn.Module, Phase]:
    method = DCD(**{**PLAIN, "schedule": "joint", **options})
    stack = Stack([method])
    model = stack.prepare(tiny_generator() if model is None else model)
    phase = stack.phases(Plan([FIT]))[-1]
    return method, stack, stack.enter(model, phase).train(), phase


def terms_of(method: DCD, model: nn.Module, batch=None) -> dict[str, Tensor]:
    batch = picture_pairs(STEP) if batch is None else batch
    return method.loss(model, batch, model(batch["image"]), STEP)


def values(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(term.detach()) for name, term in terms.items()}


def state(*nets: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for n in nets for t in n.state_dict().values()]


def test_every_tap_counts_from_the_first_step() -> None:
    method, _, model, _ = ready(teacher_width=8)
    seen: list[float] = []
    whole = values(terms_of(method, model))["dcd"]
    for n in range(4):
        one, _, same, _ = ready(teacher_width=8, taps=[n])
        one.extra["connectors"][0].load_state_dict(method.extra["connectors"][n].state_dict())
        one.extra["teacher_connectors"][0].load_state_dict(method.extra["teacher_connectors"][n].state_dict())
        one.extra["teacher"].load_state_dict(method.extra["teacher"].state_dict())
        one.game.judge.load_state_dict(method.game.judge.state_dict())
        seen.append(values(terms_of(one, same))["dcd"])
    assert all(v > 0 for v in seen) and whole == pytest.approx(sum(seen), rel=1e-5)


def test_no_loss_at_equality() -> None:
    method, _, model, _ = ready(perceptual=_Levels(), perceptual_paths=["a", "b"], lambda_style=1.0, lambda_feature=1.0)
    method.extra["teacher"].load_state_dict(model.state_dict())
    for ours, theirs in zip(method.extra["connectors"], method.extra["teacher_connectors"], strict=True):
        ours.load_state_dict(theirs.state_dict())
        ours.eval()
    terms = terms_of(method, model)
    assert all(float(terms[k].detach()) == 0 for k in ("dcd", "style", "feature")) and terms["gan"].grad_fn is not None


def test_a_student_move_leaves_everybody_else_alone() -> None:
    method, stack, model, phase = ready(teacher_width=8, perceptual=_Levels(), perceptual_paths=["a"], lambda_style=1.0)
    others = (method.extra["teacher"], method.extra["teacher_connectors"], method._perceptual())
    before = state(*others, method.game.judge)
    stack.grads(ImageTranslation(paired=True).loss, phase.turns[-1])(model, picture_pairs(STEP), STEP, [])
    for net in (*others, method.game.judge):
        assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, state(*others, method.game.judge), strict=True))
    assert all(p.grad is not None for p in method.extra["connectors"].parameters())


def test_a_judges_move_leaves_generators_alone() -> None:
    method, stack, model, phase = ready(teacher_width=8)
    assert [t.name for t in phase.turns] == ["judge", "teacher", "main"]
    before = state(model, method.extra["teacher"])
    stack.grads(ImageTranslation(paired=True).loss, phase.turns[0])(model, picture_pairs(STEP), STEP, [])
    assert all(p.grad is None for m in (model, method.extra["teacher"]) for p in m.parameters())
    assert all(p.grad is not None for p in method.game.judges())
    assert all(torch.equal(a, b) for a, b in zip(before, state(model, method.extra["teacher"]), strict=True))


def test_batch_norms_keep_the_statistics_of_their_own_moves() -> None:
    narrow = load_model("mobile_resnet_3blocks", width=4, img_size=32, norm="batch")
    method, stack, model, phase = ready(narrow, teacher_width=8, norm="batch")
    task, batch = ImageTranslation(paired=True), picture_pairs(STEP)
    teacher, judge = method.extra["teacher"], method.game.judge
    for turn, still in (("main", (teacher, judge)), ("judge", (model, teacher)), ("teacher", (model, judge))):
        before, all_nets = state(*still), state(model, teacher, judge)
        stack.grads(task.loss, next(t for t in phase.turns if t.name == turn))(model, batch, STEP, [])
        assert all(torch.equal(a, b) for a, b in zip(before, state(*still), strict=True)), turn
        assert not all(torch.equal(a, b) for a, b in zip(all_nets, state(model, teacher, judge), strict=True)), turn


def test_features_teach_what_comes_before_the_last_tap_and_nothing_after() -> None:
    method, _, model, _ = ready(teacher_width=8)
    terms_of(method, model)["dcd"].backward()
    last = int(model.taps[-1].rpartition(".")[2])
    for name, p in model.named_parameters():
        place = int(name.split(".")[1])
        touched = p.grad is not None and bool(p.grad.abs().sum() > 0)
        if place > last:
            assert not touched, name
        elif name.endswith("weight"):
            assert touched, name


def test_the_adversarial_term_is_of_the_students_own_pictures() -> None:
    method, _, model, _ = ready(teacher_width=8)
    terms_of(method, model)["gan"].backward()
    assert all(float(p.grad.abs().sum()) > 0 for n, p in model.named_parameters() if n.endswith("weight"))


def test_a_phase_that_was_not_entered_sees_the_same() -> None:
    method, stack, model, phase = ready(teacher_width=8)
    entered = values(terms_of(method, model))
    assert method.loss(model, picture_pairs(STEP), None, Step("pretrain", "main", 0, 4)) == {}
    stack.leave(model, phase)
    assert values(terms_of(method, model)) == pytest.approx(entered)


def test_order_in_a_batch_does_not_matter() -> None:
    method, _, model, _ = ready(teacher_width=8, connector="conv")
    batch = picture_pairs(STEP, 3)
    turned = {**batch, "image": batch["image"].flip(0), "target": batch["target"].flip(0)}
    a, b = (values(terms_of(method, model, x))["dcd"] for x in (batch, turned))
    assert a == pytest.approx(b, rel=1e-5)


def test_an_identity_view_is_pixel_distillation() -> None:
    draw = torch.Generator().manual_seed(3)
    ours, theirs = ([torch.randn(2, 3, 4, 4, generator=draw) for _ in range(3)] for _ in range(2))
    want = sum((a - b).abs().mean() for a, b in zip(ours, theirs, strict=True))
    assert torch.allclose(maths.cooperation_loss(ours, theirs, lambda x: x), want)
    assert float(maths.adapted_loss(ours, ours)) == 0


@pytest.mark.parametrize("features", ["images", "raw", "none"])
def test_baselines(features: str) -> None:
    method, stack, model, phase = ready(teacher_width=8, features=features)
    terms = terms_of(method, model)
    assert ("dcd" in terms) == (features != "none")
    assert ("connectors" in phase.turns[-1].trains) == (features != "none") == ("connectors" in stack.groups(model))
    if features == "raw":
        assert method.extra["connectors"][0][0].weight.shape[:2] == (32, 16)


def test_trained_teacher_connectors_learn_too() -> None:
    method, stack, model, phase = ready(teacher_width=8, train_teacher_connectors=True)
    terms_of(method, model)["dcd"].backward()
    theirs = list(method.extra["teacher_connectors"].parameters())
    assert all(p.grad is not None for p in theirs) and all(p.grad is None for p in method.extra["teacher"].parameters())
    assert {id(p) for p in theirs} <= {id(p) for p in stack.groups(model)["connectors"]}


def test_the_discriminator_is_looked_at_where_asked() -> None:
    found = []
    for tap in (0, -1):
        method, _, model, _ = ready(teacher_width=8, judge_tap=tap)
        found.append(values(terms_of(method, model))["dcd"])
    assert found[0] != found[1]
    with pytest.raises(ModelError, match=r"activation 7; it has 2, allowed are -2\.\.1"):
        method, _, model, _ = ready(teacher_width=8, judge_tap=7)
        terms_of(method, model)


@pytest.mark.parametrize(("fakes", "players"), [("teacher", 1), ("student", 1), ("both", 2)])
def test_whose_pictures_the_discriminator_refuses(fakes: str, players: int) -> None:
    method, stack, model, phase = ready(teacher_width=8, d_fakes=fakes, paired=False, pool=4)
    batch, task = picture_pairs(STEP), ImageTranslation(paired=False)
    assert [t.name for t in phase.turns] == ["teacher", "judge", "main"]
    stack.grads(task.loss, phase.turns[1])(model, batch, STEP, [])
    with torch.no_grad():
        made = {"teacher": method.extra["teacher"](batch["image"]), "student": model(batch["image"])}
    pools = [p.pictures for p in method.game.pools]
    expected = [made[n] for n in ("teacher", "student") if fakes in (n, "both")]
    assert len(pools) == players and all(torch.equal(a, b) for a, b in zip(pools, expected, strict=True))


def test_narrowing_is_physical_and_the_teacher_is_what_the_model_was() -> None:
    dense = tiny_generator()
    was = copy.deepcopy(dense)
    method, _, model, _ = ready(dense, width=2)
    assert model is dense and model.width == 2
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in was.parameters()) / 2
    teacher = method.extra["teacher"]
    assert all(torch.equal(a, b) for a, b in zip(state(was), state(teacher), strict=True))
    assert all(p.requires_grad for p in teacher.parameters())


def test_progressive_schedule() -> None:
    method = DCD(**PLAIN, paired=False, cycles=4, student_ratio=2.0, select=_Levels(), pool=2)
    stack = Stack([method])
    stack.prepare(tiny_generator())
    plan = stack.phases(Plan([Phase("fit", 10, schedule="linear", hold=0.5)]))
    assert [p.name for p in plan[:4]] == ["dcd.teacher.0", "dcd.select.0", "dcd.student.0", "dcd.teacher.1"]
    teacher, student = ([p for p in plan if f".{w}." in p.name] for w in ("teacher", "student"))
    assert sum(p.steps for p in teacher) == 10 and sum(p.steps for p in student) == 20
    assert [p.window.offset for p in student] == [0, 5, 10, 15] and student[-1].ends_window and teacher[-1].ends_window
    assert all(t.trains == ("weights", "connectors") for p in student for t in p.turns)
    assert {t.name for p in teacher for t in p.turns} == {"teacher", "judge"}
    with pytest.raises(PlanError, match="in 2 parts already"):
        stack.phases(Plan([FIT.part("fit.a", 0, 2), FIT.part("fit.b", 2, 2)]))


def test_the_best_teacher_teaches() -> None:
    method = DCD(**PLAIN, schedule="progressive", cycles=1, select=_Levels(), select_images=4)
    stack = Stack([method])
    model = stack.prepare(tiny_generator())
    stack.phases(Plan([FIT]))
    loaders, step, own = {"search": picture_pairs}, Step("dcd.select.0", "work", 0, 1), method.extra
    first = method._select(model, loaders, step)
    kept = state(own["best"].teacher)
    with torch.no_grad():
        for p in own["teacher"].parameters():
            p.mul_(-3.0)
    second = method._select(model, loaders, step)
    better = second["teacher_score"] < first["teacher_score"]
    assert second["best_score"] == min(first["teacher_score"], second["teacher_score"])
    same = all(torch.equal(a, b) for a, b in zip(kept, state(own["best"].teacher), strict=True))
    assert same != better
    again = DCD(**PLAIN, schedule="progressive", cycles=1, select=_Levels(), select_images=4)
    other = Stack([again])
    other.prepare(tiny_generator())
    other.phases(Plan([FIT]))
    other.load_state_dict(stack.state_dict())
    assert float(again.extra["best"].score) == second["best_score"]


def test_offline_ablation_moves_the_student_only(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trained = PatchDiscriminator(6, 4, 1)
    save_file(trained.state_dict(), tmp_path / "judge.safetensors")
    method, _, _, phase = ready(online=False, judge_weights=str(tmp_path / "judge.safetensors"))
    assert [t.name for t in phase.turns] == ["main"]
    assert all(torch.equal(a, b) for a, b in zip(state(trained), state(method.game.judge), strict=True))


# -- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"features": "dcds"}, "did you mean 'dcd'"),
        ({"width": 4}, r"allowed are 1\.\.3"),
        ({"taps": [9]}, "expected numbers that both have"),
        ({"taps": []}, "taps is empty"),
        ({"taps": [0, ("model.1", "model.1")]}, "expected numbers of features, or pairs of module paths"),
        ({"taps": [["model.1"]]}, "expected numbers of features, or pairs of module paths"),
        ({"taps": "model.1"}, "expected numbers of features, or pairs of module paths"),
        ({"layers": 3}, "needs 24; set layers lower"),
        ({"lambda_gan": -1.0}, "expected 0 or more"),
        ({"lambda_style": 1.0}, "vgg16@vgg16.safetensors"),
        ({"taps": [("model.1", "model.nowhere")]}, "no module 'model.nowhere'"),
        ({"taps": [("model.1", "model.4")]}, "expected equal sizes"),
        ({"student_ratio": 0.0}, "more than 0"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options, says) -> None:
    with pytest.raises(GossamerError, match=says):
        ready(**options)


def test_a_generator_of_ones_own() -> None:
    def own(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1))

    with pytest.raises(ModelError, match="Pass the narrow model itself"):
        ready(own(8), channels=(3, 3), width=2)
    own_size = own(2)
    own_size.pretrained_cfg = {"input_size": (3, 32, 32)}
    wide = own(8)
    wide.pretrained_cfg = {"input_size": (3, 32, 32)}
    method, _, model, _ = ready(own_size, channels=(3, 3), teacher=wide, taps=[("1", "1")])
    assert values(terms_of(method, model))["dcd"] > 0


def test_finishing_without_training_is_an_error() -> None:
    stack = Stack([DCD(**PLAIN, width=2)])
    with pytest.raises(PlanError, match="has not learned yet"):
        stack.finish(stack.prepare(tiny_generator()))


def test_a_second_adversary_is_refused() -> None:
    with pytest.raises(PlanError, match="both change the model's adversary"):
        Stack([DCD(), DCD()])


@pytest.mark.parametrize("paired", [True, False])
def test_no_objective_is_refused(paired: bool) -> None:
    for nothing in ({"features": "none"}, {"lambda_dcd": 0.0}):
        with pytest.raises(RecipeError, match="nothing for the student to learn from"):
            ready(lambda_gan=0.0, paired=paired, pool=2, **nothing)


def test_the_selecting_network_is_looked_for_before_the_training() -> None:
    with pytest.raises(RecipeError, match="extractor='inception'"):
        ready(schedule="progressive", cycles=1, select="inception")


class _Levels(nn.Module):
    """A feature network of two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.AvgPool2d(2), nn.AvgPool2d(4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).flatten(1)[:, ::6]
