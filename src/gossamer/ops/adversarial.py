"""Adversarial objectives and Gram matrices as pure functions.

GAN: arXiv 1406.2661; least squares: arXiv 1611.04076; hinge: arXiv 1705.02894. Gram matrices of feature maps:
arXiv 1603.08155, equation 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.core.errors import RecipeError, nearest

__all__ = ["GAN_KINDS", "check_gan", "fooling_loss", "gram", "judging_loss", "wide_mean"]

GAN_KINDS = ("lsgan", "hinge", "vanilla")


def check_gan(kind: str) -> None:
    """Raise ``RecipeError`` for a kind of adversarial loss that is not in ``GAN_KINDS``."""
    if kind not in GAN_KINDS:
        raise RecipeError(f"gan={kind!r}; allowed are {', '.join(GAN_KINDS)}{nearest(kind, GAN_KINDS)}")


def wide_mean(x: Tensor) -> Tensor:
    """Return the mean of ``x`` in at least fp32 (scores and differences are averaged so under autocast)."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).mean()


def judging_loss(scores: Tensor, *, real: bool, kind: str) -> Tensor:
    """Return what a discriminator minimises on one side.

    Args:
        scores: Its scores of any shape, without a final activation.
        real: Whether the images were real.
        kind: ``"lsgan"``: mean (s - t)^2 with t = 1 for real, 0 for fake. ``"hinge"``: mean max(0, 1 - s) for
            real, max(0, 1 + s) for fake. ``"vanilla"``: cross-entropy of the logistic function.

    Returns:
        Scalar >= 0, at least fp32.
    """
    if kind == "lsgan":
        return wide_mean((scores - float(real)).square())
    if kind == "hinge":
        return wide_mean(F.relu(1 - scores if real else 1 + scores))
    check_gan(kind)
    return wide_mean(F.softplus(-scores if real else scores))


def fooling_loss(scores: Tensor, kind: str) -> Tensor:
    """Return what a generator minimises: the scores of its images should be those of real ones.

    Args:
        scores: Scores of generated images, without a final activation.
        kind: As in ``judging_loss``; for ``"hinge"`` minus the mean score, which has no bound.
    """
    return -wide_mean(scores) if kind == "hinge" else judging_loss(scores, real=True, kind=kind)


def gram(x: Tensor) -> Tensor:
    """Return the Gram matrices [B, C, C] of feature maps [B, C, H, W], divided by C H W."""
    flat = x.flatten(2)
    return flat @ flat.mT / (flat.shape[1] * flat.shape[2])
