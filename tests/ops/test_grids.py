"""Every grid, every width: deployed layers against the papers' formulas in floating point."""

from dataclasses import asdict

import pytest
import torch
from torch import nn

from gossamer.core.errors import ModelError
from gossamer.ops.grids import (
    INPUT_GRIDS,
    WEIGHT_GRIDS,
    InputGrid,
    LayerGrids,
    covering_grid,
    pack_codes,
    unpack_codes,
    weight_codes,
    weight_values,
)
from gossamer.ops.int8 import Int8Conv2d, Int8Linear, int8_layer

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "convolution": (lambda: nn.Conv2d(4, 8, 3, padding=1, stride=2), (2, 4, 7, 7)),
    "dilated": (lambda: nn.Conv2d(4, 8, 3, padding=2, dilation=2, bias=False), (2, 4, 6, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 1, groups=2), (2, 4, 5, 5)),
}


def odd_levels(x, top, bits):
    """arXiv 2111.12273 (LIQ): top * (2 round((clip(x / top, -1, 1) + 1) / 2 * n) / n - 1), n = 2^bits - 1."""
    n = 2**bits - 1
    return top * (2 * torch.round((torch.clamp(x / top, -1, 1) + 1) / 2 * n) / n - 1)


def half_levels(x, top, bits):
    """The same paper's activations: top * round(clip(x / top, 0, 1) * n) / n."""
    n = 2**bits - 1
    return top * torch.round(torch.clamp(x / top, 0, 1) * n) / n


def on_grid(x, step, kind, bits, zero=0):
    """Return ``x`` on a grid of activations, from its definition."""
    if kind == "odd":
        return odd_levels(x, step * (2**bits - 1), bits)
    low, high = {"signed": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), "unsigned": (0, 2**bits - 1)}.get(
        kind, (-zero, 2**bits - 1 - zero)
    )
    return torch.clamp(torch.round(x / step), low, high) * step


