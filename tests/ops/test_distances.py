"""Frechet and kernel distances against closed forms and an independent route."""

from __future__ import annotations

import pytest
import torch

from gossamer.ops.distances import frechet_distance, kernel_distance, kernel_distances, moments


def features(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=draw) * 0.3 + torch.eye(d)
    return scale * torch.randn(n, d, generator=draw) @ mix + shift


def test_frechet_is_zero_for_equal_and_closed_for_diagonal_gaussians() -> None:
    a = moments(features(500, 6, 0))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    one, two = (torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 9.0]))), (torch.ones(3), torch.eye(3))
    assert frechet_distance(one, two) == pytest.approx(3 + 0 + 1 + 4)  # |m|^2 + sum (sqrt(a) - sqrt(b))^2


def test_frechet_agrees_with_the_root_of_the_product() -> None:
    a, b = moments(features(300, 8, 1)), moments(features(400, 8, 2, 0.3, 1.4))
    roots = torch.linalg.eigvals(a[1] @ b[1]).sqrt().real.sum()
    want = (a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace() - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(float(want), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_takes_fewer_images_than_features() -> None:
    a, b = moments(features(10, 32, 3)), moments(features(12, 32, 4))
    assert frechet_distance(a, b) > 0 and frechet_distance(a, a) == pytest.approx(0, abs=1e-4)


def test_kernel_distance_is_the_double_sum() -> None:
    a, b = features(6, 4, 5).double(), features(7, 4, 6, 0.5).double()
    k = lambda x, y: float((x @ y / 4 + 1) ** 3)  # noqa: E731
    own = sum(k(a[i], a[j]) for i in range(6) for j in range(6) if i != j) / 30
    other = sum(k(b[i], b[j]) for i in range(7) for j in range(7) if i != j) / 42
    across = sum(k(x, y) for x in a for y in b) / 42
    assert kernel_distance(a, b) == pytest.approx(own + other - 2 * across, rel=1e-9)


def test_kernel_distance_is_unbiased_and_subsets_are_seeded() -> None:
    whole = features(400, 4, 7)
    found = kernel_distances(whole[:200], whole[200:], subsets=50, size=50, seed=1)
    assert abs(float(found.mean())) < 3 * float(found.std()) / 50**0.5 + 0.02
    assert torch.equal(found, kernel_distances(whole[:200], whole[200:], subsets=50, size=50, seed=1))
    assert float(kernel_distances(whole[:200], whole[200:] + 1, subsets=5, size=50).mean()) > float(found.mean())
