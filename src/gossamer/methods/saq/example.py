"""A small case of SAQ: four steps of search on a narrow PreAct ResNet-8, then the recipe's own training."""

from __future__ import annotations

import torch
from torch import nn

from gossamer.kits.example import MethodExample
from gossamer.methods.saq.method import SAQ
from gossamer.models.build import load_model

__all__ = ["example", "tiny_resnet"]


def tiny_resnet() -> nn.Module:
    """Return a seeded PreAct ResNet-8 of four channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_model("preact_resnet8", num_classes=10, width=4)


def example() -> MethodExample:
    """Return the example; 32 bits and radius 0 are the plain model."""
    return MethodExample(
        method=lambda: SAQ(search=True, search_steps=3, warmup=0.34, candidates=2, derive_batches=1, band=0.2),
        neutral=lambda: SAQ(bits=32, first_last_bits=32, rho=0.0),
        model=tiny_resnet,
        tolerance=0.02,
    )
