"""The min-max baseline: steps, percentiles, forms, refusals."""

from __future__ import annotations

import pytest
import torch

from gossamer.core.errors import DataError, RecipeError
from gossamer.kits.calibration import calibrate
from gossamer.kits.example import tiny_vit
from gossamer.kits.quant_layout import quant_layers
from gossamer.methods.ptq_minmax import PTQMinMax
from gossamer.ops.int8 import Int8Conv2d, Int8Linear, Int8MatMul
from gossamer.ops.quant import max_scale


def _images(count=6):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_steps_are_those_of_the_extremes():
    model, images = tiny_vit().eval(), _images()
    weight = model.patch_embed.proj.weight.detach().clone()
    done = calibrate(PTQMinMax(w_bits=6, a_bits=7), model, images)
    layer = quant_layers(done)["patch_embed.proj"]
    assert torch.allclose(layer.input_scale, max_scale(images.abs().max(), 7))
    assert torch.allclose(layer.weight_scale, max_scale(weight.abs().max(), 6))


def test_percentile_clips():
    full = quant_layers(calibrate(PTQMinMax(a_bits=6), tiny_vit().eval(), _images()))
    clipped = quant_layers(calibrate(PTQMinMax(a_bits=6, percentile=99), tiny_vit().eval(), _images()))
    assert all(clipped[n].input_scale < m.input_scale for n, m in full.items() if hasattr(m, "input_scale"))


def test_eight_bits_are_real_and_close():
    model, images = tiny_vit().eval(), _images()
    expected = model(images)
    done = calibrate(PTQMinMax(per_channel=True), model, images)
    kinds = {type(m) for m in done.modules()}
    assert {Int8Linear, Int8Conv2d, Int8MatMul} <= kinds and not quant_layers(done)
    error = (done(images) - expected).square().sum() / expected.square().sum()
    assert error < 0.02


def test_float_head_and_float_products():
    done = calibrate(PTQMinMax(head_bits=None, attention_products=False), tiny_vit().eval(), _images())
    assert type(done.head) is torch.nn.Linear
    assert not any(isinstance(m, Int8MatMul) for m in done.modules())


@pytest.mark.parametrize("bad", [{"w_bits": 1}, {"percentile": 0.0}, {"images": 0}, {"a_bits": 17}])
def test_bad_options(bad):
    with pytest.raises(RecipeError):
        calibrate(PTQMinMax(**bad), tiny_vit(), _images())


def test_zero_images():
    with pytest.raises(DataError, match="0 images"):
        calibrate(PTQMinMax(), tiny_vit(), _images(0))
