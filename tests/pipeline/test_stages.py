"""Stages of a run are kept, named and rebuilt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import timm
import torch
from torch import nn

from gossamer.core.method import Method
from gossamer.core.schedule import Phase
from gossamer.core.stack import Stack
from gossamer.pipeline.stages import StageFolder, stage_title


@dataclass
class Learner(Method):
    """Adds a loss term only."""

    touches: ClassVar[frozenset[str]] = frozenset({"loss"})


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=3)


def test_titles_name_the_method_that_only_adds_a_loss() -> None:
    assert stage_title("fit", [Learner()]) == "fine-tuned with Learner"
    assert stage_title("fit", []) == "fine-tuned"
    assert stage_title("strange.search", []) == "strange.search"


def test_a_work_phase_and_an_empty_phase_leave_no_stage(tmp_path: Path) -> None:
    from gossamer.models.build import load_model

    options = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
    model = load_model("vit_tiny_patch16_224", num_classes=3, **options)
    keeper = StageFolder(tmp_path, Stack())
    keeper.keep(0, "dense", model, edited=False)
    keeper.on_phase_end(0, Phase("calibrate", 3, work=lambda m, loaders, step: None), model)
    keeper.on_phase_end(1, Phase("fit", 0), model)
    keeper.on_phase_end(2, Phase("fit", 4), model)
    assert [s.name for s in keeper.stages()] == ["dense", "fit"]
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(keeper.stages()[1].model()(x), model.eval()(x))


def test_titles_say_which_stages_hold_the_average(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    keeper = StageFolder(tmp_path, Stack(), savable=False, average=0.99)
    keeper.keep(0, "dense", model, edited=False)
    keeper.on_phase_end(0, Phase("fit.a", 1), model)
    keeper.on_phase_end(1, Phase("fit.b", 1), model)
    keeper.keep(99, "finished", model)
    assert [s.title for s in keeper.stages()] == ["dense", "fine-tuned", "fine-tuned, EMA 0.99", "finished, EMA 0.99"]
    keeper.average = None
    assert "EMA" not in keeper.stages()[-1].title


def test_a_module_only_its_owner_can_build_is_kept_in_memory(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    keeper = StageFolder(tmp_path, Stack(), savable=False)
    keeper.keep(0, "dense", model, edited=False)
    before = model[1].weight.detach().clone()
    with torch.no_grad():
        model[1].weight.zero_()
    kept = keeper.stages()[0].model()
    assert torch.equal(kept[1].weight, before)
    assert not list(tmp_path.iterdir())
