"""Adder convolutions: native code equals plain torch, gradients follow their rules, layers keep their promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core.errors import ModelError
from gossamer.kernels import adder_cpu, cpu
from gossamer.kernels.adder_shape import RULES, AdderShape
from gossamer.ops.adder import (
    adder_conv2d,
    adder_linear,
    plain_codes,
    plain_forward,
    plain_input_grad,
    plain_weight_grad,
)
from gossamer.ops.adder_layers import AdderConv2d, AdderLinear, Int8AdderConv2d, SharedGrid, shared_grid

# batch, channels, height, width, filters, kernel, stride, padding
SHAPES = [
    (2, 16, 9, 7, 16, (3, 3), (1, 1), (1, 1)),
    (1, 5, 8, 8, 37, (3, 3), (2, 2), (1, 1)),
    (3, 18, 7, 5, 33, (1, 1), (2, 2), (0, 0)),
    (2, 3, 11, 12, 10, (5, 3), (3, 1), (2, 0)),
    (1, 40, 6, 6, 8, (2, 2), (1, 2), (0, 1)),
    (2, 4, 7, 7, 5, (2, 3), (3, 2), (0, 0)),
    (5, 9, 1, 1, 3, (1, 1), (1, 1), (0, 0)),
]
ONE_TAP = [
    (2, 18, 13, 9, 33, (1, 1), (2, 2), (0, 0)),
    (1, 5, 3, 141, 9, (1, 1), (1, 2), (0, 0)),
    (2, 16, 9, 67, 8, (1, 1), (1, 1), (0, 0)),
    (1, 9, 16, 25, 5, (1, 1), (2, 3), (0, 0)),
]
POWERS = [1.0, 1.3, 2.0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(sizes: tuple) -> tuple[Tensor, Tensor, AdderShape, Tensor]:
    n, c, h, w, o, kernel, stride, padding = sizes
    x, weight = normal(n, c, h, w), normal(o, c, *kernel, seed=1)
    shape = AdderShape.of(x, weight, stride, padding)
    return x, weight, shape, normal(n, o, *shape.out, seed=2)


@pytest.fixture(params=["plain", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest):
    if cpu._native is None or not cpu._native.use(request.param):
        pytest.skip(f"no {request.param} code here: native kernels {cpu.describe()}")
    yield request.param
    cpu._native.use("best")


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Compare with the largest magnitude as the measure."""
    torch.testing.assert_close(ours, theirs, atol=tolerance * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_native_equals_plain(isa: str, sizes: tuple, last: bool) -> None:
    x, weight, shape, grad = case(sizes)
    exact = (x.double(), weight.double(), shape)
    if last:
        x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
    for p in POWERS:
        out = adder_cpu.forward(x, weight, shape, p)
        close(out, plain_forward(*exact, p).float())
        assert out.stride() == shape.empty_output(x).stride()
        for rule in RULES:
            close(
                adder_cpu.input_grad(grad, x, weight, shape, rule, p),
                plain_input_grad(grad.double(), *exact, rule, p).float(),
            )
            close(
                adder_cpu.weight_grad(grad, x, weight, shape, rule, p),
                plain_weight_grad(grad.double(), *exact, rule, p).float(),
            )


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("sizes", SHAPES + ONE_TAP, ids=str)
def test_native_codes_are_exact(isa: str, sizes: tuple, last: bool) -> None:
    x, weight, shape, _ = case(sizes)
    grid = SharedGrid(0.0213, 131)
    codes = (torch.round(weight / grid.step) + grid.zero).clamp(0, 255).to(torch.uint8)
    gain, shift = normal(shape.filters, seed=3), normal(shape.filters, seed=4)
    if last:
        x = x.to(memory_format=torch.channels_last)
    for affine in ((torch.ones_like(gain), torch.zeros_like(shift)), (gain, shift)):
        ours = adder_cpu.forward_codes(x, codes, shape, *grid, affine)
        assert torch.equal(ours, plain_codes(x, codes, shape, *grid, affine))
    sums = -adder_cpu.forward_codes(x, codes, shape, *grid, (torch.ones_like(gain), torch.zeros_like(shift)))
    assert torch.equal(sums, sums.round()) and sums.max() > 255


def test_packed_filters_follow_their_tensor() -> None:
    if not cpu.available():
        pytest.skip(f"native kernels {cpu.describe()}")
    x, weight, shape, _ = case(SHAPES[0])
    codes = (weight * 40 + 128).clamp(0, 255).to(torch.uint8)
    affine = (torch.ones(shape.filters), torch.zeros(shape.filters))
    before = adder_cpu.forward_codes(x, codes, shape, 0.02, 128, affine)
    codes.zero_()
    after = adder_cpu.forward_codes(x, codes, shape, 0.02, 128, affine)
    assert not torch.equal(before, after)
    assert torch.equal(after, plain_codes(x, codes, shape, 0.02, 128, affine))


def test_threads_change_nothing() -> None:
    if not cpu.available():
        pytest.skip(f"native kernels {cpu.describe()}")
    x, weight, shape, grad = case((4, 32, 20, 20, 40, (3, 3), (1, 1), (1, 1)))
    one, _, one_tap, _ = case((3, 32, 41, 41, 40, (1, 1), (1, 1), (0, 0)))
    codes, affine = (weight[:, :, :1, :1] * 40 + 128).to(torch.uint8), (torch.ones(40), torch.zeros(40))
    before, results = torch.get_num_threads(), []
    for threads in (1, 7):
        torch.set_num_threads(threads)
        results.append([
            adder_cpu.forward(x, weight, shape, 1.0),
            adder_cpu.input_grad(grad, x, weight, shape, "clamp", 1.0),
            adder_cpu.weight_grad(grad, x, weight, shape, "sign", 1.0),
            adder_cpu.forward_codes(x, (weight * 40 + 128).to(torch.uint8), shape, 0.025, 128, affine),
            adder_cpu.forward_codes(one, codes, one_tap, 0.025, 128, affine),
        ])  # fmt: skip
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_difference_gradients_are_two_convolutions(sizes: tuple) -> None:
    x, weight, shape, grad = (t.double() if isinstance(t, Tensor) else t for t in case(sizes))
    x.requires_grad_(), weight.requires_grad_()
    adder_conv2d(x, weight, shape.stride, shape.padding, clip=False).backward(grad)
    close(x.grad, plain_input_grad(grad, x.detach(), weight.detach(), shape, "difference", 1.0), 1e-12)
    close(weight.grad, plain_weight_grad(grad, x.detach(), weight.detach(), shape, "difference", 1.0), 1e-12)


@pytest.mark.parametrize("p", [1.25, 1.7, 2.0])
def test_lp_gradients_are_the_derivatives(p: float) -> None:
    x, weight, shape, _ = case((2, 3, 5, 5, 4, (3, 3), (2, 2), (1, 1)))
    inputs = (x.double().requires_grad_(), weight.double().requires_grad_())
    run = lambda x, w: adder_conv2d(x, w, shape.stride, shape.padding, p=p, gradient="lp", clip=False)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)


