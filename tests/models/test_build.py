"""Building models by name and weights, and refusing what cannot be built."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from gossamer.core.errors import ModelError
from gossamer.models.build import EMBEDDED_MODEL, Preprocessing, load_model, preprocessing, source_of

TINY = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
NAME = "vit_tiny_patch16_224"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    model = timm.create_model(NAME, num_classes=5, **TINY)
    save_file({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_half_weights_are_cast_and_the_head_follows_the_file(weights: Path):
    model = load_model(f"{NAME}@{weights}", **TINY)
    assert model.num_classes == 5 and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.gossamer_source.num_classes == 5 and model.gossamer_source.kwargs == TINY


def test_new_head(weights: Path):
    old, new = load_model(f"{NAME}@{weights}", **TINY), load_model(f"{NAME}@{weights}", num_classes=7, **TINY)
    assert new.head.weight.shape == (7, 32)
    assert torch.equal(old.blocks[1].mlp.fc1.weight, new.blocks[1].mlp.fc1.weight)
    same = load_model(f"{NAME}@{weights}", num_classes=5, **TINY)
    assert torch.equal(old.head.weight, same.head.weight)


def test_embedded_weights_and_other_sizes():
    model = load_model(EMBEDDED_MODEL)
    assert preprocessing(model) == Preprocessing((3, 224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
    small = load_model(EMBEDDED_MODEL, img_size=64)
    assert small.pos_embed.shape[1] == 17 and preprocessing(small).size == (3, 64, 64)
    with pytest.raises(ModelError, match="no embedded weights"):
        load_model("resnet18@embedded")


def test_preprocessing_json_and_channels():
    grey = load_model(NAME, in_chans=1, **TINY)
    pre = preprocessing(grey)
    assert pre.size == (1, 32, 32) and pre.mean == (0.5,)
    assert Preprocessing.from_json(pre.to_json()) == pre
    with pytest.raises(ModelError, match="did you mean 'mean'"):
        Preprocessing.from_json({"meen": [0.5]})


def test_source_of_a_plain_timm_model():
    model = timm.create_model("resnet18", num_classes=3)
    assert (source_of(model).name, source_of(model).num_classes) == ("resnet18.a1_in1k", 3)
    assert source_of(timm.create_model("vit_tiny_patch16_224", img_size=96)).kwargs == {"img_size": 96}
    with pytest.raises(ModelError, match="options it was built with are unknown"):
        source_of(timm.create_model(NAME, **TINY))
    with pytest.raises(ModelError, match="does not say how it was built"):
        source_of(torch.nn.Linear(2, 2))
    built = load_model(NAME, **TINY)
    assert source_of(copy.deepcopy(built)) == built.gossamer_source


def _refused(spec: str, message: str, **options) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(spec, **options)
    assert "\n" not in str(caught.value)


def test_unknown_names_and_options():
    _refused("vit_tiny_patch16_225", "did you mean 'vit_tiny_patch16_224'")
    _refused("vit_tiny_patch16_224.augreg", "unknown|nvalid")
    _refused("no/such/folder", "neither a folder")
    _refused(NAME, "imgsize", imgsize=32)
    _refused(NAME, "not allowed", checkpoint_path="x.pth")


def test_bad_weight_files(tmp_path: Path, weights: Path):
    _refused(f"{NAME}@{tmp_path}/none.safetensors", "no such file")
    for name in ("w.pth", "renamed.safetensors"):
        torch.save({"a": torch.zeros(1)}, tmp_path / name)
        _refused(f"{NAME}@{tmp_path / name}", "pickle file.*convert it: python -c")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    _refused(f"{NAME}@{tmp_path}/cut.safetensors", "unreadable as safetensors", **TINY)


def test_checkpoint_of_another_architecture(tmp_path: Path, weights: Path):
    _refused(f"resnet18@{weights}", r"do not fit resnet18: \d+ missing: conv1.weight.*unexpected: blocks.0")
    _refused(f"{NAME}@{weights}", r"other shape: .*\[1, 1, 32\] for \[1, 1, 192\]")
    _refused(f"{NAME}@{weights}", r"12 missing|missing: blocks.2", **{**TINY, "depth": 3})


def test_pretrained_without_network(monkeypatch):
    def offline(*args, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no route to host\nmore")
        return create(*args, pretrained=pretrained, **kwargs)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    _refused(NAME, r"could not be fetched \(no route to host\).*@weights.safetensors", pretrained=True, **TINY)


def test_efficientnet_lite_file(shared_weights: Path):
    model = load_model(f"tf_efficientnet_lite0@{shared_weights / 'tf_efficientnet_lite0_fp16.safetensors'}")
    assert model.num_classes == 1000
