"""Quantization-aware training as a method: layers, starts, deployed forms, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.core.errors import ModelError, RecipeError
from gossamer.core.stack import Stack
from gossamer.kits.example import tiny_vit
from gossamer.kits.qat import find_layers, init_clips, wrap_layers
from gossamer.methods.qat import QAT
from gossamer.models.build import load_model
from gossamer.ops.liq import LIQLinear


def test_layers_of_a_transformer() -> None:
    layout = find_layers(tiny_vit())
    roles = {k.name: k.role for k in layout.layers}
    assert roles["patch_embed.proj"] == "first" and roles["head"] == "last" and len(layout.decided) == 12
    grids = {k.name.rpartition(".")[2]: k.inputs for k in layout.layers}
    assert grids["proj"] == "signed" and grids["fc2"] == "signed"  # GELU has negative values
    assert not any(k.normalise for k in layout.layers)


@pytest.mark.parametrize(
    "name", ["mobilenetv2_050", "resnet18", "resnet50", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"]
)
def test_families(name: str) -> None:
    options = {"img_size": 32, "patch_size": 16, "depth": 2} if "patch16" in name else {}
    model = load_model(name, num_classes=4, **options)
    layout = find_layers(model)
    heads = [k.name for k in layout.layers if k.role == "last"]
    assert len(heads) == (2 if "distilled" in name else 1)
    signed = {k.name for k in layout.layers if k.inputs == "signed"}
    if name.startswith("resnet"):
        assert not signed and all(k.follows for k in layout.layers if "downsample" in k.name)
    if name.startswith("mobilenet"):
        assert "blocks.1.0.conv_pw" in signed and "blocks.1.0.conv_pwl" not in signed  # after a linear bottleneck
    assert len(layout.decided) + len(heads) + 1 == len([k for k in layout.layers if k.role != "shortcut"])


def test_clips_start_at_least_error_and_close_to_the_float_model() -> None:
    images, errors = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), {}
    expected = tiny_vit().eval()(images)
    for how in ("paper", "mse"):
        model = tiny_vit().eval()
        layout = find_layers(model)
        model = wrap_layers(model, layout, {n: [w] for n, w in layout.widths(6).items()})
        init_clips(model, images, how)
        with torch.no_grad():
            errors[how] = (model(images) - expected).square().mean().item()
    assert errors["mse"] < errors["paper"] and errors["mse"] < 0.1 * expected.square().mean()


@pytest.mark.parametrize("bits", [1, 0, 17])
def test_widths_out_of_range(bits: int) -> None:
    with pytest.raises(RecipeError, match=r"qat: bits: bits=\d+; allowed are 2..16, or 32 for float"):
        Stack([QAT(bits=bits)]).prepare(tiny_vit())


def test_refusals() -> None:
    model = tiny_vit()
    model.head = LIQLinear(model.head)
    with pytest.raises(ModelError, match="quantized already"):
        Stack([QAT()]).prepare(model)
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 900, 2))
    small.default_cfg = small.pretrained_cfg = {"input_size": (3, 32, 32)}
    with pytest.raises(ModelError, match="at least a first, a last and one between"):
        Stack([QAT()]).prepare(small)
    with pytest.raises(RecipeError, match="clip_start"):
        Stack([QAT(clip_start="max")]).prepare(tiny_vit())
