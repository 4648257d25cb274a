"""Random weights for a model that exists already."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["initialise"]


def initialise(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter of ``model`` a fresh random value, in place; torch's own random state stays.

    Layers reset themselves, then the model's own ``init_weights`` (timm) has the last word.

    Args:
        model: The model.
        seed: Seed of the draw.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        own: Any = getattr(model, "init_weights", None)
        if callable(own):
            own()
    return model
