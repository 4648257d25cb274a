"""A small case of AdderNet for the conformance suite: the l_p schedule, statistics taken anew, bytes at the end."""

from __future__ import annotations

import torch
from torch import nn

from gossamer.kits.example import CLASSES, MethodExample
from gossamer.methods.addernet.method import AdderNet
from gossamer.models.build import load_model

__all__ = ["example"]


def _resnet() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_model("resnet8_cifar", num_classes=CLASSES, width=8)


def example() -> MethodExample:
    """Return the example; a network whose filters are drawn anew has no neutral setting."""
    return MethodExample(method=lambda: AdderNet(gradient="lp", bits=8), model=_resnet, tolerance=0.02)
