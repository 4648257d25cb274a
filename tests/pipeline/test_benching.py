"""``bench`` keeps models apart, whatever they are called."""

from __future__ import annotations

import pytest
from torch import nn

from gossamer import api
from gossamer.models.build import load_model

TINY = {"img_size": 32, "patch_size": 16, "num_heads": 1}


def test_ratios_are_against_the_first_model_even_where_names_are_alike() -> None:
    slow = load_model("vit_tiny_patch16_224", num_classes=2, depth=8, embed_dim=64, **TINY)
    fast = load_model("vit_tiny_patch16_224", num_classes=2, depth=1, embed_dim=16, **TINY)
    first, second = api.bench([slow, fast], [1], 1, "torch", precision="f32", rounds=3)
    assert (first["model"], second["model"]) == ("VisionTransformer 1", "VisionTransformer 2")
    assert first["ratio"] == first["ratio_best_dense"] == pytest.approx(1.0)
    assert second["ratio_best_dense"] == second["ratio"] > 1.5


def test_a_module_without_timms_configuration_needs_none() -> None:
    (row,) = api.bench(nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2)), 2, 1, "torch", precision="f32")
    assert row["model"] == "Sequential" and row["batch"] == 2
