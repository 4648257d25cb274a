"""CycleGAN: its terms against the formulas, what moves when, and the pool."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from gossamer.core.errors import GossamerError, ModelError
from gossamer.core.schedule import Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.kits.example import picture_pairs, tiny_generator
from gossamer.methods.cyclegan import CycleGAN
from gossamer.models.build import load_model
from gossamer.models.source import create
from gossamer.tasks.image_translation import ImageTranslation

HERE = Path(__file__).parent
FIGURES = {f["name"]: f for f in tomllib.loads((HERE / "figures.toml").read_text())["figure"]}
STEP = Step("fit", "main", 0, 4)


def ready(**options) -> tuple[Stack, CycleGAN, nn.Module]:
    method = CycleGAN(**{"ndf": 4, "layers": 1, "pool": 3, **options})
    stack = Stack([method])
    return stack, method, stack.prepare(tiny_generator())


def test_the_published_generator() -> None:
    with torch.device("meta"):
        model = create("resnet_9blocks", {}, None)
    assert sum(p.numel() for p in model.parameters()) == FIGURES["resnet_9blocks_params"]["value"]


def test_terms_are_the_formulas() -> None:
    stack, method, model = ready(lambda_cycle=(10.0, 6.0), lambda_identity=0.5)
    game, batch = method.game, picture_pairs(STEP)
    a, b, back = batch["image"], batch["target"], method.game.partner
    out = model(a)
    terms = method.loss(model, batch, out, STEP)
    l1 = nn.functional.l1_loss
    want = {
        "gan": (game.judge(out) - 1).square().mean(),
        "gan_back": (game.partner_judge(back(b)) - 1).square().mean(),
        "cycle": 10 * l1(back(out), a),
        "cycle_back": 6 * l1(model(back(b)), b),
        "identity": 3 * l1(model(b), b),
        "identity_back": 5 * l1(back(a), a),
    }
    assert terms.keys() == want.keys()
    for name, value in want.items():
        assert torch.allclose(terms[name], value, rtol=1e-5), name
    half = ((game.judge(b) - 1).square().mean() + game.judge(out).square().mean()) / 2
    assert torch.allclose(game.judge_terms([out], batch, STEP)["judge"], half)


def test_generators_move_together_then_the_judges_see_what_was_made_before() -> None:
    stack, method, model = ready()
    (phase,) = stack.phases(Plan([Phase("fit", 4)]))
    assert [(t.name, t.trains) for t in phase.turns] == [("main", ("weights", "partner")), ("judge", ("judge",))]
    groups, batch, task = stack.groups(model), picture_pairs(STEP), ImageTranslation(paired=False)
    assert all(p.requires_grad for p in groups["partner"])
    stack.grads(task.loss, phase.turns[0])(model, batch, STEP, [])
    assert all(p.grad is None for p in method.game.judges())
    made = model(batch["image"]).detach()
    with torch.no_grad():
        for p in (*model.parameters(), *groups["partner"]):
            p.grad = None
            p.add_(0.1)  # the generators' update
    stack.grads(task.loss, phase.turns[1])(model, batch, STEP, [])
    assert torch.equal(method.game.pools[0].pictures, made) and all(p.grad is None for p in model.parameters())
    again = method.game.noted("second", batch, Step("fit", "judge", 1, 4))
    assert again is None, "pictures of another step count for nothing"


def test_other_channels_need_the_identity_off() -> None:
    grey = load_model("mobile_resnet_3blocks", width=2, in_chans=1, img_size=32)
    with pytest.raises(ModelError, match="lambda_identity=0"):
        Stack([CycleGAN(ndf=4, layers=1)]).prepare(grey)
    method = CycleGAN(ndf=4, layers=1, lambda_identity=0.0)
    Stack([method]).prepare(grey)
    assert method.game.partner(torch.zeros(1, 3, 32, 32)).shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    ("options", "says"), [({"gan": "wgan"}, "allowed are lsgan"), ({"pool": -1}, "0 .off. or more")]
)
def test_bad_options_are_refused(options, says) -> None:
    with pytest.raises(GossamerError, match=says):
        ready(**options)


def test_a_strange_model_needs_a_partner() -> None:
    strange = nn.Conv2d(3, 3, 1)
    with pytest.raises(ModelError, match="option partner"):
        Stack([CycleGAN(channels=(3, 3))]).prepare(strange)
    Stack([CycleGAN(channels=(3, 3), partner=nn.Conv2d(3, 3, 1))]).prepare(strange)
