"""Packing to bytes: native code equals plain torch bit by bit, and both keep the quantizer's promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gossamer.kernels import cpu
from gossamer.ops.group_pack import (
    arrange,
    move_range,
    no_bounds,
    pack,
    plain_move_range,
    plain_pack,
    plain_unpack,
    unpack,
)
from gossamer.ops.philox import rounding_noise, words

needs_native = pytest.mark.skipif(not cpu.available(), reason=f"native kernels {cpu.describe()}")
LEVELS = 255


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["plain", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest):
    if cpu._native is None or not cpu._native.use(request.param):
        pytest.skip(f"no {request.param} code here: native kernels {cpu.describe()}")
    yield request.param
    cpu._native.use("best")


def tensors() -> list[tuple[str, Tensor, int, int]]:
    """Return (name, tensor, dimension, groups): dense, strided, transposed, odd sizes, one element."""
    qkv = normal(3, 7, 3, 2, 5).permute(2, 0, 3, 1, 4)
    return [
        ("tokens", normal(4, 9, 24), -1, 3),
        ("flat", normal(5, 24), -1, 4),
        ("query", qkv[0], 1, 2),
        ("key", qkv[1].transpose(-2, -1), 1, 1),
        ("scores", normal(2, 6, 11, 11), 1, 3),
        ("image", normal(2, 6, 5, 5), 1, 2),
        ("channels last", normal(2, 6, 5, 5).to(memory_format=torch.channels_last), 1, 2),
        ("gaps", normal(4, 9, 24)[:, ::2, :12], -1, 2),
        ("one", normal(1, 1, 1), -1, 1),
        ("wide", normal(2, 400, 768), -1, 12),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "x", "dim", "groups"), tensors(), ids=[t[0] for t in tensors()])
def test_native_equals_plain(isa: str, name: str, x: Tensor, dim: int, groups: int, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    layout, grouped = arrange(x, dim, groups)
    ours, theirs = no_bounds(groups), no_bounds(groups)
    for _ in range(2):
        cpu.move_range(grouped, ours, 0.1)
        plain_move_range(grouped, theirs, 0.1)
        assert torch.equal(ours, theirs)
        ours, theirs = ours * 0.8, theirs * 0.8  # later values fall outside
    for noise in (None, (0x1234567890ABCD, 7)):
        codes, grid = cpu.pack(grouped, ours, LEVELS, noise)
        plain_codes, plain_grid = plain_pack(grouped, theirs, LEVELS, noise)
        assert torch.equal(codes, plain_codes)
        assert torch.equal(grid, plain_grid)
        laid = layout.grouped(codes)
        assert torch.equal(cpu.unpack(laid, grid, dtype), plain_unpack(laid, grid, dtype))


@needs_native
def test_threads_change_nothing() -> None:
    x = normal(64, 65, 96)
    _, grouped = arrange(x, -1, 3)
    results = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        bounds = no_bounds(3)
        cpu.move_range(grouped, bounds, 0.1)
        results.append((bounds, *cpu.pack(grouped, bounds, LEVELS, (3, 4))))
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def packed(x: Tensor, bounds: Tensor, noise: tuple[int, int] | None, levels: int = LEVELS) -> Tensor:
    layout, grouped = arrange(x, -1, bounds.shape[1])
    codes, grid = pack(grouped, bounds, levels, noise)
    return layout.restore(unpack(layout.grouped(codes), grid, torch.float32))


def range_of(x: Tensor, groups: int) -> Tensor:
    bounds = no_bounds(groups)
    move_range(arrange(x, -1, groups)[1], bounds, 0.1)
    return bounds


def test_groups_round_trip() -> None:
    for _, x, dim, groups in tensors():
        layout, grouped = arrange(x, dim, groups)
        flat = layout.flatten(x)
        assert torch.equal(layout.restore(flat), x)
        assert grouped.size == x.numel() and layout.groups == groups


def test_error_bounds() -> None:
    x = normal(40, 24)
    bounds = range_of(x, 3)
    step = (bounds[0] / LEVELS).repeat_interleave(8)
    assert ((packed(x, bounds, None) - x).abs() <= step / 2 * 1.001).all()
    assert ((packed(x, bounds, (1, 2)) - x).abs() <= step * 1.001).all()
    assert ((packed(x, bounds, (1, 2)) - x).abs() > step / 2).any()


@pytest.mark.parametrize("levels", [15, 255])
def test_stochastic_rounding_is_unbiased(levels: int) -> None:
    x, draws = normal(4, 6), 4000
    bounds = range_of(x, 2)
    mean = sum(packed(x, bounds, (5, call), levels) for call in range(draws)) / draws
    step = (bounds[0] / levels).repeat_interleave(3)
    assert ((mean - x).abs() < 5 * 0.5 * step / math.sqrt(draws)).all()
    nearest = packed(x, bounds, None, levels)
    assert (nearest - x).abs().max() > (mean - x).abs().max()


def test_values_outside_are_clipped_on_both_sides() -> None:
    bounds = torch.tensor([[1.0], [0.0]])
    x = torch.tensor([[-5.0, 0.0, 0.5, 1.0, 7.0]])
    assert torch.allclose(packed(x, bounds, None), torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]), atol=0.5 / LEVELS)


@pytest.mark.parametrize("value", [0.0, 3.25, -1e-30])
def test_a_constant_group_comes_back_as_beta(value: float) -> None:
    x = torch.cat([torch.full((5, 4), value), normal(5, 4)], dim=1)
    back = packed(x, range_of(x, 2), (1, 1))
    assert torch.equal(back[:, :4], x[:, :4]) and torch.isfinite(back).all()


def test_half_the_range_of_a_lagging_group_still_clips_in_bfloat16() -> None:
    x = normal(8, 16).bfloat16()
    bounds = range_of(x, 1) * 0.5
    back = packed(x, bounds, (1, 1))
    assert back.min() >= bounds[1].item() - 1e-6 and back.max() <= bounds.sum().item() + 1e-6


def test_the_random_numbers_are_philox() -> None:
    # known answers of the Random123 library for philox4x32-10
    zero = [int(w) for w in words(torch.tensor([0]), 0, 0, rounds=10)]
    assert zero == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_is_uniform_and_differs_between_calls() -> None:
    a, b = rounding_noise(100_000, 1, 1), rounding_noise(100_000, 1, 2)
    assert a.abs().max() < 0.5 and abs(a.mean()) < 0.004 and abs(a.var() - 1 / 12) < 0.001
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.01
    assert torch.equal(a, rounding_noise(100_000, 1, 1)) and torch.equal(a[:777], rounding_noise(777, 1, 1))


def test_no_global_generator_is_touched() -> None:
    state = torch.get_rng_state()
    packed(normal(4, 6), torch.ones(2, 2), (1, 2))
    plain_pack(arrange(normal(4, 6), -1, 2)[1], torch.ones(2, 2), LEVELS, (1, 2))
    assert torch.equal(state, torch.get_rng_state())
