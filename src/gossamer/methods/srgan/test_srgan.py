"""SRGAN: its terms, its two players, in one stack with quantization, refusals."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.core.errors import ModelError, PlanError, RecipeError
from gossamer.core.schedule import Step
from gossamer.core.stack import Stack
from gossamer.kits.example import tiny_vit
from gossamer.methods.srgan import SRGAN
from gossamer.methods.srgan.example import pairs, tiny_generator
from gossamer.models.super_resolution import Judge

FIGURES = tomllib.loads(resources.files("gossamer.methods.srgan").joinpath("figures.toml").read_text(encoding="utf-8"))[
    "figure"
]
STEP = Step("fit", "main", 0, 1)


def _ready(**options: Any) -> tuple[nn.Module, SRGAN]:
    method = SRGAN(width=4, **options)
    return Stack([method]).prepare(tiny_generator()), method


def test_terms_are_the_papers() -> None:
    model, method = _ready(adversarial=0.5)
    batch = pairs(STEP)
    out = model(batch["image"])
    terms = method.loss(model, batch, out, STEP)
    torch.testing.assert_close(terms["task"], F.mse_loss(2 * out - 1, 2 * batch["target"] - 1))
    with torch.no_grad():
        method.judge.eval()
        terms = method.loss(model, batch, out, STEP)
        expected = -torch.log(torch.sigmoid(method.judge(out))).mean()
    torch.testing.assert_close(terms["srgan.adversarial"], 0.5 * expected)
    assert method.loss(model, batch, out, Step("pretrain", "main", 0, 1)) == {}


def test_the_judge_learns_to_tell_and_only_it_moves() -> None:
    model, method = _ready()
    batch = pairs(STEP)
    before = [p.clone() for p in model.parameters()]
    optimiser = torch.optim.Adam(method.judge.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = method._judge_loss(model, batch, STEP)["srgan.judge"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and losses[0] == pytest.approx(2 * 0.693, abs=0.4)
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(model.parameters(), before, strict=True))


def test_the_judge_is_the_papers() -> None:
    convs = [m for m in Judge().modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    expected = next(f["value"] for f in FIGURES if f["name"] == "judge_convolutions")
    assert len(convs) == expected and convs[-1].out_channels == 512
    assert [c.stride[0] for c in convs] == [1, 2] * 4


def test_features_come_from_a_network_by_path() -> None:
    net = tiny_vit()
    net.features = net.blocks[0]
    model, method = _ready(content="features", perceptual=net, layer="blocks.0", content_weight=2.0)
    batch = pairs(STEP)
    big = {k: F.interpolate(batch[k], 32) for k in ("image", "target")}
    terms = method.loss(model, {**batch, **big}, big["image"].requires_grad_(), STEP)
    terms["task"].backward()
    assert terms["task"] > 0 and big["image"].grad.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())


def test_a_network_of_ones_own_needs_to_say_nothing() -> None:
    method = SRGAN(width=2)
    model = Stack([method]).prepare(nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2)))
    batch = {"image": torch.rand(2, 3, 8, 8), "target": torch.rand(2, 3, 16, 16)}
    assert method.loss(model, batch, model(batch["image"]), STEP)["srgan.adversarial"] > 0


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="content='vgg'.*allowed are pixels, features, task"):
        _ready(content="vgg")
    with pytest.raises(RecipeError, match="srgan: perceptual=None"):
        _ready(content="features")
    with pytest.raises(ModelError, match="is for something else"):
        Stack([SRGAN()]).prepare(tiny_vit())
    with pytest.raises(PlanError, match="no judge yet"):
        SRGAN().groups(tiny_generator())
