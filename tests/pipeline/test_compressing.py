"""``compress``: objects and flags become a recipe that does the same again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from gossamer import DiffRate, ManifoldDistillation, api
from gossamer.core.errors import GossamerError, RecipeError
from gossamer.engine.checkpoint import Checkpoints
from gossamer.engine.loop import Loop
from gossamer.models.build import load_model
from gossamer.models.store import load, save
from gossamer.pipeline import compressing, setup
from gossamer.pipeline.execute import execute
from gossamer.pipeline.setup import Setup, set_up
from gossamer.recipe import Recipe

TINY = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 16, "num_heads": 1}


@pytest.fixture
def photos(tmp_path: Path) -> str:
    for c in "ab":
        (tmp_path / "photos" / c).mkdir(parents=True)
        for i in range(10):
            pixels = np.full((32, 32, 3), 10 * i, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / c / f"{i}.png")
    return f"folder:{tmp_path / 'photos'}"


def _given(call: dict[str, Any]) -> Setup:
    return set_up(call["recipe"], model=call["model"], methods=call["methods"], sources=call["sources"])


def test_the_written_recipe_splits_alike(photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(compressing, "execute", lambda recipe, folder, **rest: calls.append({"recipe": recipe, **rest}))
    saved = str(save(load_model("vit_tiny_patch16_224", num_classes=2, **TINY), tmp_path / "saved"))
    api.compress(saved, photos, ["ptq_minmax"], out=tmp_path / "o", progress=False)
    api.compress(saved, photos, ["ptq_minmax"], evaluation=photos, out=tmp_path / "o", progress=False)
    split, whole = calls
    split["recipe"].to_yaml(tmp_path / "recipe.yaml")
    ours, again = _given(split), set_up(Recipe.from_yaml(tmp_path / "recipe.yaml"))
    for ready in (ours, again):
        assert len(ready.evaluation) == 4 and len(ready.loaders["train"].source) == 16
    assert list(ours.evaluation.names) == list(again.evaluation.names)
    assert len(_given(whole).evaluation) == len(_given(whole).loaders["train"].source) == 20


def test_target_and_teacher_reach_the_methods_that_leave_them_open() -> None:
    target = {"macs": "50%", "max_drop": 1.0}
    make = lambda entry: compressing._methods([entry], "resnet18", target)[0]  # noqa: E731
    assert make("diffrate").macs == make(DiffRate()).macs == make({"diffrate": {}}).macs == "50%"
    assert make(DiffRate(macs="70%")).macs == make({"diffrate": {"macs": "60%"}}).macs.replace("6", "7") == "70%"
    assert make("manifold_distillation").teacher == "resnet18"
    taught = ManifoldDistillation(teacher=nn.Identity())
    assert isinstance(make(taught).teacher, nn.Identity)
    with pytest.raises(RecipeError, match="did you mean 'macs'"):
        make({"diffrate": {"mcas": 1}})


def test_a_target_that_two_methods_would_spend_is_refused() -> None:
    target = {"macs": "60%"}
    for methods in (["nvit", "diffrate"], [{"nvit": {}}, DiffRate()]):
        with pytest.raises(RecipeError, match="macs=60% would be the whole budget of nvit and of diffrate"):
            compressing._methods(methods, None, target)
    own = compressing._methods([{"nvit": {"macs": "80%"}}, "diffrate", "ptq_vit"], None, target)
    assert (own[0].macs, own[1].macs) == ("80%", "60%")
    stacked = {"model": {"name": "vit_tiny_patch16_224"}, "target": target}
    with pytest.raises(RecipeError, match="give each its own"):
        setup._methods(Recipe.from_dict({**stacked, "methods": [{"nvit": {}}, {"diffrate": {}}]}))
    apart = [{"nvit": {"macs": "80%"}}, {"diffrate": {}}]
    first, second = setup._methods(Recipe.from_dict({**stacked, "methods": apart}))
    assert (first.macs, second.macs) == ("80%", "60%")


class Stopped(Exception):
    """Ends a run where its training would begin."""


def test_a_refused_run_leaves_no_dense_stage_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(load_model("vit_tiny_patch16_224", num_classes=2, **TINY), tmp_path / "run" / "stages" / "00-dense")

    def stop(*args: Any) -> None:
        raise Stopped

    monkeypatch.setattr(Loop, "run", stop)
    recipe = Recipe(model={"name": "vit_tiny_patch16_224", "num_classes": 5, "options": TINY})
    with pytest.raises(Stopped):
        execute(recipe, tmp_path / "run", progress=False)
    assert load(tmp_path / "run" / "stages" / "00-dense").num_classes == 5


def test_a_finished_training_is_measured_for_its_own_recipe_only(tmp_path: Path) -> None:
    recipe = Recipe(model={"name": "vit_tiny_patch16_224", "num_classes": 2, "options": TINY})
    Checkpoints(tmp_path).write(0, 1, {"identity": {**recipe.identity(), "processes": 1}})
    save(load_model("vit_tiny_patch16_224", num_classes=2, **TINY), tmp_path / "model")
    other = Recipe(**{**recipe.model_dump(), "seed": 3})
    with pytest.raises(GossamerError, match="seed: 0 -> 3"):
        execute(other, tmp_path, resume=True, progress=False)
