"""Global random generators, re-seeded from the step so that a resumed run draws the same numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from gossamer.core.schedule import Step

__all__ = ["preserved_generators", "seed_globals"]


def seed_globals(step: Step, name: str, *, per_rank: bool = False) -> None:
    """Seed the global generators of python, numpy and torch from ``step`` and ``name``.

    Args:
        step: Position in the run.
        name: What is about to draw (``"forward.0"``, ``"loader"``).
        per_rank: Different numbers on every rank (dropout, augmentation); else the same.
    """
    key = step.key(f"global/{step.turn}/{name}", per_rank=per_rank)
    random.seed(key)
    np.random.seed(key % 2**32)  # libraries that draw from numpy's global generator leave no other way
    torch.default_generator.manual_seed(key)  # torch.manual_seed formats a stack trace for every absent device: 0.6 ms
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(key)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(key)


@contextmanager
def preserved_generators(device: torch.device) -> Iterator[None]:
    """Restore the caller's global generators on exit."""
    state, array_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(array_state)
