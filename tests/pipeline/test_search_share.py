"""A share of the training images is held out for searches."""

from __future__ import annotations

import numpy as np
from PIL import Image

from gossamer.core.schedule import Step
from gossamer.data.images import ImageSource
from gossamer.pipeline.setup import set_up
from gossamer.recipe import Recipe

OPTIONS = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 16, "num_heads": 1}


def _setup(share: float, epochs: float = 2):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    names = [str(i) for i in range(20)]
    source = ImageSource(names, [i % 3 for i in range(20)], lambda i: Image.fromarray(pixels[i]), list("abc"))
    model = {"name": "vit_tiny_patch16_224", "num_classes": 3, "options": OPTIONS}
    recipe = Recipe(
        model=model, data={"search_share": share, "mixup": 0.8}, train={"epochs": epochs, "batch_size": 2}, seed=5
    )
    return set_up(recipe, sources={"train": source})


def _epoch(setup, name: str, images: int) -> set[str]:
    steps = [Step("p", "main", i, images // 2) for i in range(images // 2)]
    return {n for s in steps for n in setup.loaders[name](s)["id"]}


def test_loaders_read_disjoint_parts() -> None:
    setup = _setup(0.3)
    train, search = _epoch(setup, "train", 14), _epoch(setup, "search", 6)
    assert len(train) == 14 and len(search) == 6 and not train & search
    assert _epoch(setup, "all", 20) == train | search
    assert setup.plan[0].steps == 14  # two epochs of the rest


def test_search_images_are_neither_mixed_nor_augmented() -> None:
    setup = _setup(0.3)
    again = setup.loaders["search"](Step("other", "main", 0, 3))
    assert again["target"].ndim == 1 and setup.loaders["train"](Step("p", "main", 0, 7))["target"].ndim == 2
    images = {}
    for i in range(6):
        batch = setup.loaders["search"](Step("p", "main", i, 6))
        for name, image in zip(batch["id"], batch["image"], strict=True):
            assert name not in images or (images[name] == image).all()
            images[name] = image
    assert len(images) == 6


def test_without_a_share_searches_read_the_training_images() -> None:
    setup = _setup(0.0)
    assert _epoch(setup, "search", 20) == _epoch(setup, "train", 20) and setup.plan[0].steps == 20
