"""Translation generators: shapes, widths, checkpoints, what a saved one remembers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gossamer.core.errors import ModelError
from gossamer.cost.ledger import cost
from gossamer.models.build import load_model
from gossamer.models.discriminators import PatchDiscriminator
from gossamer.models.generators import UpConv
from gossamer.models.preprocessing import preprocessing
from gossamer.models.store import load, save

NAMES = ("resnet_6blocks", "mobile_resnet_3blocks", "unet_32")


@pytest.mark.parametrize("name", NAMES)
def test_pictures_in_pictures_out(name: str) -> None:
    model = load_model(name, width=4, in_chans=1, out_chans=3, img_size=32)
    out = model(torch.zeros(2, 1, 32, 32))
    assert out.shape == (2, 3, 32, 32) and float(out.detach().abs().max()) <= 1
    pre = preprocessing(model)
    assert pre.size == (1, 32, 32) and pre.mean == (0.5,) and pre.task == {"image_translation": {}}
    seen = dict(model.named_modules())
    assert len(model.taps) == 4 and all(t in seen for t in model.taps)


@pytest.mark.parametrize("name", NAMES)
def test_narrower_twin_and_change_in_place(name: str) -> None:
    model = load_model(name, width=8)
    twin = model.twin(width=2)
    shapes = {k: v.shape for k, v in twin.state_dict().items()}
    assert model.set_width(2) is model and {k: v.shape for k, v in model.state_dict().items()} == shapes
    assert model.options["width"] == 2


def test_saved_generator_loads(tmp_path: Path) -> None:
    model = load_model("mobile_resnet_3blocks", width=2, norm="batch", img_size=32).eval()
    again = load(save(model, tmp_path / "g"))
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(again(x), model(x)) and preprocessing(again) == preprocessing(model)


def test_checkpoints_of_the_original_projects_load(tmp_path: Path) -> None:
    model = load_model("resnet_6blocks", width=2)
    theirs = {k.replace("conv_block.6.", "conv_block.5."): v.clone() for k, v in model.state_dict().items()}
    theirs["model.2.running_mean"] = torch.zeros(2)  # old instance norms kept what they never used
    save_file(theirs, tmp_path / "g.safetensors")
    again = load_model(f"resnet_6blocks@{tmp_path / 'g.safetensors'}", width=2)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_both_conventions_of_a_transposed_convolution() -> None:
    up = UpConv(4, 2, 3, 2, 1, 1)
    found = cost(up, torch.zeros(1, 4, 8, 8), saved=False)
    assert found.macs == 8 * 8 * 4 * 2 * 9 and found.theoretical_macs == 4 * found.macs


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: load_model("mobile_resnet_3blocks", norm="layer"), "allowed are instance, batch"),
        (lambda: load_model("mobile_resnet_3blocks", width=0), "at least 1"),
        (lambda: PatchDiscriminator(3)(torch.zeros(1, 3, 16, 16)), "fewer layers, or larger pictures"),
    ],
)
def test_bad_numbers_are_refused(build, says) -> None:
    with pytest.raises(ModelError, match=says):
        build()
