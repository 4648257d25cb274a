"""What a run measures: runtimes, batch sizes, torch beside them; and what it writes besides."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.core.errors import RecipeError
from gossamer.export.artefact import read_artefact
from gossamer.kits.example import tiny_vit
from gossamer.models.preprocessing import preprocessing
from gossamer.pipeline.measure import measure
from gossamer.pipeline.stages import Stage
from gossamer.recipe import ExportSettings, Recipe
from gossamer.tasks.classification import Classification


def test_the_finished_model_is_written_in_every_form_asked_for(tmp_path: Path) -> None:
    model = tiny_vit().eval()
    stages = [Stage("dense", "dense", tmp_path / "00-dense", model)]
    settings = ExportSettings(
        formats=["onnx"], batch=["dynamic", 2], runtimes=["onnxruntime"], opset=21, rounds=3, threads=1
    )
    (row,) = measure(stages, None, preprocessing(model), Classification(), tmp_path, settings)
    timed = row.row()["latency"]["2"]
    assert timed["ratio_fp32"] == pytest.approx(1.0) and timed["ratio_torch"] > 0
    found = {p.name: read_artefact(p) for p in tmp_path.iterdir()}
    assert {(a.batch, a.opset) for a in found.values()} == {("dynamic", 21), (2, 21)}


@pytest.mark.parametrize("batch", [[], ["dynamic"], [0]])
def test_something_must_be_measurable(batch: list[int | str]) -> None:
    with pytest.raises(RecipeError, match="batch size above 0"):
        Recipe(model="vit_tiny_patch16_224", export={"batch": batch})
