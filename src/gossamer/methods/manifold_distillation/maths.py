"""Manifold and logit distillation losses as pure functions of tensors.

Paper: arXiv 2107.01378 (NeurIPS 2022). Reference code: Hao840/manifold-distillation at 1096b82, no
licence file, so nothing here is taken from it; it served as an oracle for numbers. The three manifold
terms are means over matrix entries, as released (the paper writes Frobenius norms); differences are
squared and averaged in at least fp32 whatever the precision of the products, which the release is not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.core.errors import ModelError

__all__ = [
    "carry",
    "gram_distance",
    "hard_loss",
    "inter_loss",
    "intra_loss",
    "merge_patches",
    "patch_tokens",
    "random_loss",
    "soft_loss",
    "unit_tokens",
]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_tokens(x: Tensor) -> Tensor:
    """Return ``x`` [..., D] with every token of length 1 (eps 1e-12), in at least fp32."""
    return F.normalize(_wide(x), dim=-1, eps=1e-12)


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of two sets of Gram matrices.

    Args:
        student: Unit tokens [..., N, Ds].
        teacher: Unit tokens [..., N, Dt]; widths may differ, the other axes may not.

    Returns:
        Scalar in [0, 4], at least fp32: the mean over all entries of the [..., N, N] matrices. Under
        autocast only the products run in the low precision.
    """
    gap = _wide(student @ student.mT) - _wide(teacher @ teacher.mT)
    return gap.square().mean()


def intra_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the intra-image term: patches of one image among themselves.

    Args:
        student: Unit tokens [B, N, Ds].
        teacher: Unit tokens [B, N, Dt].
    """
    return gram_distance(student, teacher)


def inter_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the inter-image term: patches at one position over the images of the batch.

    Args:
        student: Unit tokens [B, N, Ds].
        teacher: Unit tokens [B, N, Dt].
    """
    return gram_distance(student.transpose(0, 1), teacher.transpose(0, 1))


def random_loss(student: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
    """Return the random-sampled term: chosen patches of the whole batch among themselves.

    Args:
        student: Unit tokens [B, N, Ds].
        teacher: Unit tokens [B, N, Dt].
        index: [K] positions in the flattened [B * N], one choice for both sides.
    """
    return gram_distance(student.flatten(0, 1)[index], teacher.flatten(0, 1)[index])


def soft_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Return ``tau^2 KL(softmax(teacher / tau) || softmax(student / tau))``, averaged over the batch.

    Args:
        student: Logits [B, K].
        teacher: Logits [B, K].
        tau: Temperature, > 0.
    """
    ours, theirs = (F.log_softmax(_wide(z) / tau, dim=1) for z in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * tau**2


def hard_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross entropy of ``student`` [B, K] against the teacher's first choice."""
    return F.cross_entropy(_wide(student), teacher.argmax(dim=1))


def patch_tokens(x: Tensor, prefix: int, grid: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int] | None]:
    """Return the patch tokens of a block output and their grid.

    Args:
        x: [B, N, C], or [B, H, W, C] from a hierarchical net.
        prefix: Leading tokens of the model that are not patches. CaiT's and XCiT's patch blocks carry
            none although the model has a class token, which shows in ``N``.
        grid: Patch grid of the model, where it is known.

    Returns:
        Tokens [B, N - prefix, C] and (rows, columns), or ``None`` if they lie on no known grid.

    Raises:
        ModelError: ``x`` has neither three nor four axes.
    """
    if x.ndim == 4:
        return x.flatten(1, 2), (x.shape[1], x.shape[2])
    if x.ndim != 3:
        raise ModelError(f"block output of shape {tuple(x.shape)}; expected [B, N, C] or [B, H, W, C]")
    for skip in (prefix, 0):
        n = x.shape[1] - skip
        if grid is not None and n == grid[0] * grid[1]:
            return x[:, skip:], grid
        if grid is None and n > 0 and math.isqrt(n) ** 2 == n:
            return x[:, skip:], (math.isqrt(n), math.isqrt(n))
    return x[:, prefix:], None


def merge_patches(x: Tensor, grid: tuple[int, int], limit: int) -> tuple[Tensor, tuple[int, int]]:
    """Concatenate the channels of ``m x m`` neighbouring patches, with the smallest ``m`` that helps.

    Args:
        x: Patch tokens [B, H * W, C].
        grid: (H, W).
        limit: Most tokens to leave.

    Returns:
        Tokens [B, H * W / m^2, C * m^2] and their grid; ``x`` itself if it already fits.

    Raises:
        ModelError: No ``m`` divides the grid so that at least 2 x 2 and at most ``limit`` tokens remain.
    """
    h, w = grid
    if h * w <= limit:
        return x, grid
    common = math.gcd(h, w)
    fits = [m for m in range(2, common + 1) if common % m == 0 and h * w // m**2 <= limit and min(h, w) // m > 1]
    if not fits:
        raise ModelError(
            f"manifold_distillation: a grid of {h} x {w} patches cannot be merged to {limit} tokens or fewer "
            f"(its common divisors are those of {common}); raise max_tokens or set it to null"
        )
    m = fits[0]
    blocks = x.unflatten(1, (h // m, m, w // m, m)).transpose(2, 3)
    return blocks.flatten(3).flatten(1, 2), (h // m, w // m)


def carry(source: Tensor, teacher: Tensor, prefix: int) -> Tensor:
    """Bring the teacher's patch tokens to a student whose tokens were pruned and merged.

    Args:
        source: [B, M, N0] membership of the student's tokens: row ``m`` is non-zero at the original
            tokens that make up token ``m``; a pruned token is in no row.
        teacher: Patch tokens [B, N0 - prefix, D].
        prefix: Leading tokens that are not patches, the same in rows and columns.

    Returns:
        [B, M - prefix, D]: gathered where pruned, averaged where merged.

    Raises:
        ModelError: The teacher's grid is not the one the student started from.
    """
    patches = source[:, prefix:, prefix:].to(teacher.dtype)
    if patches.shape[2] != teacher.shape[1]:
        raise ModelError(
            f"manifold_distillation: the student starts from {patches.shape[2]} patches, the teacher's block has "
            f"{teacher.shape[1]}; choose a teacher with the student's patch grid"
        )
    return (patches / patches.sum(-1, keepdim=True).clamp_min(1)) @ teacher
