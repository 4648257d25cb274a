"""The two players: pool, margin, freezing; and the perceptual network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import DataError, ModelError, RecipeError
from gossamer.core.schedule import Phase, Step
from gossamer.data.pairs import UNPAIRED
from gossamer.kits.adversarial import ImagePool, JudgeOptions, PairedGame, drawn_with, frozen, with_judge
from gossamer.kits.example import picture_pairs
from gossamer.kits.perceptual import PerceptualNetwork, load_perceptual
from gossamer.ops.adversarial import gram

STEP = Step("fit", "main", 0, 4)


def numbered(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_a_pool_fills_then_swaps() -> None:
    pool, draw = ImagePool(3), torch.Generator().manual_seed(0)
    assert torch.equal(pool(numbered(1, 2, 3), draw), numbered(1, 2, 3)) and len(pool.pictures) == 3
    old = new = 0
    held = {1.0, 2.0, 3.0}
    for value in range(4, 104):
        shown = float(pool(numbered(value), draw)[0, 0, 0, 0])
        now = set(pool.pictures[:, 0, 0, 0].tolist())
        if shown == value:
            new += 1
            assert now == held
        else:
            old += 1
            assert shown in held and now == (held - {shown}) | {float(value)}
        held = now
    assert 30 < old < 70 and old + new == 100
    assert torch.equal(ImagePool(0)(numbered(7), draw), numbered(7))


def test_a_half_full_pool_comes_back_from_its_state() -> None:
    pool, draw = ImagePool(4), torch.Generator().manual_seed(0)
    pool(numbered(1, 2), draw)
    other = ImagePool(4)
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other.pictures, pool.pictures)
    fresh = ImagePool(4)
    other.load_state_dict(fresh.state_dict())
    assert other.pictures.numel() == 0


def test_frozen_networks_pass_gradients_on() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    with frozen(layer):
        out = layer(x).sum()
    out.backward()
    assert layer.weight.grad is None and x.grad is not None and layer.weight.requires_grad


def test_margin_and_seed() -> None:
    options = JudgeOptions(width=4, layers=1)
    with drawn_with(3):
        game = PairedGame(options.make(6), options)
    with drawn_with(3):
        again = PairedGame(options.make(6), options)
    assert all(torch.equal(a, b) for a, b in zip(game.parameters(), again.parameters(), strict=True))
    batch = picture_pairs(STEP)
    with torch.no_grad():
        gap = (
            game.judge(game.view(batch["image"], batch["target"])).mean()
            - game.judge(game.view(batch["image"], batch["image"])).mean()
        )
    game.judge_terms([batch["image"]], batch, STEP)
    assert float(game.margin) == pytest.approx(0.1 * float(gap), rel=1e-4)


class _Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.feature_info = [{"module": "a"}, {"module": "b"}]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_style_and_content() -> None:
    net = _Deep()
    seer = load_perceptual(net)
    x, y = (torch.rand(2, 3, 8, 8, requires_grad=True) for _ in range(2))
    style, content = seer.terms(x, y)
    a, b = ([net.a((v + 1) / 2), net.forward_features((v + 1) / 2)] for v in (x, y))
    assert torch.allclose(style, sum(F.l1_loss(gram(p), gram(q)) for p, q in zip(a, b, strict=True)))
    assert torch.allclose(content, F.l1_loss(a[1], b[1]))
    (style + content).backward()
    assert y.grad is None and x.grad is not None and all(p.grad is None for p in net.parameters())


def test_what_comes_after_the_last_feature_is_not_computed() -> None:
    net, ran = _Deep(), []
    net.b.register_forward_hook(lambda *_: ran.append("b"))
    picture = torch.zeros(1, 3, 8, 8)
    seer = PerceptualNetwork(net, ["a"])
    assert [f.shape for f in seer(picture)] == [(1, 4, 6, 6)] and not ran
    net.forward_features(picture)  # the network itself still runs to its end
    assert ran == ["b"]


def test_features_may_be_named_in_any_order() -> None:
    net, picture = _Deep(), torch.zeros(1, 3, 8, 8)
    first, second = PerceptualNetwork(net, ["a", "b"])(picture)
    swapped = PerceptualNetwork(net, ["b", "a"])(picture)
    assert torch.equal(swapped[0], second) and torch.equal(swapped[1], first)


def test_vgg_taps_are_the_published_ones() -> None:
    import timm

    with torch.device("meta"):
        net = timm.create_model("vgg16")
    assert load_perceptual(net).paths == tuple(f"net.features.{n}" for n in (3, 8, 15, 22))
    assert all(isinstance(net.features[n], nn.ReLU) for n in (3, 8, 15, 22))


def test_missing_networks_are_refused() -> None:
    for spec in (None, "vgg16"):
        with pytest.raises(RecipeError, match="vgg16@vgg16.safetensors"):
            load_perceptual(spec)
    with pytest.raises(RecipeError, match="^srgan: perceptual=None: .*; a way out$"):
        load_perceptual(None, who="srgan", how="a way out")
    with pytest.raises(ModelError, match="no features at"):
        PerceptualNetwork(_Deep(), ["nowhere"])


def test_rates_and_betas_are_checked_before_the_training() -> None:
    phase, rest = Phase("fit", 1), {"first": True, "partners": False}
    for betas in ((2.0, 0.9), (0.5,), (-0.1, 0.9)):
        with pytest.raises(RecipeError, match="betas=.*from 0 to below 1"):
            with_judge(phase, lambda *_: {}, betas=betas, **rest)
    with pytest.raises(RecipeError, match="judge_lr=-1.0; expected a number above 0"):
        with_judge(phase, lambda *_: {}, betas=(0.5, 0.9), lr=-1.0, **rest)


def test_a_game_of_pairs_refuses_pictures_without() -> None:
    options = JudgeOptions("hinge", 4, 1)
    game, x = PairedGame(options.make(6), options), torch.zeros(1, 3, 16, 16)
    batch = {"image": x, "target": x, "id": ["a"]}
    assert {"gan", "recon"} == game.generator_terms(nn.Identity(), batch, x, Step("fit", "main", 0, 1)).keys()
    with pytest.raises(DataError, match="these pictures have no pairs"):
        game.generator_terms(nn.Identity(), {**batch, UNPAIRED: torch.ones(1)}, x, Step("fit", "main", 0, 1))
