"""Pictures of pruned and merged patches come from a really reduced model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from torch import nn

from gossamer.core import registry
from gossamer.core.stack import Stack
from gossamer.data.images import ImageSource
from gossamer.models.build import load_model
from gossamer.models.preprocessing import preprocessing
from gossamer.report.photos import photo_maps


@dataclass
class _Stage:
    module: nn.Module

    def model(self) -> nn.Module:
        return self.module


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return load_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=3, embed_dim=32, num_heads=2)


@pytest.fixture
def source():
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    return ImageSource(
        [f"{i}.png" for i in range(3)], [0, 1, 2], lambda i: Image.new("RGB", (80, 64), colours[i]), classes=list("abc")
    )


def _token_room() -> str:
    return next(m.name for m in registry.methods().values() if "tokens" in m.touches and m.status == "baseline")


def test_maps_show_fewer_groups_block_by_block(dense, source):
    pre = preprocessing(dense)
    stack = Stack([registry.build(_token_room(), {"r": 3})])
    reduced = stack.finish(stack.prepare(copy.deepcopy(dense)))
    maps = photo_maps([_Stage(dense), _Stage(reduced)], source, pre, count=2)
    assert len(maps) == 2 and maps[0]["image"].startswith("data:image/jpeg;base64,")
    assert maps[0]["label"] == "a" and maps[0]["dense"] in "abc"
    counts = [len({v for row in b["grid"] for v in row}) for b in maps[0]["blocks"]]
    assert counts == [13, 10, 7]
    assert all(len(b["grid"]) == 4 and len(b["grid"][0]) == 4 for b in maps[0]["blocks"])


def test_dense_models_have_no_maps(dense, source):
    assert photo_maps([_Stage(dense)], source, preprocessing(dense)) == []
