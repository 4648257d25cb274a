"""Two models on the same images: what a few hundred pictures can tell about their difference."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import DataError

__all__ = ["Paired", "bootstrap_difference", "compare", "mcnemar_exact", "mean_kl", "wilson"]


def wilson(hits: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion, in [0, 1] (Wilson 1927, JASA 22, p. 209)."""
    if not 0 <= hits <= total or total == 0:
        raise DataError(f"{hits} of {total} is no proportion; expected 0 <= hits <= total and total >= 1")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, scale = hits / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / scale
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / scale
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == total else centre + half)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Return the two-sided exact McNemar p-value (binomial test of the discordant pairs at 1/2).

    Args:
        only_a: Images that only the first model gets right.
        only_b: Images that only the second model gets right.
    """
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def bootstrap_difference(
    right_a: Tensor, right_b: Tensor, *, rounds: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of accuracy b minus accuracy a, in points.

    Images are drawn with both models' answers to them (Efron and Tibshirani 1993, section 13.3).

    Args:
        right_a: [N] bool, whether the first model is right.
        right_b: [N] bool, whether the second model is right.
        rounds: Bootstrap samples.
        confidence: Coverage of the interval.
        seed: Seed of the draws.
    """
    delta = right_b.double() - right_a.double()
    n = delta.numel()
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([delta[torch.randint(n, (n,), generator=generator)].mean() for _ in range(rounds)])
    low, high = torch.quantile(means, torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.double))
    return 100.0 * float(low), 100.0 * float(high)


def mean_kl(reference: Tensor, logits: Tensor) -> float:
    """Return the mean over images of KL(softmax(reference) || softmax(logits)), in nats.

    Args:
        reference: [N, K] logits of the reference model.
        logits: [N, K] logits of the other model.
    """
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@dataclass(frozen=True)
class Paired:
    """Model b against reference model a on the same images.

    Attributes:
        images: Number of images.
        top1_a: Accuracy of a, in [0, 1].
        top1_b: Accuracy of b, in [0, 1].
        difference_points: ``100 * (top1_b - top1_a)``.
        interval_points: 95 % paired bootstrap interval of ``difference_points``.
        agreement: Share of images with the same top-1 answer, in [0, 1].
        both: Images both get right.
        only_a: Images only a gets right.
        only_b: Images only b gets right.
        neither: Images neither gets right.
        p_value: Exact two-sided McNemar p-value.
        kl: Mean KL(a || b) of the class probabilities, nats.
    """

    images: int
    top1_a: float
    top1_b: float
    difference_points: float
    interval_points: tuple[float, float]
    agreement: float
    both: int
    only_a: int
    only_b: int
    neither: int
    p_value: float
    kl: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {**asdict(self), "interval_points": list(self.interval_points)}


def compare(a: Tensor, b: Tensor, targets: Tensor, *, rounds: int = 2000, seed: int = 0) -> Paired:
    """Compare two models' logits on the same images.

    Args:
        a: [N, K] logits of the reference.
        b: [N, K] logits of the other model.
        targets: [N] class indices.
        rounds: Bootstrap samples.
        seed: Seed of the bootstrap.

    Raises:
        DataError: Shapes differ or there are no images.
    """
    if a.shape != b.shape or len(targets) != len(a) or not len(a):
        raise DataError(
            f"cannot pair logits {list(a.shape)} and {list(b.shape)} with {len(targets)} targets; "
            f"evaluate both models on the same images (at least 1)"
        )
    answer_a, answer_b = a.argmax(1), b.argmax(1)
    right_a, right_b = answer_a == targets, answer_b == targets
    n = len(targets)
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    both = int((right_a & right_b).sum())
    return Paired(
        images=n,
        top1_a=int(right_a.sum()) / n,
        top1_b=int(right_b.sum()) / n,
        difference_points=100.0 * (only_b - only_a) / n,
        interval_points=bootstrap_difference(right_a, right_b, rounds=rounds, seed=seed),
        agreement=int((answer_a == answer_b).sum()) / n,
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=n - both - only_a - only_b,
        p_value=mcnemar_exact(only_a, only_b),
        kl=mean_kl(a, b),
    )
