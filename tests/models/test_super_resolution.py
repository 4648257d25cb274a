"""Super-resolution networks: published sizes, published checkpoints, registration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gossamer.core.errors import ModelError
from gossamer.cost.ledger import cost
from gossamer.models.build import load_model
from gossamer.models.source import source_of
from gossamer.models.super_resolution import EDSR, Judge, checkpoint_filter_fn
from gossamer.tasks.super_resolution import scale_of


@pytest.mark.parametrize(
    ("name", "params", "macs", "size"),
    [
        ("edsr_baseline_x2", 1_369_859, 949.24e9, (678, 1020)),
        ("edsr_baseline_x4", 1_517_571, 342.87e9, (339, 510)),
        ("srresnet_x2", 1_399_314, 997.04e9, (678, 1020)),
        ("srresnet_x4", 1_546_771, 383.50e9, (339, 510)),
    ],
)
def test_published_sizes(name: str, params: int, macs: float, size: tuple[int, int]) -> None:
    found = cost(load_model(name, img_size=8), saved=False)
    assert found.params == params
    assert found.macs / 64 * size[0] * size[1] == pytest.approx(macs, rel=5e-5)


def test_prelu_adds_one_slope_a_block() -> None:
    plain, sloped = (load_model("edsr_baseline_x2", act=a, img_size=8) for a in ("relu", "prelu"))
    count = [sum(p.numel() for p in m.parameters()) for m in (plain, sloped)]
    assert count[1] - count[0] == 16


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_networks_are_timm_models_that_state_their_task(scale: int) -> None:
    small = {"edsr_baseline": {"depth": 1, "width": 4}, "srresnet": {"depth": 1, "width": 4}, "imdn": {"width": 16}}
    for kind, options in small.items():
        model = load_model(f"{kind}_x{scale}", img_size=8, **options)
        assert model.eval()(torch.rand(2, 3, 8, 6)).shape == (2, 3, 8 * scale, 6 * scale)
        assert scale_of(model) == scale and source_of(model).preprocessing.size == (3, 8, 8)
    assert Judge(8)(torch.rand(2, 3, 32, 32)).shape == (2,)


def test_zero_weights_return_the_mean_colour() -> None:
    model = load_model("edsr_baseline_x2", depth=1, width=4)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    with torch.no_grad():
        out = model(torch.rand(1, 3, 4, 4))
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0.4488, 0.4371, 0.4040]), atol=1e-5, rtol=0)


def test_published_edsr_keys_load() -> None:
    model = load_model("edsr_baseline_x2", depth=1, width=4)
    state = {**model.state_dict(), "sub_mean.weight": torch.zeros(1), "add_mean.bias": torch.zeros(1)}
    assert checkpoint_filter_fn(state, model).keys() == model.state_dict().keys()
    assert {"head.0.weight", "body.0.body.2.bias", "body.1.weight", "tail.0.0.weight", "tail.1.bias"} <= state.keys()


def test_refusals() -> None:
    with pytest.raises(ModelError, match="scale=5; allowed are 2, 3, 4"):
        EDSR("edsr", 5)
    with pytest.raises(ModelError, match="allowed are relu, prelu"):
        load_model("edsr_baseline_x2", act="gelu", depth=1)


def test_pretrained_srgan_generator_loads(shared_weights: Path) -> None:
    model = load_model(f"srgan_x4@{shared_weights / 'srresnet5_x4.safetensors'}")
    with torch.no_grad():
        out = model(torch.full((1, 3, 8, 8), 0.5))
    assert out.shape == (1, 3, 32, 32) and float((out - 0.5).abs().mean()) < 0.05
