"""What a room shows of its method: a small case in which it works, for checks and for readers.

Every room has ``example.py`` with ``example() -> MethodExample``. The conformance suite builds all its
checks from it, so an example must be small (a few steps, well under a second each) and exact: the same
call gives the same weights and the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gossamer.core.method import Method
from gossamer.core.schedule import Batch, Loader, Phase, Step
from gossamer.models.build import load_model
from gossamer.tasks.classification import Classification
from gossamer.tasks.image_translation import ImageTranslation
from gossamer.tasks.task import Task

__all__ = ["MethodExample", "noise", "picture_pairs", "tiny_generator", "tiny_vit", "translation_example"]

CLASSES = 10
SIDE = 32


def tiny_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    """Return a small, seeded timm ViT for 32 x 32 images and 10 classes (about 0.1 M parameters)."""
    small: dict[str, Any] = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_model(name, num_classes=CLASSES, **small)
        for p in model.parameters():  # timm's fresh heads and tokens are nearly zero, which hides faults
            if p.ndim > 1:
                nn.init.normal_(p, std=0.15)
    return model


def noise(step: Step, batch_size: int = 4) -> Batch:
    """Return a batch of random images [B, 3, 32, 32] and labels; a loader."""
    draw = step.generator("example.noise", per_rank=True)
    return {
        "image": torch.randn(batch_size, 3, SIDE, SIDE, generator=draw),
        "target": torch.randint(CLASSES, (batch_size,), generator=draw),
        "id": [f"{step.phase}-{step.index}-{n}" for n in range(batch_size)],
    }


@dataclass(frozen=True)
class MethodExample:
    """A small case of a method.

    Attributes:
        method: Returns a fresh method, with options small enough for a test.
        model: Returns a fresh model, always with the same weights; buildable by ``load_model``.
        neutral: Returns the method in a setting in which it must change nothing; ``None`` if it has none.
        plan: The recipe's own phases; the method adds its own.
        loaders: Loaders by name; each batch a function of the step.
        tolerance: Largest difference between the finished model in torch and exported, relative to the
            largest logit.
        task: What the model is trained for.
    """

    method: Callable[[], Method]
    model: Callable[[], nn.Module] = tiny_vit
    neutral: Callable[[], Method] | None = None
    plan: tuple[Phase, ...] = (Phase("fit", 3),)
    loaders: Mapping[str, Loader] = field(
        default_factory=lambda: {"train": noise, "search": noise, "all": noise, "calibration": noise}
    )
    tolerance: float = 1e-4
    task: Task = field(default_factory=Classification)


def tiny_generator(width: int = 4) -> nn.Module:
    """Return a small, seeded translation generator for 32 x 32 pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_model("mobile_resnet_3blocks", width=width, img_size=SIDE)
        for p in model.parameters():  # fresh weights are nearly zero, which hides faults
            if p.ndim > 1:
                nn.init.normal_(p, std=0.15)
    return model


def picture_pairs(step: Step, batch_size: int = 2) -> Batch:
    """Return random pictures of two domains, ``image`` and ``target`` [B, 3, 32, 32] in [-1, 1]; a loader."""
    draw = step.generator("example.pairs", per_rank=True)
    first, second = (2 * torch.rand(batch_size, 3, SIDE, SIDE, generator=draw) - 1 for _ in range(2))
    return {"image": first, "target": second, "id": [f"{step.phase}-{step.index}-{n}" for n in range(batch_size)]}


def translation_example(
    method: Callable[[], Method],
    neutral: Callable[[], Method] | None = None,
    model: Callable[[], nn.Module] = tiny_generator,
    *,
    paired: bool = True,
    steps: int = 3,
) -> MethodExample:
    """Return an example of image translation on random pictures."""
    loaders = {name: picture_pairs for name in ("train", "search", "all", "calibration")}
    task = ImageTranslation(paired=paired)
    return MethodExample(method, model, neutral, (Phase("fit", steps),), loaders, task=task)
