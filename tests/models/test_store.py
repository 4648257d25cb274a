"""Saved models come back identical, without training code, and damaged or newer ones are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gossamer.core import registry
from gossamer.core.errors import ModelError, RunError, StateError
from gossamer.core.method import Method
from gossamer.core.stack import Stack
from gossamer.cost.ledger import cost
from gossamer.models import store
from gossamer.models.build import load_model, preprocessing
from gossamer.ops.grids import LayerGrids
from gossamer.ops.int8 import int8_layer

TINY = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 4}
NAME = "vit_tiny_patch16_224"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@dataclass
class PackHead(Method):
    """Replaces the head by integer codes."""

    bits: int = 8
    teacher: nn.Module | None = None
    stage = "precision"
    touches = frozenset({"precision"})

    def finish(self, model):
        return {"bits": self.bits}

    def apply(self, model, edit):
        step = model.head.weight.detach().abs().max() / (2 ** edit["bits"] - 1)
        model.head = int8_layer(model.head, LayerGrids(edit["bits"], 8, "odd"), step, 0.02)
        return model


@pytest.fixture
def packing(monkeypatch):
    """A stack of the toy method, known to the registry as ``pack_head``."""
    monkeypatch.setattr(registry, "name_of", lambda method: "pack_head")
    monkeypatch.setattr(registry, "build", lambda name, options: {"pack_head": PackHead}[name](**options))
    return Stack([PackHead(teacher=nn.Linear(2, 2))])


def test_plain_model_round_trip(tmp_path: Path):
    model = load_model(NAME, **TINY)
    store.save(model, tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["model.json", "model.safetensors"]
    again = load_model(str(tmp_path / "m"))
    assert torch.equal(again(IMAGES), model(IMAGES)) and not again.training
    assert preprocessing(again) == preprocessing(model) and again.gossamer_source == model.gossamer_source
    with pytest.raises(ModelError, match="is complete"):
        load_model(str(tmp_path / "m"), num_classes=3)


def test_a_changed_model_without_its_stack_is_refused_when_it_is_saved(tmp_path: Path, packing):
    model = packing.finish(load_model(NAME, **TINY))
    with pytest.raises(ModelError, match="has changed since 'vit_tiny_patch16_224' was built .*pass the stack"):
        store.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_edits_are_replayed_and_accumulate(tmp_path: Path, packing):
    model = packing.finish(load_model(NAME, **TINY))
    store.save(model, tmp_path / "m", stack=packing)
    edits = json.loads((tmp_path / "m" / "model.json").read_text())["source"]["edits"]
    assert edits == [["pack_head", {"bits": 8}, {"bits": 8}]]
    again = store.load(tmp_path / "m")
    assert again.head.weight.dtype == torch.int8 and torch.equal(again(IMAGES), model(IMAGES))
    file = tmp_path / "m" / "model.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if k != "packed"}  # as older releases wrote it
    file.write_text(json.dumps({**old, "version": 1}))
    assert torch.equal(store.load(tmp_path / "m")(IMAGES), model(IMAGES))
    store.save(again, tmp_path / "n")
    assert torch.equal(store.load(tmp_path / "n")(IMAGES), model(IMAGES))


@pytest.mark.parametrize("bits", range(1, 9))
def test_narrow_weights_take_their_width_on_disk(tmp_path: Path, packing, bits):
    stack = Stack([PackHead(bits=bits)])
    model = stack.finish(load_model(NAME, **TINY))
    folder = store.save(model, tmp_path / "m", stack=stack)
    held = load_file(folder / "model.safetensors")
    assert held["head.weight"].numel() == -(-4 * 32 * bits // 8)
    stored = sum(t.numel() * t.element_size() for t in held.values())
    assert cost(model, (3, 32, 32), saved=False).weight_bytes == stored
    description = json.loads((folder / "model.json").read_text())
    assert (description["version"], description["packed"]) == ((2, ["head.weight"]) if bits < 8 else (1, []))
    again = store.load(folder)
    assert torch.equal(again.head.weight, model.head.weight) and torch.equal(again(IMAGES), model(IMAGES))


def test_a_packed_tensor_that_does_not_fit_is_named(tmp_path: Path, packing):
    stack = Stack([PackHead(bits=4)])
    folder = store.save(stack.finish(load_model(NAME, **TINY)), tmp_path / "m", stack=stack)
    held = load_file(folder / "model.safetensors")
    save_file({**held, "head.weight": held["head.weight"][:-1]}, folder / "model.safetensors")
    with pytest.raises(StateError, match=r"'head.weight': unpacking: .*\[63\] for 128 codes of 4 bits; expected"):
        store.load(folder)
    file = folder / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "packed": ["norm.weight"]}))
    with pytest.raises(StateError, match="no layer for the packed 'norm.weight'"):
        store.load(folder)


def test_shared_tensors_stay_equal(tmp_path: Path):
    model = load_model(NAME, **TINY)
    model.blocks[1].mlp = model.blocks[0].mlp
    store.save(model, tmp_path / "m")
    assert "blocks.1.mlp.fc1.weight" in json.loads((tmp_path / "m" / "model.json").read_text())["shared"]
    assert torch.equal(store.load(tmp_path / "m")(IMAGES), model(IMAGES))


def test_load_needs_no_training_code(tmp_path: Path):
    store.save(load_model(NAME, **TINY), tmp_path / "m")
    code = (
        "import sys; from gossamer.models.store import load; load(sys.argv[1]); "
        "bad = [m for m in sys.modules if m == 'accelerate' or m.startswith(('gossamer.engine', 'gossamer.data'))]; "
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_newer_damaged_and_foreign_folders_are_refused(tmp_path: Path):
    folder = store.save(load_model(NAME, **TINY), tmp_path / "m")
    file = folder / "model.json"
    good = json.loads(file.read_text())
    for change, message in (
        ({"version": 3}, "format version 3 .*reads up to 2. Upgrade"),
        ({"format": "other"}, "not a gossamer model"),
        ({"source": {}}, "damaged"),
        ({"source": {**good["source"], "num_classes": 9}}, "tensors do not fit"),
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(StateError, match=message):
            store.load(folder)
    file.write_text("{")
    with pytest.raises(StateError, match="damaged"):
        store.load(folder)
    file.write_text(json.dumps(good))
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(StateError, match="unreadable"):
        store.load(folder)
    with pytest.raises(StateError, match="holds no model.json"):
        store.load(tmp_path)


def test_disk_is_checked_first(tmp_path: Path, monkeypatch):
    store.require_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(RunError, match="MiB are free"):
        store.require_disk(tmp_path, 2**60)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda p: type("U", (), {"free": 10})())
    with pytest.raises(RunError, match="needs"):
        store.save(load_model(NAME, **TINY), tmp_path / "m")
    assert not (tmp_path / "m").exists()
