"""The feature losses of DCD and its baselines as pure functions.

Paper: arXiv 2212.14169 (CVPR 2023). Reference code: poopit/DCD-official at 3dbc87b1 (no licence; parts CC BY-NC-SA),
an oracle for numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gossamer.ops.adversarial import wide_mean

__all__ = ["adapted_loss", "cooperation_loss"]


def cooperation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], see: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``sum_l mean |see(S_l) - see(T_l)|``.

    Args:
        student: Connector images S_l [B, C, h, w] of the student, one a tap.
        teacher: Connector images T_l of the teacher, of the same shapes; without gradients unless they ask for them.
        see: What is compared of an image: features of the discriminator (DCD), or the image itself (baseline).

    Returns:
        Scalar >= 0, at least fp32; 0 for equal images.
    """
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        seen = see(ours)
        with torch.set_grad_enabled(torch.is_grad_enabled() and theirs.requires_grad):
            goal = see(theirs)
        terms.append(wide_mean((seen - goal).abs()))
    return torch.stack(terms).sum()


def adapted_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return ``sum_l mean (S_l - F_l)^2``: plain feature distillation.

    Args:
        student: Features of the student, brought to the teacher's channels by 1x1 convolutions [B, C, h, w].
        teacher: Features F_l of the teacher, detached.
    """
    return torch.stack([wide_mean((s - t.detach()).square()) for s, t in zip(student, teacher, strict=True)]).sum()
