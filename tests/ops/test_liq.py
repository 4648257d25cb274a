"""Quantizers with learned clips: grids, gradients, layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.core.errors import ModelError, RecipeError
from gossamer.ops.liq import (
    FLOAT_BITS,
    LIQConv2d,
    LIQLinear,
    clip_signed,
    clip_unsigned,
    normalise_weight,
    odd_levels,
)
from gossamer.ops.quant import fake_quantize
from gossamer.ops.switchable import SwitchableNorm


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _by_autograd(x: torch.Tensor, clip: torch.Tensor, bits: int, low: float, odd: bool) -> torch.Tensor:
    """The definition, one operation at a time, with a straight-through round."""
    n = 2**bits - 1 if low in (0.0, -1.0) else 2 ** (bits - 1) - 1
    z = torch.clamp(x / clip, low, 1)
    u = (z + 1) / 2 * n if odd else z * n
    level = (u + (u.round() - u).detach()) / n
    return clip * (2 * level - 1 if odd else level)


@settings(deadline=None, max_examples=40)
@given(bits=st.integers(2, 8), clip=st.floats(0.2, 3.0), seed=st.integers(0, 99))
def test_odd_grid_has_no_zero_and_is_odd(bits: int, clip: float, seed: int) -> None:
    x, c = 2 * _draw(500, seed=seed), torch.tensor([clip])
    q = odd_levels(x, c, bits)
    assert len(q.unique()) <= 2**bits and (q != 0).all() and q.abs().max() <= clip * (1 + 1e-6)
    codes = q * (2**bits - 1) / c
    assert torch.allclose(codes, codes.round(), atol=1e-3) and (codes.round() % 2 != 0).all()
    away = ((x / c + 1) / 2 * (2**bits - 1) % 1 - 0.5).abs() > 1e-3  # ties round to even, which is not odd-symmetric
    assert torch.allclose(odd_levels(-x, c, bits)[away], -q[away], atol=1e-5)


@pytest.mark.parametrize(("put", "low", "odd"), [(odd_levels, -1.0, True), (clip_unsigned, 0.0, False)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_are_those_of_the_definition(put, low: float, odd: bool, bits: int) -> None:
    seed = _draw(3, 40, seed=1)
    results = []
    for function in (put, lambda x, c, b: _by_autograd(x, c, b, low, odd)):
        x, c = (1.5 * _draw(3, 40)).requires_grad_(), torch.tensor([0.9], requires_grad=True)
        out = function(x, c, bits)
        out.backward(seed)
        results.append((out.detach(), x.grad, c.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_signed_grid_is_that_of_the_other_quantizers(bits: int) -> None:
    x, c = (2 * _draw(200)).requires_grad_(), torch.tensor([0.8], requires_grad=True)
    top = 2 ** (bits - 1) - 1
    out = clip_signed(x, c, bits)
    assert torch.allclose(out, fake_quantize(x, c / top, bits), atol=1e-6)
    out.sum().backward()
    inside = (x / c <= 1) & (x / c >= -(top + 1) / top)
    assert torch.equal(x.grad, inside.float())
    expected = torch.where(inside, (out - x) / c, out / c).sum()
    assert torch.allclose(c.grad, expected, rtol=1e-4, atol=1e-4)


def test_normalised_weights_ignore_scale_and_shift() -> None:
    w = _draw(8, 4, 3, 3)
    c = torch.ones(1)
    assert torch.equal(odd_levels(normalise_weight(w), c, 3), odd_levels(normalise_weight(2.0 * w + 0.5), c, 3))
    w.requires_grad_()
    normalise_weight(w).sum().backward()
    assert torch.allclose(w.grad, torch.full_like(w, 1 / w.detach().std()))  # mean and std are constants


def _conv(**options) -> LIQConv2d:
    torch.manual_seed(0)
    return LIQConv2d(nn.Conv2d(4, 6, 3, padding=1), **options)


def test_thirty_two_bits_return_the_plain_layer() -> None:
    torch.manual_seed(0)
    plain, x = nn.Conv2d(4, 6, 3, padding=1), _draw(2, 4, 8, 8)
    assert torch.equal(_conv(choices=((FLOAT_BITS, FLOAT_BITS),), normalise=True)(x), plain(x))


def test_zero_offset_collects_the_gradient_of_the_quantized_weights() -> None:
    layer, x = _conv(choices=((3, 4),), normalise=True), _draw(4, 4, 8, 8).relu()
    expected = layer(x)
    layer.offset = torch.zeros_like(layer.weight, requires_grad=True)
    assert torch.equal(layer(x), expected)
    for part in x.split(2):  # micro batches add up
        layer(part).square().sum().backward()
    q = layer.quantized_weight().detach().requires_grad_()
    nn.functional.conv2d(layer.quantized_input(x), q, layer.bias, padding=1).square().sum().backward()
    assert torch.allclose(layer.offset.grad, q.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("widths", [(2, 2), (3, 3), (5, 5)])
def test_switched_layer_equals_the_fixed_one(widths: tuple[int, int]) -> None:
    switchable = _conv(choices=((2, 2), (3, 3), (5, 5)), normalise=True)
    with torch.no_grad():
        switchable.weight_clip.copy_(torch.tensor([0.5, 0.7, 0.9]))
        switchable.input_clip.copy_(torch.tensor([1.5, 1.7, 1.9]))
    switchable.select(widths)
    fixed = _conv(choices=(widths,), normalise=True)
    with torch.no_grad():
        fixed.weight_clip.copy_(switchable.active_clip("weight"))
        fixed.input_clip.copy_(switchable.active_clip("input"))
    x = _draw(2, 4, 8, 8)
    assert torch.equal(switchable(x), fixed(x)) and switchable.weight_bits == widths[0]


def test_one_layers_width_changes_its_output() -> None:
    layer, x = _conv(choices=((2, 2), (4, 4)), normalise=True), _draw(2, 4, 8, 8)
    before = layer(x)
    layer.select((4, 4))
    assert not torch.equal(layer(x), before)


def test_negative_clips_count_as_their_size() -> None:
    layer, x = _conv(choices=((3, 3),)), _draw(2, 4, 8, 8)
    expected = layer(x)
    with torch.no_grad():
        layer.weight_clip.neg_()
        layer.input_clip.neg_()
    assert torch.equal(layer(x), expected)


def test_linear_with_signed_input() -> None:
    torch.manual_seed(0)
    source = nn.Linear(6, 3)
    layer = LIQLinear(source, ((4, 4),), inputs="signed")
    assert torch.allclose(layer.weight_clip, 0.8 * source.weight.abs().max())
    out = layer(_draw(5, 6))
    assert out.shape == (5, 3) and layer.quantized_input(torch.tensor([-0.5])) < 0


@pytest.mark.parametrize("bits", [0, 1, 17, 33])
def test_widths_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(RecipeError, match=r"bits=\d+; allowed are 2..16, or 32 for float"):
        _conv(choices=((bits, 4),))


def test_unknown_choices_and_padding_are_refused() -> None:
    with pytest.raises(RecipeError, match="allowed are"):
        _conv(choices=((4, 4),)).select((3, 3))
    with pytest.raises(ModelError, match="Keep this layer in float"):
        LIQConv2d(nn.Conv2d(3, 3, 3, padding="same"))
    with pytest.raises(RecipeError, match="inputs='both'"):
        _conv(inputs="both")


def test_switchable_norm_keeps_statistics_apart() -> None:
    norm = SwitchableNorm(nn.BatchNorm2d(4), [(2, 2), (4, 4)])
    norm.select((4, 4))
    norm(_draw(8, 4, 3, 3) + 5)
    means = [v.running_mean.mean() for v in norm.versions]
    assert means[0] == 0 and means[1] > 0.3
    with pytest.raises(ModelError, match="it holds"):
        norm.select((3, 3))
