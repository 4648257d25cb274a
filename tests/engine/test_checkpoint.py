"""Packing, atomic writing, versions, keeping two."""

import json
import math

import pytest
import torch

from gossamer.core.errors import RunError, StateError
from gossamer.engine.checkpoint import FORMAT, Checkpoints, differing_keys
from gossamer.engine.pack import pack, unpack


def round_trip(value):
    tree, tensors = pack(value)
    return unpack(json.loads(json.dumps(tree)), tensors)


def test_pack_keeps_types_and_bits():
    value = {
        "a": [1, 2.5, "x", None, True, (3, "y")],
        3: {"nested": {}, "": [], "a.b": 1},
        "inf": [math.inf, -math.inf],
        "tagged": {"__tensor__": "not a tensor"},
    }
    assert round_trip(value) == value
    assert math.isnan(round_trip([math.nan])[0])
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64):
        tensor = torch.arange(6).reshape(2, 3).to(dtype)
        back = round_trip({"t": tensor})["t"]
        assert back.dtype == dtype
        assert torch.equal(back, tensor)


def test_tensors_of_an_accelerator_return_to_one():
    tensors = {"x": torch.zeros(2)}
    tree = {"a": [{"__placed__": "x"}], "b": {"__tensor__": "x"}}
    back = unpack(tree, tensors, torch.device("meta"))
    assert (back["a"][0].device.type, back["b"].device.type) == ("meta", "cpu")


def test_pack_separates_shared_and_strided_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "whole": base,
        "again": base,
        "view": base[:, 1],
        "turned": base.t(),
        "empty": base[:0],
        "scalar": base[0, 0],
    }
    store = Checkpoints(tmp_path)
    back = store.read(store.write(0, 1, state))
    assert all(torch.equal(back[k], v) for k, v in state.items())


def test_pack_refuses_code():
    with pytest.raises(StateError, match=r"state\.hook: got function"):
        pack({"hook": lambda: 0})


def test_two_checkpoints_are_kept(tmp_path):
    store = Checkpoints(tmp_path)
    for step in range(5):
        store.write(0, step, {"x": torch.tensor(step)})
    assert [p.name for p in store.names()] == ["000-0000003", "000-0000004"]
    assert int(store.open(resume=True)["x"]) == 4


def test_newer_format_is_refused(tmp_path):
    store = Checkpoints(tmp_path)
    path = store.write(0, 1, {"x": 1}) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": FORMAT + 1}))
    with pytest.raises(StateError, match="upgrade gossamer"):
        store.open(resume=True)


def test_damaged_checkpoint_is_named(tmp_path):
    store = Checkpoints(tmp_path)
    path = store.write(0, 1, {"x": torch.zeros(100)}) / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StateError, match=r"000-0000001: unreadable.*one before it"):
        store.open(resume=True)


def test_failed_write_leaves_the_last_one(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    store.write(0, 1, {"x": torch.zeros(2)})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gossamer.engine.checkpoint.save_file", full)
    with pytest.raises(RunError, match=r"No space left.*000-0000001"):
        store.write(0, 2, {"x": torch.zeros(2)})
    assert [p.name for p in store.folder.iterdir()] == ["000-0000001"]


def test_half_written_folder_is_ignored_and_cleared(tmp_path):
    store = Checkpoints(tmp_path)
    store.write(0, 1, {"x": 1})
    (store.folder / ".writing-abc").mkdir()
    assert store.latest().name == "000-0000001"
    store.clear_leftovers()
    assert len(list(store.folder.iterdir())) == 1


def test_differing_keys_are_dotted():
    old = {"a": {"b": 1, "c": [1, {"d": 2}]}, "e": 3}
    new = {"a": {"b": 1, "c": [1, {"d": 4}]}, "f": 3}
    assert differing_keys(old, new) == ["a.c.1.d: 2 -> 4", "e: 3 -> None", "f: None -> 3"]
