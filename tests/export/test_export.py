"""Exports end to end: files, proof, refusals, batches."""

import errno
import json
import shutil
from collections import namedtuple

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from gossamer.core.errors import ModelError, RecipeError, RunError, StateError
from gossamer.export.exporting import export, export_once, read_artefact
from gossamer.export.verify import parity, sensitivity, verify
from gossamer.models.preprocessing import preprocessing
from gossamer.ops.int8 import Int8Linear
from gossamer.runtimes import get
from gossamer.runtimes.session import int8_share

FORMATS = ("onnx", "openvino")
RUNTIME = {"onnx": "onnxruntime", "openvino": "openvino"}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [1, 3, "dynamic"])
def test_float_model(vit, tmp_path, format, batch):
    artefact = export(vit, tmp_path, format=format, batch=batch)
    assert artefact.parity["relative"] < 1e-4 and not artefact.int8
    session = get(RUNTIME[format]).load(artefact.graph, precision="f32")
    for count in (batch,) if isinstance(batch, int) else (1, 2, 5):
        images = torch.randn(count, 3, 64, 64)
        with torch.no_grad():
            np.testing.assert_allclose(session.run(images.numpy()), vit(images).numpy(), atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [2, "dynamic"])
def test_8_bit_model_runs_int8_kernels_attention_included(vit8, tmp_path, format, batch):
    artefact = export(vit8, tmp_path, format=format, batch=batch)
    assert artefact.int8 and artefact.parity["relative"] <= artefact.parity["tolerance"]
    session = get(RUNTIME[format]).load(tmp_path, precision="f32", profile=True)
    for _ in range(2):
        session.run(np.random.default_rng(0).standard_normal((2, 3, 64, 64), dtype=np.float32))
    assert int8_share(session.profile(), by="count") == 1.0


@pytest.mark.parametrize("format", FORMATS)
def test_8_bit_files_are_small(small_vit, in_8_bits, tmp_path, format):
    wide = {"embed_dim": 192, "depth": 2}
    dense = export(small_vit(**wide), tmp_path / "dense", format=format)
    small = export(in_8_bits(small_vit(**wide)), tmp_path / "int8", format=format)
    assert small.size < 0.36 * dense.size


def test_fp16_weights_halve_the_file_and_leave_int8_alone(vit, vit8, tmp_path):
    dense = export(vit, tmp_path / "a", format="openvino")
    half = export(vit, tmp_path / "b", format="openvino", fp16=True)
    assert half.fp16 and half.size < 0.7 * dense.size
    plain = export(vit8, tmp_path / "c", format="openvino")
    both = export(vit8, tmp_path / "d", format="openvino", fp16=True)
    assert both.size <= plain.size
    assert both.parity["relative"] < 5e-2
    with pytest.raises(RecipeError, match="OpenVINO IR only"):
        export(vit, tmp_path / "e", format="onnx", fp16=True)


def test_folder_describes_itself(vit, tmp_path):
    artefact = export(vit, tmp_path / "m", format="onnx", batch=2, opset=21)
    assert {f.name for f in (tmp_path / "m").iterdir()} == {"model.onnx", "preprocessing.json", "export.json"}
    data = json.loads((tmp_path / "m" / "export.json").read_text())
    assert (data["version"], data["opset"], data["batch"], data["format"]) == (1, 21, 2, "onnx")
    assert onnx.load(artefact.graph).opset_import[0].version == 21
    again = read_artefact(tmp_path / "m")
    assert again == artefact and again.preprocessing == preprocessing(vit)


def test_once_is_once(vit, tmp_path):
    first = export_once(vit, tmp_path, format="onnx", batch=1)
    stamp = first.graph.stat().st_mtime_ns
    assert export_once(vit, tmp_path, format="onnx", batch=1).graph.stat().st_mtime_ns == stamp
    assert export_once(vit, tmp_path, format="onnx", batch=2).batch == 2


def test_training_mode_and_half_precision_are_not_disturbed(small_vit, tmp_path):
    model = small_vit(depth=1).half().train()
    export(model, tmp_path, format="onnx")
    assert model.training and next(model.parameters()).dtype == torch.float16


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_dinov2"])
def test_variants(small_vit, tmp_path, name):
    patch = {"img_size": 56} if "14" in name else {}
    artefact = export(small_vit(name, depth=1, **patch), tmp_path, format="openvino", batch=2)
    assert artefact.parity["relative"] < 1e-4


def test_newer_and_broken_descriptions_are_refused(vit, tmp_path):
    export(vit, tmp_path, format="onnx")
    file = tmp_path / "export.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"version": 99}))
    with pytest.raises(StateError, match="version 99"):
        read_artefact(tmp_path)
    file.write_text("{")
    with pytest.raises(ModelError, match="export again"):
        read_artefact(tmp_path)
    file.write_text(json.dumps(data))
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(ModelError, match=r"model\.onnx is missing"):
        read_artefact(tmp_path)
    with pytest.raises(ModelError, match="written by gossamer"):
        read_artefact(tmp_path / "nowhere")


def test_bad_choices_are_refused(vit, tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'openvino'"):
        export(vit, tmp_path, format="openvin")
    for batch in (0, -1, True, "free"):
        with pytest.raises(RecipeError, match="allowed are 1, 2"):
            export(vit, tmp_path, batch=batch)
    with pytest.raises(RecipeError, match="opset=11"):
        export(vit, tmp_path, opset=11)
    with pytest.raises(ModelError, match="example of shape"):
        export(vit, tmp_path, batch=2, example=torch.zeros(1, 3, 64, 64))


def test_no_disk(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10, 9, 1))
    with pytest.raises(RunError, match="MiB of disk"):
        export(vit, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_disk_that_fills_while_writing(vit, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gossamer.export.onnx.ir.save", full)
    with pytest.raises(RunError, match=r"writing failed \(No space left on device\); free some disk"):
        export(vit, tmp_path / "m")
    assert not (tmp_path / "m" / "export.json").exists()


def test_models_that_cannot_be_traced_are_refused(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    with pytest.raises(ModelError, match="Branching cannot be exported"):
        export(Branching().eval(), tmp_path, format="onnx")


def test_proof_fails_when_graph_and_model_differ(vit, small_vit, tmp_path):
    artefact = export(vit, tmp_path, format="onnx", batch=2)
    images = torch.randn(2, 3, 64, 64)
    assert verify(artefact, vit, images, runtime="openvino").relative < 1e-4
    with torch.no_grad():
        vit.head.weight.mul_(1.1)
    with pytest.raises(RunError, match="differs from torch by"):
        verify(artefact, vit, images)
    assert parity(np.full((2, 3), np.nan), np.ones((2, 3)), 1e-3).relative != 0
    with pytest.raises(ModelError, match="training mode"):
        verify(artefact, vit.train(), images)


def test_sensitivity_counts_the_rounding_of_biases_and_leaves_them_alone():
    layer = Int8Linear.from_scales(nn.Linear(4, 3), 0.5, 1.0)
    with torch.no_grad():
        layer.weight.fill_(100)
        layer.bias.fill_(0.2)  # steps of 0.5: rounded to 0
    images = torch.zeros(1, 4)
    assert sensitivity(layer, images) == pytest.approx(1.0)
    torch.testing.assert_close(layer(images), torch.full((1, 3), 0.2))


def test_sensitivity_is_tiny_without_rounding(vit):
    assert sensitivity(vit, torch.randn(2, 3, 64, 64)) < 1e-4
