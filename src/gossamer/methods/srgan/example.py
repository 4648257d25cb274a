"""A small case of SRGAN: an SRResNet of one block against a narrow judge."""

from __future__ import annotations

import torch
from torch import nn

from gossamer.core.schedule import Batch, Step
from gossamer.kits.example import MethodExample
from gossamer.methods.srgan.method import SRGAN
from gossamer.models.build import load_model
from gossamer.tasks.super_resolution import SuperResolution

__all__ = ["example", "pairs", "tiny_generator"]

SIDE = 8


def tiny_generator() -> nn.Module:
    """Return a seeded SRResNet x2 of one block of four channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_model("srresnet_x2", depth=1, width=4, img_size=SIDE)


def pairs(step: Step, count: int = 2) -> Batch:
    """Return a batch of random images [B, 3, 8, 8] in [0, 1] and targets of twice the size; a loader."""
    draw = step.generator("example.pairs", per_rank=True)
    target = torch.rand(count, 3, 2 * SIDE, 2 * SIDE, generator=draw)
    image = nn.functional.avg_pool2d(target, 2)
    return {"image": image, "target": target, "id": [f"{step.phase}-{step.index}-{n}" for n in range(count)]}


def example() -> MethodExample:
    """Return the example; without the judge, with the recipe's own loss, it is plain training."""
    return MethodExample(
        method=lambda: SRGAN(width=4),
        neutral=lambda: SRGAN(width=4, adversarial=0.0, content="task"),
        model=tiny_generator,
        loaders={"train": pairs, "search": pairs, "all": pairs, "calibration": pairs},
        task=SuperResolution(scale=2),
    )
