"""``gossamer export``: 8 bits by the method that offers itself, and the bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gossamer import api
from gossamer.core.errors import RunError
from gossamer.kits.example import tiny_vit
from gossamer.ops.adder_layers import AdderConv2d
from gossamer.runtimes import get, int8_share


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten classes with two pictures each."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for c in "abcdefghij":
        (folder / c).mkdir()
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / c / f"{i}.png")
    return folder


def test_int8_runs_int8_kernels_and_keeps_the_accuracy_asked_for(photos: Path, tmp_path: Path) -> None:
    found = api.export(tiny_vit(), tmp_path, "onnx", int8=True, data=f"folder:{photos}", max_drop=100.0, batch=4)
    (artefact,) = found["artefacts"]
    assert not found["unmet"] and "notes" not in found and {"top1_before", "top1"} <= artefact.keys()
    session = get("onnxruntime").load(artefact["graph"], profile=True)
    session.run(torch.zeros(4, 3, 32, 32).numpy())
    assert int8_share(session.profile(), by="count") > 0.9


def test_layers_without_a_kernel_in_any_runtime_are_said_to_be_slow(tmp_path: Path) -> None:
    net = torch.nn.Sequential(AdderConv2d(3, 2, 3), torch.nn.BatchNorm2d(2)).eval()
    net.pretrained_cfg = {"input_size": (3, 8, 8)}
    assert "no runtime has an adder kernel" in api.export(net, tmp_path, "onnx")["notes"]


def test_an_unmet_speed_is_a_failure_and_the_artefact_stays(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="1000.0 were asked for"):
        api.export(tiny_vit(), tmp_path, "onnx", min_speedup=1000.0, batch=2)
    assert (tmp_path / "onnx" / "model.onnx").is_file()
