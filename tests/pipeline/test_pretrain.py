"""A recipe that trains first: what pretraining leaves is the dense model, teacher and reference of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gossamer.core.errors import PlanError
from gossamer.core.method import Method
from gossamer.core.schedule import Batch, Step, Terms
from gossamer.data.images import ImageSource
from gossamer.models.store import load
from gossamer.pipeline.execute import RunResult, execute
from gossamer.pipeline.setup import set_up
from gossamer.recipe import Recipe

OPTIONS = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 16, "num_heads": 1}
RECIPE = Recipe(
    model={"name": "vit_tiny_patch16_224", "num_classes": 3, "options": OPTIONS},
    train={"pretrain": {"steps": 3, "lr": 1e-2}, "steps": 3, "batch_size": 2, "lr": 1e-3, "checkpoint_every": 1},
    export={"runtimes": ["openvino"], "batch": [1], "rounds": 2},
)


class Killed(Exception):
    """Stands for a process that dies."""


@dataclass
class Echo(Method):
    """Keeps the logits near those of the dense model; dies after a step of ``fit`` if asked."""

    touches: ClassVar[frozenset[str]] = frozenset({"loss"})
    teacher: Any = "self"
    dies_at: int | None = None

    def bind(self, dense: nn.Module) -> None:
        self.dense = dense

    def loss(self, model: nn.Module, batch: Batch, out: Any, step: Step) -> Terms:
        with torch.no_grad():
            taught = self.dense(batch["image"])
        return {"echo": (out - taught).square().mean()} if step.phase == "fit" else {}

    def after_step(self, model: nn.Module, step: Step) -> None:
        if step.phase == "fit" and step.index == self.dies_at:
            raise Killed


def _source() -> ImageSource:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    return ImageSource([str(i) for i in range(12)], [i % 3 for i in range(12)], lambda i: Image.fromarray(pixels[i]))


def _run(folder: Path, dies_at: int | None = None, resume: bool = False) -> RunResult:
    methods = [Echo(dies_at=dies_at)]
    return execute(RECIPE, folder, methods=methods, sources={"train": _source()}, progress=False, resume=resume)


def test_the_dense_model_is_the_pretrained_one_after_a_resume_too(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole")
    with pytest.raises(Killed):
        _run(tmp_path / "cut", dies_at=1)
    resumed = _run(tmp_path / "cut", resume=True)
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    fresh = set_up(RECIPE, sources={"train": _source()}).dense.state_dict()
    names = [row["name"] for row in whole.table]
    assert set(names) == {"dense", "fit", "finished"}
    dense = load(tmp_path / "whole" / "stages" / "00-dense").state_dict()
    assert not torch.equal(dense["blocks.0.mlp.fc1.weight"], fresh["blocks.0.mlp.fc1.weight"])
    assert not torch.equal(dense["blocks.0.mlp.fc1.weight"], ours["blocks.0.mlp.fc1.weight"])


def test_a_structure_that_pretraining_does_not_restore_is_refused() -> None:
    setup = set_up(RECIPE, sources={"train": _source()})
    with pytest.raises(PlanError, match="lacks 'cls_token'"):
        setup.adopt(nn.Linear(2, 2).train())
