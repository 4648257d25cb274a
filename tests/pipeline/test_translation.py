"""A generator through the same pipeline as any model: trained, narrowed, exported, measured, shown, evaluated."""

from __future__ import annotations

import pytest

import gossamer as gs
from gossamer.core.errors import DataError, RecipeError
from gossamer.engine.loop import Loop
from gossamer.models.generators import Generator
from gossamer.pipeline.execute import RunResult
from gossamer.pipeline.setup import set_up
from gossamer.tasks.task import in_evaluation

pytestmark = pytest.mark.filterwarnings("ignore:FID of")


def recipe(**changes) -> gs.Recipe:
    small = {
        "model": {"name": "mobile_resnet_3blocks", "options": {"width": 4, "img_size": 32}},
        "data": {"train": "grey:embedded:search[0:8]", "eval": "grey:embedded:eval[0:4]"},
        "methods": [{"dcd": {"width": 2, "layers": 1, "ndf": 4, "lambda_style": 0.0, "lambda_feature": 0.0}}],
        "train": {"steps": 2, "batch_size": 2, "lr": 2e-4, "schedule": "linear", "hold": 0.5},
        "export": {"runtimes": ["onnxruntime"], "formats": ["onnx"], "batch": [1], "rounds": 2},
    }
    return gs.Recipe(**{**small, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> RunResult:
    return gs.run(recipe(), out=tmp_path_factory.mktemp("translation") / "run", progress=False)


def test_the_table_names_the_network_of_its_figures(done: RunResult) -> None:
    dense, finished = (next(r for r in done.table if r["name"] == n) for n in ("dense", "finished"))
    assert finished["metric"]["name"] == "FID of vit_tiny_patch16_224 features" and finished["score"] > 0
    assert finished["extractor"] == "vit_tiny_patch16_224" and finished["generated"] == 4
    assert finished["macs"] < dense["macs"] / 2 and finished["file_bytes"] < dense["file_bytes"]
    assert -1 <= finished["paired"]["feature_cosine"] <= 1


def test_the_report_shows_input_stages_and_real_pictures(done: RunResult) -> None:
    page = done.report.read_text(encoding="utf-8")
    assert "FID of vit_tiny_patch16_224 features" in page
    for title in ("input", "dense", "real"):
        assert f"<b>{title}</b>" in page


def test_a_finished_generator_is_evaluated_in_torch_and_in_a_runtime(done: RunResult) -> None:
    data = "grey:embedded:eval[0:4]"
    folder = done.run_dir / "model"
    torch_, onnx = (gs.evaluate(str(folder), data, runtime=r, batch=2) for r in ("torch", "onnxruntime"))
    assert torch_["fid"] == pytest.approx(onnx["fid"], rel=1e-2) and torch_["l1"] == pytest.approx(onnx["l1"], rel=1e-3)
    assert isinstance(gs.load(folder), Generator) and gs.load(folder).width == 2
    loose = gs.evaluate(str(folder), "embedded:eval[0:4] -> embedded:search[0:3]")
    assert (loose["generated"], loose["real"]) == (4, 3) and "l1" not in loose
    with pytest.raises(DataError, match="names no pairs"):
        gs.evaluate(str(folder), "embedded:eval")
    with pytest.raises(RecipeError, match="inception@pt_inception-2015-12-05.safetensors"):
        gs.evaluate(str(folder), data, task={"image_translation": {"extractor": "inception"}})


def test_domains_of_different_sizes() -> None:
    data = {"train": "embedded:search[0:5] -> embedded:search[5:8]", "eval": "embedded:eval[0:4] -> embedded:eval[4:6]"}
    ready = set_up(recipe(data=data, methods=[{"cyclegan": {"layers": 1, "ndf": 4, "pool": 2}}]))
    model = Loop(ready.stack, ready.task, ready.loaders, ready.plan, settings=ready.recipe.train).run(ready.model)
    assert ready.evaluation is not None
    found = ready.task.evaluate(in_evaluation(model), ready.task.batches(ready.evaluation, ready.preprocessing, 3))
    row = found.to_json()
    assert (row["generated"], row["real"]) == (4, 2) and "l1" not in row
    with pytest.raises(DataError, match="5 pictures in .* and 3 in"):
        set_up(recipe(data={"train": data["train"].replace("->", "=>")}))


@pytest.mark.parametrize("method", ["dcd", "pix2pix"])
def test_adversarial_methods_without_training_are_refused(method: str) -> None:
    options = {"layers": 1, "lambda_style": 0.0, "lambda_feature": 0.0} if method == "dcd" else {"layers": 1}
    with pytest.raises(RecipeError, match="the recipe trains none"):
        set_up(recipe(methods=[{method: options}], train={}))


def test_a_progressive_run_without_pairs_is_planned() -> None:
    own = {"width": 2, "paired": False, "layers": 1, "ndf": 4, "cycles": 2, "lambda_style": 0.0, "lambda_feature": 0.0}
    found = gs.plan(recipe(task={"image_translation": {"paired": False}}, methods=[{"dcd": own}]))
    names = [row["phase"] for row in found["phases"]]
    assert names == [f"dcd.{who}.{k}" for k in (0, 1) for who in ("teacher", "student")]
    assert found["estimated_seconds_known"] > 0


def test_a_feature_network_without_weights_is_refused_before_anything_runs() -> None:
    with pytest.raises(RecipeError, match="inception@pt_inception-2015-12-05.safetensors"):
        set_up(recipe(task={"image_translation": {"extractor": "inception"}}))
