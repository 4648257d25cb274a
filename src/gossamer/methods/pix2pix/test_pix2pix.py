"""pix2pix: what the judge sees, what moves when, and the pixel error it starts from."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from gossamer.core.errors import GossamerError, ModelError
from gossamer.core.schedule import Phase, Plan, Step, Turn
from gossamer.core.stack import Stack
from gossamer.kits.example import picture_pairs, tiny_generator
from gossamer.methods.pix2pix import Pix2Pix
from gossamer.models.discriminators import PatchDiscriminator
from gossamer.models.source import create
from gossamer.tasks.image_translation import ImageTranslation

HERE = Path(__file__).parent
FIGURES = {f["name"]: f for f in tomllib.loads((HERE / "figures.toml").read_text())["figure"]}
STEP = Step("fit", "main", 0, 2)


def ready(**options) -> tuple[Stack, Pix2Pix, nn.Module]:
    method = Pix2Pix(**{"ndf": 4, "layers": 1, **options})
    stack = Stack([method])
    return stack, method, stack.prepare(tiny_generator())


def test_the_published_patch_is_70_pixels() -> None:
    judge = PatchDiscriminator(1, 2).eval().requires_grad_(False)
    for m in judge.modules():
        if isinstance(m, nn.InstanceNorm2d):
            m.forward = lambda x: x  # norms see the whole picture; the patch is what convolutions see
    picture = torch.zeros(1, 1, 256, 256, requires_grad=True)
    scores = judge(picture)
    scores[0, 0, 15, 15].backward()
    rows = picture.grad[0, 0].abs().sum(1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == FIGURES["patch_pixels"]["value"]


def test_the_published_generator() -> None:
    with torch.device("meta"):
        model = create("unet_256", {"norm": "batch"}, None)
    assert sum(p.numel() for p in model.parameters()) == FIGURES["unet_256_params"]["value"]


def test_the_judge_moves_first_and_each_move_leaves_the_other_alone() -> None:
    stack, method, model = ready()
    (phase,) = stack.phases(Plan([Phase("fit", 2)]))
    assert [(t.name, t.trains) for t in phase.turns] == [("judge", ("judge",)), ("main", ("weights",))]
    assert dict(phase.optimizer["judge"]) == {"opt": "adam", "betas": (0.5, 0.999), "weight_decay": 0.0}
    batch = picture_pairs(STEP)
    task = ImageTranslation(paired=True)
    stack.grads(task.loss, phase.turns[0])(model, batch, STEP, [])
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in method.game.judges())
    for p in method.game.judges():
        p.grad = None
    logs = stack.grads(task.loss, phase.turns[1])(model, batch, STEP, [])
    assert all(p.grad is None for p in method.game.judges()) and set(logs) == {"task", "gan"}
    assert all(float(p.grad.abs().sum()) > 0 for n, p in model.named_parameters() if n.endswith("weight"))


def test_pixel_error_and_adversarial_term_are_the_formulas() -> None:
    stack, method, model = ready(gan="lsgan", lambda_recon=7.0, lambda_gan=3.0)
    batch = picture_pairs(STEP)
    out = model(batch["image"])
    terms = method.loss(model, batch, out, STEP)
    scores = method.game.judge(torch.cat([batch["image"], out], 1))
    assert torch.allclose(terms["task"], 7 * (out - batch["target"]).abs().mean())
    assert torch.allclose(terms["gan"], 3 * (scores - 1).square().mean())
    assert method.loss(model, batch, out, Step("pretrain", "main", 0, 2)) == {}


def test_without_judge_it_is_regression_on_the_recipes_own_turns() -> None:
    stack, _, _ = ready(lambda_gan=0.0)
    assert stack.phases(Plan([Phase("fit", 2)]))[0].turns == (Turn(),)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"gan": "hing"}, "did you mean 'hinge'"), ({"layers": 9}, "layers 0 to 6"), ({"channels": [3]}, "channels in")],
)
def test_bad_options_are_refused(options, says) -> None:
    with pytest.raises(GossamerError, match=says):
        ready(**options)


def test_a_strange_model_needs_its_channels() -> None:
    with pytest.raises(ModelError, match=r"channels=\[in, out\]"):
        Stack([Pix2Pix()]).prepare(nn.Conv2d(3, 3, 1))
    Stack([Pix2Pix(channels=(3, 3))]).prepare(nn.Conv2d(3, 3, 1))
