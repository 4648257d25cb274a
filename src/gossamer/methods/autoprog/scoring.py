"""What a candidate costs and how well it does, measured without a trace on the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.schedule import Batch
from gossamer.cost.ledger import cost as ledger
from gossamer.kits.growth.timer import step_seconds
from gossamer.tasks.classification import logits_of

__all__ = ["buffers_kept", "measured_cost", "training_losses"]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(logits_of(model(batch["image"])).float(), batch["target"])


def training_losses(
    model: nn.Module, batches: Iterable[Batch], networks: Sequence[Callable[[], AbstractContextManager[None]]]
) -> list[list[float]]:
    """Return the cross-entropy of each batch in training mode, without gradients, under each of ``networks``.

    A network is a context in which ``model`` is that sub-network. Each batch is drawn once.
    """
    model.train()
    rows: list[list[Tensor]] = [[] for _ in networks]
    with torch.no_grad():
        for batch in batches:
            for row, network in zip(rows, networks, strict=True):
                with network():
                    row.append(_loss(model, batch))
    return [torch.stack(row).tolist() for row in rows]


def measured_cost(kind: str, model: nn.Module, batch: Batch, repeats: int) -> float:
    """Return the seconds of a forward and backward pass (``"time"``), or the MACs of one image (``"macs"``)."""
    if kind == "macs":
        return float(ledger(model, batch["image"][:1]).macs)
    params = list(model.parameters())
    model.train()
    return step_seconds(lambda: _loss(model, batch).backward(), repeats, params[0].device, params)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore every buffer on exit: a pass in training mode must not move running statistics."""
    kept = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
