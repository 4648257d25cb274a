"""A small case of DRNet: two steps at all of three sizes, then three of joint training, on a narrow PreAct ResNet-8."""

from __future__ import annotations

import torch
from torch import nn

from gossamer.kits.example import MethodExample
from gossamer.methods.drnet.method import DRNet
from gossamer.models.build import load_model

__all__ = ["example", "tiny_resnet"]


def tiny_resnet() -> nn.Module:
    """Return a seeded PreAct ResNet-8 of four channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_model("preact_resnet8", num_classes=10, width=4)


def example() -> MethodExample:
    """Return the example; one size, the network's own, changes nothing."""
    return MethodExample(
        method=lambda: DRNet(predictor="small", macs="80%", tau_end=0.5, multires_steps=2, count_batches=2),
        neutral=lambda: DRNet(sizes=[32]),
        model=tiny_resnet,
    )
