"""Deployed 8-bit layers: grids, storage, state dicts, tracing."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gossamer.core.errors import ModelError
from gossamer.ops.grids import SIGNED_ZERO, LayerGrids, dequantize, quantize
from gossamer.ops.int8 import Int8Conv2d, Int8Linear, Int8MatMul


def reference(x, scale, low, high):
    return torch.clamp(torch.round(x / scale), low, high) * scale


@pytest.mark.parametrize(("dtype", "zero"), [(torch.uint8, 128), (torch.uint8, 0), (torch.int8, 0)])
def test_codes_saturate_and_round_half_to_even(dtype, zero):
    x = torch.tensor([-1e9, -1.5, -0.5, 0.5, 1.5, 2.5, 1e9])
    scale, zero_point = torch.ones(1), torch.tensor([zero], dtype=dtype)
    codes = quantize(x, scale, zero_point, 0, dtype)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    expected = (torch.tensor([-1e9, -2, 0, 0, 2, 2, 1e9]) + zero).clamp(low, high)
    assert codes.dtype == dtype
    assert torch.equal(codes.float(), expected)
    assert torch.equal(dequantize(codes, scale, zero_point, 0), expected - zero)


def test_operators_pass_torch_checks():
    x, scale, zero = torch.randn(3, 4), torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.int8)
    torch.library.opcheck(quantize, (x, scale, zero, 0, torch.int8))
    torch.library.opcheck(dequantize, (quantize(x, scale, zero, 0, torch.int8), scale, zero, 0))


@pytest.mark.parametrize("scales", [1, 3, 12])
@pytest.mark.parametrize("bits", [8, 6])
def test_linear_equals_fake_quantization(scales, bits):
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 12), torch.randn(5, 7, 8)
    scale = torch.rand(scales) * 0.01 + 0.005
    top = 2 ** (bits - 1)
    weight = reference(linear.weight, scale.repeat_interleave(12 // scales)[:, None], -top, top - 1)
    expected = nn.functional.linear(reference(x, 0.02, -top, top - 1), weight, linear.bias)
    layer = Int8Linear.from_scales(linear, scale, 0.02, weight_bits=bits, input_bits=bits)
    torch.testing.assert_close(layer(x), expected)
    assert layer.weight.dtype == torch.int8
    assert layer.weight_bytes == 96 * bits // 8 + 4 * (1 if scales == 1 else 12) + 4 * 12
    assert (layer.weight_bits, layer.input_bits) == (bits, bits)


def test_unsigned_input_uses_all_codes():
    linear, x = nn.Linear(8, 4, bias=False), torch.rand(6, 8)
    layer = Int8Linear.from_scales(linear, 0.01, 1 / 255, signed=False)
    assert int(layer.input_grid.zero_point) == 0
    weight = reference(linear.weight, 0.01, -128, 127)
    torch.testing.assert_close(layer(x), reference(x, 1 / 255, 0, 255) @ weight.T)


def test_convolution_equals_fake_quantization():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 9, 9)
    scale = conv.weight.detach().abs().amax((1, 2, 3)) / 127
    layer = Int8Conv2d.from_scales(conv, scale, 0.03)
    weight = reference(conv.weight, scale[:, None, None, None], -128, 127)
    expected = nn.functional.conv2d(reference(x, 0.03, -128, 127), weight, conv.bias, 2, 1, groups=2)
    torch.testing.assert_close(layer(x), expected)


def test_product_equals_fake_quantization():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5, 4).softmax(-1), torch.randn(2, 3, 4, 6)
    layer = Int8MatMul.from_scales(1 / 255, 0.02, signed=(False, True))
    torch.testing.assert_close(layer(a, b), reference(a, 1 / 255, 0, 255) @ reference(b, 0.02, -128, 127))
    assert int(layer.b_grid.zero_point) == SIGNED_ZERO


def test_safetensors_round_trip_is_exact_and_small(tmp_path):
    linear, x = nn.Linear(256, 256), torch.randn(2, 256)
    model = nn.Sequential(Int8Linear.from_scales(linear, torch.full((256,), 0.001), 0.02))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 256 * 256 * 1.1
    fresh = nn.Sequential(Int8Linear(256, 256, grids=LayerGrids(num_scales=256)))
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(fresh(x), model(x))


def test_layers_trace_with_a_free_batch():
    linear = Int8Linear.from_scales(nn.Linear(8, 4), 0.01, 0.02)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(linear, (torch.randn(3, 8),), dynamic_shapes=({0: batch},), strict=False)
    x = torch.randn(5, 8)
    assert torch.equal(program.module()(x), linear(x))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scale_is_refused(scale):
    with pytest.raises(ModelError, match="every scale must be finite"):
        Int8Linear.from_scales(nn.Linear(4, 4), scale, 0.1)


def test_bad_counts_and_widths_are_refused():
    with pytest.raises(ModelError, match="3 scales"):
        Int8Linear.from_scales(nn.Linear(4, 4), torch.ones(3), 0.1)
    with pytest.raises(ModelError, match="input_bits=9"):
        Int8Linear.from_scales(nn.Linear(4, 4), 0.1, 0.1, input_bits=9)
    with pytest.raises(ModelError, match="padding 'same'"):
        Int8Conv2d.from_scales(nn.Conv2d(2, 2, 3, padding="same"), 0.1, 0.1)