def test_at_two_it_is_a_convolution_up_to_norms() -> None:
    x, weight, shape, grad = case(SHAPES[0])
    x.requires_grad_(), weight.requires_grad_()
    out = adder_conv2d(x, weight, padding=1, p=2.0, gradient="lp", clip=False)
    squares = F.conv2d(x.square(), torch.ones_like(weight[:1]), padding=1)
    close(
        out.detach(),
        (2 * F.conv2d(x, weight, padding=1) - weight.square().sum((1, 2, 3)).view(1, -1, 1, 1) - squares).detach(),
    )
    out.backward(grad)
    lp = (x.grad.clone(), weight.grad.clone())
    x.grad = weight.grad = None
    adder_conv2d(x, weight, padding=1, clip=False).backward(grad)
    close(lp[0], 2 * x.grad), close(lp[1], 2 * weight.grad)  # twice the surrogate


def test_no_derivative_of_the_input_exceeds_one() -> None:
    x, weight = 5 * normal(1, 3, 1, 1), 5 * normal(8, 3, 1, 1, seed=1)
    x.requires_grad_()
    for gradient in ("full", "lp", "sign"):
        for o in range(8):
            (slope,) = torch.autograd.grad(adder_conv2d(x, weight, p=1.8, gradient=gradient)[0, o, 0, 0], x)
            assert slope.abs().max() <= 1
    (slope,) = torch.autograd.grad(adder_conv2d(x, weight, clip=False)[0, 0, 0, 0], x)
    assert slope.abs().max() > 1


finite = st.integers(-4000, 4000).map(lambda n: n / 1000)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), shift=finite, factor=finite)
def test_invariants(seed: int, shift: float, factor: float) -> None:
    x, weight = normal(2, 6, 5, 5, seed=seed), normal(4, 6, 3, 3, seed=seed + 1)
    out = adder_conv2d(x, weight)
    assert out.max() <= 0
    close(adder_conv2d(x + shift, weight + shift), out, 1e-4)
    close(adder_conv2d(factor * x, factor * weight), abs(factor) * out + 0.0, 1e-4)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    close(adder_conv2d(x[:, order], weight[:, order]), out)
    other = normal(2, 6, 5, 5, seed=seed + 2)
    reach = F.conv2d((x - other).abs(), torch.ones(1, 6, 3, 3))
    assert ((adder_conv2d(other, weight) - out).abs() <= reach * (1 + 1e-4)).all()
    close(adder_conv2d(x.roll(1, 2), weight)[:, :, 1:], out[:, :, :-1])
    pixel = x[:1, :, :1, :1]
    close(adder_conv2d(pixel, weight[:1, :, :1, :1]), adder_conv2d(weight[:1, :, :1, :1], pixel))


