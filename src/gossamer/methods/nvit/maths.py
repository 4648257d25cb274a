"""Formulas of NViT: averaging of scores, the latency term, the two teachers' losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

__all__ = ["RELEASED_SECONDS", "average", "hard_label_loss", "kl_loss", "less_latency"]

RELEASED_SECONDS = 0.0808166 * 12
"""Latency of the dense DeiT-B in the released table; ``eta`` is per such a second, whatever the device."""
Scores = dict[str, Tensor]


def average(old: Mapping[str, Tensor], new: Mapping[str, Tensor], momentum: float) -> Scores:
    """Return ``momentum * old + (1 - momentum) * new``, or ``new`` where there is nothing old yet (release)."""
    return {k: momentum * old[k] + (1 - momentum) * v if k in old else v.clone() for k, v in new.items()}


def less_latency(
    scores: Mapping[str, Tensor], keep: Mapping[str, Tensor], gains: Mapping[str, float], eta: float
) -> Scores:
    """Return ``s - eta * (Lat(dims) - Lat(dims with one unit less))`` (eq. 8); pruned units start from 0.

    Args:
        scores: Averaged scores [units] by structure.
        keep: Masks.
        gains: Latency saved by one unit less, as a share of the dense model's, by structure.
        eta: Weight, per second of the released dense model.
    """
    return {k: s * keep[k] - eta * RELEASED_SECONDS * gains.get(k, 0.0) for k, s in scores.items()}


def kl_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) at a temperature: summed over classes, mean over the batch, without T^2.

    The release averages over classes as well: its 1e5 on 1000 classes is 100 here.

    Args:
        student: Logits [B, K].
        teacher: Logits [B, K].
        temperature: Above 0.
    """
    ours, theirs = (x.float() / temperature for x in (student, teacher))
    return F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")


def hard_label_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropy of ``student`` [B, K] against the teacher's first choice (arXiv 2012.12877, eq. 3)."""
    return F.cross_entropy(student.float(), teacher.argmax(-1))
