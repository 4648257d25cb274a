"""Distances between two sets of images, given as features: Frechet (FID) and kernel (KID).

FID: arXiv 1706.08500, equation 6. KID: arXiv 1801.01401, section 4 (cubic kernel, unbiased estimator).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["frechet_distance", "kernel_distance", "kernel_distances", "moments"]


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [D] and unbiased covariance [D, D] of features [N, D], N >= 2, in float64."""
    wide = features.double()
    return wide.mean(0), torch.cov(wide.T).reshape(wide.shape[1], wide.shape[1])


def frechet_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Return ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` of two Gaussians, each (mean, covariance).

    The trace of the root is that of ``(R C_b R)^(1/2)`` with ``R = C_a^(1/2)``, which is symmetric: eigenvalues
    are real, and tiny negative ones (singular covariances) count 0. At least 0 up to rounding.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a.double())
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    inner = root @ cov_b.double() @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    gap = (mean_a.double() - mean_b.double()).square().sum()
    return float(gap + cov_a.double().trace() + cov_b.double().trace() - 2 * cross)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Return the unbiased squared maximum mean discrepancy of features [N, D] and [M, D] under ``(x y / D + 1)^3``.

    May be below 0 where the sets hardly differ.
    """
    a, b = a.double(), b.double()
    n, m, d = len(a), len(b), a.shape[1]
    within_a, within_b, across = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    own = (within_a.sum() - within_a.trace()) / (n * (n - 1)) + (within_b.sum() - within_b.trace()) / (m * (m - 1))
    return float(own - 2 * across.mean())


def kernel_distances(a: Tensor, b: Tensor, *, subsets: int, size: int, seed: int = 0) -> Tensor:
    """Return ``kernel_distance`` of random subsets [subsets], as KID is published (mean and spread of them).

    Args:
        a: Features [N, D].
        b: Features [M, D].
        subsets: How many pairs of subsets.
        size: Images of a subset, 2 to min(N, M); drawn without repetition.
        seed: Seed of the draws.
    """
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        picks = (torch.randperm(len(x), generator=draw)[:size].to(x.device) for x in (a, b))
        found.append(kernel_distance(*(x[p] for x, p in zip((a, b), picks, strict=True))))
    return torch.tensor(found, dtype=torch.float64)