def test_zero_only_where_patch_and_filter_are_equal() -> None:
    x = normal(1, 4, 6, 6)
    out = adder_conv2d(x + 1000, x[:, :, 2:5, 1:4] + 1000)[0, 0]  # no cancellation far from 0 either
    assert out[2, 1] == 0 and (out < 0).sum() == out.numel() - 1


def test_half_precision_is_summed_in_float32() -> None:
    x, weight = normal(1, 2048, 3, 3).half() * 40, normal(4, 2048, 3, 3, seed=1).half() * 40
    out = adder_conv2d(x, weight)
    assert out.dtype == torch.float32 and bool(torch.isfinite(out).all()) and out.min() < -65504


def test_linear_is_a_convolution_of_one_pixel() -> None:
    layer, x = AdderLinear(7, 5, bias=True), normal(2, 3, 7)
    expected = -torch.cdist(x, layer.weight[None], p=1) + layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert adder_linear(x[0, 0], layer.weight).shape == (5,)


def test_evaluation_is_always_l1() -> None:
    layer, x = AdderConv2d(3, 4, 3, p=2.0), normal(1, 3, 5, 5)
    trained, evaluated = layer.train()(x), layer.eval()(x)
    torch.testing.assert_close(evaluated, adder_conv2d(x, layer.weight))
    assert not torch.allclose(trained, evaluated)


def test_operators_keep_torch_s_contract() -> None:
    x, weight, shape, grad = case(SHAPES[0])
    args = ([1, 1], [1, 1])
    inputs = (x.requires_grad_(), weight.requires_grad_())
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.gossamer.adder_conv2d, (*inputs, *args, 1.0, "clamp", "difference"), test_utils=tests
    )
    for op in (torch.ops.gossamer.adder_conv2d_input_grad, torch.ops.gossamer.adder_conv2d_weight_grad):
        torch.library.opcheck(op, (grad, x.detach(), weight.detach(), *args, "sign", 1.0), test_utils=tests[::2])
    codes, ones = torch.randint(0, 255, weight.shape, dtype=torch.uint8), torch.ones(len(weight))
    op = torch.ops.gossamer.adder_conv2d_codes
    torch.library.opcheck(op, (x.detach(), codes, *args, 0.1, 9, ones, ones), test_utils=tests[::2])


# -- 8 bits ----------------------------------------------------------------------------------------
def test_eight_bits_come_close_and_take_the_norm() -> None:
    layer, x = AdderConv2d(8, 12, 3, padding=1), normal(4, 8, 9, 9).relu()
    grid = shared_grid(x, layer.weight)
    eight = Int8AdderConv2d.of(layer, grid)
    exact = layer.eval()(x).detach()
    assert (eight(x) - exact).norm() < 0.01 * exact.norm()
    gain, shift = normal(12, seed=5), normal(12, seed=6)
    eight.scale_outputs(gain, shift)
    expected = exact * gain.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    assert (eight(x) - expected).norm() < 0.02 * expected.norm()


def test_the_grid_cuts_tails_that_are_not_worth_their_range() -> None:
    x, weight = normal(100_000), torch.cat([normal(100_000, seed=1), torch.tensor([9.0])])
    low, high = float(min(x.min(), weight.min())), 9.0
    grid = shared_grid(x, weight)
    assert grid.step < 0.95 * (high - low) / 255 and 0 < grid.zero < 255
    assert shared_grid(x.relu(), weight.abs()).zero == 0
    rare = shared_grid(x, torch.cat([weight, torch.full((50,), 40.0)]))
    assert rare.step * (255 - rare.zero) > 35  # many far values are kept


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adder_conv2d(normal(1, 3, 4, 4), normal(2, 4, 3, 3)), "expected .N, C, H, W."),
        (lambda: adder_conv2d(normal(1, 3, 2, 2), normal(2, 3, 3, 3)), "smaller than the filters"),
        (lambda: adder_conv2d(normal(1, 3, 4, 4), normal(2, 3, 3, 3), p=3), "p=3; allowed are 1..2"),
        (lambda: adder_linear(normal(2, 3), normal(4, 5)), "expected ...., I. and .O, I."),
        (lambda: AdderConv2d(3, 4, 3, gradient="exact"), "allowed are full, lp, sign"),
        (lambda: AdderConv2d.like(torch.nn.Conv2d(4, 4, 3, groups=2)), "groups=2"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        call()
