"""A small case of FQSR: an EDSR of one block at 4 bits, its end on the grids of deployment."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gossamer.core.schedule import Batch, Step
from gossamer.kits.example import MethodExample
from gossamer.methods.fqsr.method import FQSR
from gossamer.models.build import load_model
from gossamer.tasks.super_resolution import SuperResolution

__all__ = ["example", "pairs", "tiny_edsr"]

SIDE = 8


def tiny_edsr(**options: Any) -> nn.Module:
    """Return a seeded EDSR x2 of one block of four channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_model("edsr_baseline_x2", **{"depth": 1, "width": 4, "img_size": SIDE, **options})


def pairs(step: Step, count: int = 2, side: int = SIDE) -> Batch:
    """Return a batch of random images [B, 3, 8, 8] in [0, 1] and targets of twice the size; a loader."""
    draw = step.generator("example.pairs", per_rank=True)
    target = torch.rand(count, 3, 2 * side, 2 * side, generator=draw)
    image = nn.functional.avg_pool2d(target, 2)
    return {"image": image, "target": target, "id": [f"{step.phase}-{step.index}-{n}" for n in range(count)]}


def example() -> MethodExample:
    """Return the example; 32 bits everywhere is the plain model."""
    return MethodExample(
        method=lambda: FQSR(
            weight_bits=4, input_bits=4, output_bits=4, warmup=2, deployment="midtread", deployment_share=0.34
        ),
        neutral=lambda: FQSR(weight_bits=32, input_bits=32, output_bits=32, warmup=1),
        model=tiny_edsr,
        loaders={"train": pairs, "search": pairs, "all": pairs, "calibration": pairs},
        tolerance=0.02,
        task=SuperResolution(scale=2),
    )
