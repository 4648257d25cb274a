"""Every kind of bad input ends in one clear line on stderr and the right exit code."""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from gossamer import api, cli
from gossamer.models.build import load_model

TINY = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
NAME = "vit_tiny_patch16_224"


@pytest.fixture
def refused(monkeypatch):
    """Return ``refused(*words, code=2) -> the error line``."""
    monkeypatch.delenv("GOSSAMER_DEBUG", raising=False)

    def run(*words: object, code: int = 2) -> str:
        result = CliRunner().invoke(cli.app, [str(w) for w in words])
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
        assert len(errors) == 1 and "Traceback" not in result.stderr
        assert result.stderr.strip().splitlines()[-1] == errors[0]
        return errors[0]

    return run


def _tiny(num_classes: int = 3):
    torch.manual_seed(0)
    return load_model(NAME, num_classes=num_classes, **TINY)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of three classes with four pictures each."""
    rng = np.random.default_rng(0)
    for c in "abc":
        (tmp_path / "photos" / c).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / c / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def saved(tmp_path) -> Path:
    return api.save(_tiny(), tmp_path / "saved")


@pytest.fixture
def recipe(tmp_path, photos):
    """Return ``recipe(**changes) -> path`` of a small recipe; a change of None drops the key."""

    def write(**changes: object) -> Path:
        content = {
            "name": "bad",
            "model": {"name": NAME, "num_classes": 3, "options": TINY},
            "data": {"train": f"folder:{photos}", "eval": f"folder:{photos}"},
            "methods": [],
            "train": {"steps": 2, "batch_size": 4},
            "export": {"batch": [1]},
        }
        content.update(changes)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return path

    return write


def test_unknown_model(refused):
    assert "did you mean" in refused("cost", "vit_tinny_patch16_224")


def test_unknown_method(refused, saved, photos):
    line = refused("compress", "--model", saved, "--data", f"folder:{photos}", "--method", "ptq_vitt")
    assert "did you mean 'ptq_vit'" in line


def test_unknown_option_of_a_method(refused, saved, photos):
    line = refused("compress", "--model", saved, "--data", f"folder:{photos}", "--method", "diffrate:mcas=60%")
    assert "did you mean 'macs'" in line


def test_unknown_recipe_key(refused, recipe):
    assert "batch_size" in refused("run", recipe(train={"steps": 1, "batchsize": 4}))


def test_wrong_type_in_a_recipe(refused, recipe):
    line = refused("run", recipe(train={"steps": "many"}))
    assert "steps" in line and "many" in line


def test_missing_recipe(refused, tmp_path):
    assert "nowhere.yaml" in refused("run", tmp_path / "nowhere.yaml")


def test_budget_no_schedule_can_meet(refused, recipe, tmp_path):
    line = refused("run", recipe(methods=[{"diffrate": {"macs": "1%"}}]), "--out", tmp_path / "o")
    assert "1%" in line and "%" in line.split("1%", 1)[1]


def test_class_count_different_from_the_head(refused, photos, tmp_path):
    two = api.save(_tiny(2), tmp_path / "two")
    line = refused("evaluate", two, "--data", f"folder:{photos}")
    assert "3" in line and "2" in line


def test_empty_data_folder(refused, saved, tmp_path):
    (tmp_path / "none").mkdir()
    assert "none" in refused("evaluate", saved, "--data", f"folder:{tmp_path / 'none'}")


def test_unknown_kind_of_data(refused, saved):
    assert "did you mean 'folder'" in refused("evaluate", saved, "--data", "flder:x")


def test_unreadable_checkpoint(refused, tmp_path):
    bad = tmp_path / "w.safetensors"
    bad.write_bytes(b"nonsense")
    assert "w.safetensors" in refused("cost", f"{NAME}@{bad}")


def test_checkpoint_of_another_architecture(refused, saved):
    weights = next(Path(saved).glob("*.safetensors"))
    refused("cost", f"resnet18@{weights}")


def test_pickle_instead_of_safetensors(refused, tmp_path):
    bad = tmp_path / "w.safetensors"
    bad.write_bytes(pickle.dumps({"a": 1}))
    assert "pickle" in refused("cost", f"{NAME}@{bad}")


def test_torch_checkpoint_instead_of_safetensors(refused, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    assert "safetensors" in refused("cost", f"{NAME}@{tmp_path / 'w.pth'}")


def test_newer_file_format(refused, saved):
    path = Path(saved) / "model.json"
    content = json.loads(path.read_text())
    key = next(k for k in ("version", "format_version") if k in content)
    path.write_text(json.dumps({**content, key: 99}))
    assert "99" in refused("cost", saved)


def test_no_disk_for_the_export(refused, saved, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = refused("export", saved, "--out", tmp_path / "out", code=1)
    assert "disk" in line or "space" in line


def test_missing_runtime(refused, saved, photos, monkeypatch):
    real = importlib.import_module

    def missing(name, *args):
        if name.partition(".")[0] == "openvino":
            raise ImportError("No module named 'openvino'", name="openvino")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    line = refused("evaluate", saved, "--data", f"folder:{photos}", "--runtime", "openvino")
    assert "pip install" in line and "openvino" in line


def test_missing_runtime_of_an_export(refused, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    line = refused("export", saved, "--out", tmp_path / "out", "--format", "onnx")
    assert "pip install onnxruntime" in line and not (tmp_path / "out").exists()


def test_int8_of_a_model_that_no_method_takes(refused, photos, tmp_path):
    model = api.save(load_model("cait_xxs24_224", num_classes=3, depth=1, img_size=32), tmp_path / "m")
    line = refused("export", model, "--out", tmp_path / "o", "--format", "onnx", "--int8", "--data", f"folder:{photos}")
    assert "ptq_minmax" in line and "ptq_vit" in line


def test_unknown_runtime(refused, saved, photos):
    line = refused("evaluate", saved, "--data", f"folder:{photos}", "--runtime", "openvin")
    assert "did you mean 'openvino'" in line


def test_an_unfinished_run_in_the_output_folder(refused, recipe, tmp_path, monkeypatch):
    from gossamer.engine import loop

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "o"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_phase", stop)
        refused("run", recipe(), "--out", out, code=130)
    assert "--resume" in refused("run", recipe(), "--out", out)


def test_calibrating_with_zero_images(refused, recipe, tmp_path):
    line = refused("run", recipe(methods=[{"ptq_vit": {"images": 0}}]), "--out", tmp_path / "o")
    assert "images" in line


def test_a_non_finite_loss(refused, recipe, tmp_path):
    settings = {"steps": 8, "batch_size": 4, "lr": 1e30, "weight_decay": 0.0, "clip_grad": None}
    line = refused("run", recipe(train=settings), "--out", tmp_path / "o", code=1)
    assert "finite" in line and "step" in line


def test_two_methods_that_exclude_each_other(refused, recipe, tmp_path):
    line = refused("run", recipe(methods=[{"ptq_vit": {}}, {"ptq_minmax": {}}]), "--out", tmp_path / "o")
    assert "precision" in line


def test_a_method_for_training_without_training(refused, saved, photos, tmp_path):
    words = ["--method", "manifold_distillation", "--method", "ptq_minmax", "--teacher", "self"]
    line = refused("compress", "--model", saved, "--data", f"folder:{photos}", *words, "--out", tmp_path / "o")
    assert "ManifoldDistillation" in line and "train.steps" in line


def test_an_unmet_bound_exits_1(refused, saved, photos, tmp_path):
    line = refused("export", saved, "--out", tmp_path / "e", "--format", "onnx", "--min-speedup", "1000", code=1)
    assert "1000" in line


SR = {"name": "edsr_baseline_x2", "options": {"depth": 1, "width": 4, "img_size": 8}}


def test_a_scale_the_model_lacks(refused, recipe, tmp_path):
    line = refused("run", recipe(model=SR, task={"super_resolution": {"scale": 3}}), "--out", tmp_path / "o")
    assert "scale 3 was asked for" in line and "enlarges by 2" in line


def test_images_smaller_than_a_patch(refused, recipe, tmp_path):
    line = refused("run", recipe(model=SR, task={"super_resolution": {"patch": 48}}), "--out", tmp_path / "o")
    assert "40x40 pixels, smaller than a patch of 96x96" in line


def test_an_unknown_task(refused, recipe, tmp_path):
    line = refused("run", recipe(model=SR, task="super_resoluton"), "--out", tmp_path / "o")
    assert "did you mean 'super_resolution'" in line


def test_a_picture_that_is_none(refused, tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    model = api.save(load_model(SR["name"], **SR["options"]), tmp_path / "sr")
    assert "cannot be read" in refused("upscale", tmp_path / "a.png", tmp_path / "b.png", "--model", model)