def plain(source, x, weight):
    if isinstance(source, nn.Linear):
        return nn.functional.linear(x, weight, source.bias)
    return nn.functional.conv2d(
        x, weight, source.bias, source.stride, source.padding, source.dilation, source.groups
    )  # fmt: skip


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_levels_without_zero_are_exact(kind, bits):
    torch.manual_seed(bits)
    build, shape = LAYERS[kind]
    source, x = build(), torch.rand(shape)
    n, rows = 2**bits - 1, len(source.weight)
    tops = torch.rand(rows) * 0.2 + 0.1
    weight = odd_levels(source.weight.detach(), tops.reshape(-1, *[1] * (source.weight.dim() - 1)), bits)
    layer = int8_layer(source, LayerGrids(bits, bits, "odd", "unsigned", rows), tops / n, 0.9 / n)
    torch.testing.assert_close(layer.dequantized_weight(), weight)
    torch.testing.assert_close(layer(x), plain(source, half_levels(x, 0.9, bits), weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHT_GRIDS)
@pytest.mark.parametrize("inputs", [k for k in INPUT_GRIDS if k != "float"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", [3, 8])
def test_every_pair_of_grids_is_exact(kind, weights, inputs, bits):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    source, x = build(), torch.randn(shape)
    zero = 2 if inputs == "asymmetric" else None
    layer = int8_layer(source, LayerGrids(bits, bits, weights, inputs), 0.02, 0.03, input_zero=zero)
    expected = plain(source, on_grid(x, 0.03, inputs, bits, zero or 0), layer.dequantized_weight())
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_odd_codes_have_all_levels_and_no_zero(bits):
    n = 2**bits - 1
    grids = LayerGrids(bits, 8, "odd")
    codes = weight_codes(torch.linspace(-2, 2, 4001)[None], torch.tensor([1 / n]), grids)
    values = weight_values(codes, torch.tensor([2 / n if grids.halved else 1 / n]), grids).unique()
    torch.testing.assert_close(values, torch.arange(-n, n + 1, 2) / n)
    torch.testing.assert_close(values, -values.flip(0))


@pytest.mark.parametrize(("kind", "bits"), [(k, b) for k, widths in WEIGHT_GRIDS.items() for b in widths])
def test_codes_pack_to_their_width_and_back(kind, bits):
    grids = LayerGrids(bits, 8, kind)
    codes = weight_codes(torch.randn(3, 7), torch.tensor([1 / 2**bits]), grids)
    packed = pack_codes(codes, grids)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-21 * bits // 8)
    assert torch.equal(unpack_codes(packed, (3, 7), grids), codes)


def test_the_order_of_packed_bits_is_fixed():
    codes = torch.tensor([-3, -1, 1, 3, 3], dtype=torch.int8)  # 0 1 2 3 3 from the lowest level
    assert pack_codes(codes, LayerGrids(2, 8, "odd")).tolist() == [0b11_10_01_00, 0b11]
    with pytest.raises(ModelError, match=r"codes 0..0 are not all on the odd grid of 2 bits"):
        pack_codes(torch.zeros(2, dtype=torch.int8), LayerGrids(2, 8, "odd"))


def test_the_covering_grid_is_symmetric_and_near():
    source, grids, step = nn.Linear(64, 4), LayerGrids(8, 8, "odd", num_scales=4), torch.full((4,), 0.0005)
    exact = int8_layer(source, grids, step, 0.1)
    near = int8_layer(source, *covering_grid(grids, step), 0.1)
    assert near.grids.weight_grid == "symmetric" and not near.grids.halved
    errors = [(e.dequantized_weight() - source.weight).square().mean().sqrt() for e in (exact, near)]
    assert 0.8 < errors[0] / errors[1] < 1.25
    assert covering_grid(LayerGrids(4, 8, "odd"), step)[1] is step


def test_float_input_is_left_alone():
    source, x = nn.Linear(6, 4), torch.randn(3, 6)
    layer = Int8Linear.from_grids(source, LayerGrids(8, 32, "odd", "float"), 0.001)
    torch.testing.assert_close(layer(x), plain(source, x, layer.dequantized_weight()))
    assert layer.input_bits == 32
    with pytest.raises(ModelError, match="step 0.1 for a float input"):
        Int8Linear.from_grids(source, LayerGrids(8, 32, "odd", "float"), 0.001, 0.1)


def test_weights_given_apart_and_grids_as_json():
    source = nn.Conv2d(2, 4, 3)
    grids = LayerGrids(**asdict(LayerGrids(4, 4, "odd", "unsigned", 4)))
    layer = Int8Conv2d.from_grids(source, grids, 0.1, 0.1, weight=torch.full_like(source.weight, 0.31), bias=True)
    assert torch.equal(layer.weight, torch.full_like(layer.weight, 3))
    again = Int8Conv2d.like(source, grids)
    again.load_state_dict(layer.state_dict())
    x = torch.rand(1, 2, 5, 5)
    assert torch.equal(layer(x), again(x))


@pytest.mark.parametrize(("weights", "bits"), [("odd", 8), ("odd", 3), ("symmetric", 8), ("symmetric", 4)])
def test_a_norm_folds_into_scales(weights, bits):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8).eval()
    nn.init.normal_(norm.weight)  # some gains are negative
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        norm.weight[0] = 0
        conv.weight.clamp_(-0.1, 0.1)
    x = torch.rand(2, 4, 6, 6)
    layer = Int8Conv2d.from_grids(conv, LayerGrids(bits, 8, weights, "unsigned", 8), 0.2 / 2**bits, 1 / 255, bias=True)
    layer.weight.clamp_(min=-(2 ** (bits - 1)) + 1)
    expected = norm(layer(x))
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    layer.scale_outputs(gain.detach(), (norm.bias - gain * norm.running_mean).detach())
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="bias=True and num_scales=8"):
        Int8Conv2d.from_grids(conv, LayerGrids(), 0.1, 0.1).scale_outputs(gain, gain)


def test_what_cannot_be_held_is_refused():
    source = nn.Linear(6, 4)
    for grids, words in (
        (LayerGrids(weight_grid="add"), "did you mean 'odd'"),
        (LayerGrids(weight_bits=1), r"symmetric grid has 2\.\.8 bits"),
        (LayerGrids(9, weight_grid="odd"), r"odd grid has 1\.\.8 bits"),
        (LayerGrids(input_bits=32), "input_bits=32"),
        (LayerGrids(input_grid="float"), "has 32 bits"),
        (LayerGrids(num_scales=3), "3 weight scales for 4 rows"),
    ):
        with pytest.raises(ModelError, match=words):
            Int8Linear.like(source, grids)
    with pytest.raises(ModelError, match="do not go into num_scales=2"):
        Int8Linear.from_grids(source, LayerGrids(num_scales=2), torch.ones(4), 0.1)
    with pytest.raises(ModelError, match="zero point 16 on a asymmetric grid of 4 bits"):
        Int8Linear.from_grids(source, LayerGrids(4, 4, input_grid="asymmetric"), 0.1, 0.1, input_zero=16)
    with pytest.raises(ModelError, match="zero point 3 on a signed grid"):
        InputGrid().fill("here", 0.1, 3)
