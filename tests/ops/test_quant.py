"""ops.quant: the grid, straight-through gradients, scale groups and the wrapped layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.core.errors import ModelError, RecipeError
from gossamer.ops.quant import (
    QuantConv2d,
    QuantLinear,
    QuantMatMul,
    code_range,
    fake_quantize,
    fake_quantize_ste,
    max_scale,
    spread_rows,
)


@pytest.mark.parametrize("bits", [2, 4, 6, 8, 10, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_values_lie_on_the_grid(bits, signed):
    x = torch.randn(500, generator=torch.Generator().manual_seed(bits)) * 3
    scale = torch.tensor([0.05])
    codes = fake_quantize(x, scale, bits, signed) / scale
    low, high = code_range(bits, signed)
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert codes.min() >= low - 1e-3 and codes.max() <= high + 1e-3
    inside = (x / scale > low) & (x / scale < high)
    assert (fake_quantize(x, scale, bits, signed) - x)[inside].abs().max() <= 0.5 * 0.05 + 1e-6


def test_grid_is_the_papers():
    x = torch.tensor([-10.0, -0.26, -0.25, 0.0, 0.25, 0.26, 10.0])
    assert fake_quantize(x, torch.tensor(0.5), 2).tolist() == [-1.0, -0.5, 0.0, 0.0, 0.0, 0.5, 0.5]


def test_max_scale_puts_the_maximum_on_the_largest_code():
    top = torch.tensor([3.0])
    for bits, signed in ((4, True), (8, True), (8, False)):
        assert torch.allclose(fake_quantize(top, max_scale(top, bits, signed), bits, signed), top)
    assert max_scale(torch.zeros(1), 8) > 0


def test_quantization_is_idempotent_and_converges_with_width():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (4, 6, 8, 10, 16):
        scale = max_scale(x.abs().max(), bits)
        once = fake_quantize(x, scale, bits)
        assert torch.equal(once, fake_quantize(once, scale, bits))
        errors.append(float((once - x).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-8


def test_straight_through_values_and_gradients():
    x = torch.tensor([-9.0, -0.6, 0.2, 1.3, 9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    out = fake_quantize_ste(x, scale, 4)
    assert torch.equal(out, fake_quantize(x, scale, 4))
    out.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    ratio = x.detach() / 0.5
    inside = torch.round(ratio) - ratio
    expected = -8 + float(inside[1:4].sum()) + 7
    assert scale.grad.item() == pytest.approx(expected, abs=1e-5)


def test_spread_rows_per_tensor_group_and_channel():
    weight = torch.randn(6, 4)
    assert spread_rows(torch.tensor([2.0]), weight).shape == (1, 1)
    assert spread_rows(torch.tensor([1.0, 2.0, 3.0]), weight).flatten().tolist() == [1, 1, 2, 2, 3, 3]
    assert spread_rows(torch.arange(6.0), torch.randn(6, 3, 2, 2)).shape == (6, 1, 1, 1)


def test_linear_is_plain_until_active_and_keeps_names():
    source = nn.Linear(8, 6)
    x = torch.randn(3, 5, 8)
    layer = QuantLinear(source, num_scales=3, bits=(4, 4))
    assert {"weight", "bias", "weight_scale", "input_scale", "float_bias"} == set(layer.state_dict())
    assert torch.equal(layer(x), source(x))
    assert (layer.weight_bits, layer.input_bits) == (32, 32)
    layer.weight_scale.copy_(max_scale(source.weight.abs().amax(1).reshape(3, 2).amax(1), 4))
    layer.input_scale.copy_(max_scale(x.abs().max(), 4))
    layer.active = True
    assert (layer.weight_bits, layer.input_bits) == (4, 4)
    for group in layer.quantized_weight().chunk(3):
        assert len(group.unique()) <= 16
    expected = fake_quantize(x, layer.input_scale, 4) @ layer.quantized_weight().T + source.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_new_bias_is_a_zero_parameter():
    layer = QuantLinear(nn.Linear(4, 2, bias=False), new_bias=True)
    assert isinstance(layer.bias, nn.Parameter) and layer.bias.abs().sum() == 0
    assert QuantLinear(nn.Linear(4, 2, bias=False)).bias is None


def test_convolution_matches_its_source_at_16_bits():
    source = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 9, 9)
    layer = QuantConv2d(source, bits=(16, 16))
    layer.weight_scale.copy_(max_scale(source.weight.abs().max(), 16))
    layer.input_scale.copy_(max_scale(x.abs().max(), 16))
    layer.active = True
    assert torch.allclose(layer(x), source(x), atol=1e-3)


def test_product_grids():
    a, b = torch.rand(2, 3, 4), torch.randn(2, 4, 5)
    layer = QuantMatMul((8, 8), (False, True))
    assert torch.equal(layer(a, b), a @ b)
    layer.a_scale.copy_(max_scale(a.max(), 8, False))
    layer.b_scale.copy_(max_scale(b.abs().max(), 8))
    layer.active = True
    assert 0 < (layer(a, b) - a @ b).abs().max() < 0.05


def test_bad_values_are_refused():
    with pytest.raises(RecipeError, match="bits=1; allowed are 2..16"):
        fake_quantize(torch.ones(1), torch.ones(1), 1)
    with pytest.raises(ModelError, match="4 weight scales for 6 rows"):
        QuantLinear(nn.Linear(8, 6), num_scales=4)
    with pytest.raises(ModelError, match="padding 'same'"):
        QuantConv2d(nn.Conv2d(3, 3, 3, padding="same"))
