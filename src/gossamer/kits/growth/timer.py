"""Time of a training step, for decisions made while training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["step_seconds"]


def step_seconds(step: Callable[[], object], repeats: int, device: torch.device, params: list[nn.Parameter]) -> float:
    """Return the median wall time in seconds of ``step`` (a forward and backward pass) over ``repeats`` calls.

    One call more comes first, untimed. The gradients it leaves on ``params`` are removed.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    taken = []
    for _ in range(repeats + 1):
        wait()
        started = time.perf_counter()
        step()
        wait()
        taken.append(time.perf_counter() - started)
        for p in params:
            p.grad = None
    return statistics.median(taken[1:])
