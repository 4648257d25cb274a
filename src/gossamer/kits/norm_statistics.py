"""Batch norms' running statistics: left alone for a pass, or taken anew for a model whose layers changed since."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import DataError
from gossamer.ops.modes import evaluating

__all__ = ["norms_frozen", "reestimate_norms"]


@contextmanager
def norms_frozen(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Let batch norms in training mode use batch statistics without updating their running ones."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats] if active else []
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace running means and variances by the averages over ``batches``; all else runs as in evaluation.

    Args:
        model: Any module; its modes stay.
        batches: Images [B, ...], each a batch of its own with the same weight.

    Returns:
        Number of norms that took new statistics.

    Raises:
        DataError: No batch.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta = [m.momentum for m in norms]
    count = 0
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's cumulative average
                norm.training = True
            for images in batches:
                model(images)
                count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not count:
        raise DataError("batch norms: no batch to take statistics from; give at least one")
    return len(norms)
