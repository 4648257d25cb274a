"""Latency tables: interpolation, JSON, settings that do not match; one small measurement."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import ModelError, RecipeError, StateError
from gossamer.cost.latency_table import Grid, LatencyTable, Setting, released_grid
from gossamer.kits.structure.measuring import BlockMeter, MeterOptions, default_axes
from gossamer.models.widths import widths_of

HERE = Setting("amd-x", "openvino", "bf16", 2, 8, 197)


def test_interpolation_is_multilinear_and_exact_on_the_grid() -> None:
    grid = Grid({"a": [0, 2, 6], "b": [1, 3]}, [[0.0, 2.0], [4.0, 6.0], [8.0, 30.0]])
    assert grid.at({"a": 2, "b": 3}) == 6.0
    assert grid.at({"a": 1, "b": 2}) == pytest.approx((0 + 2 + 4 + 6) / 4)
    assert grid.at({"a": 10, "b": 1}) == pytest.approx(12.0)  # the last cell goes on
    with pytest.raises(ModelError, match="rising axes"):
        Grid({"a": [2, 1]}, [0.0, 1.0])


@settings(max_examples=40, deadline=None)
@given(st.floats(1, 64), st.floats(1, 12), st.floats(0, 5))
def test_a_rising_table_gives_rising_latencies(qk: float, heads: float, more: float) -> None:
    values = np.add.outer(np.array([1.0, 2.0, 5.0]), np.array([0.0, 1.0, 7.0]))
    table = LatencyTable(HERE, (Grid({"heads": [1, 6, 12], "qk": [1, 16, 64]}, values),))
    at = {"heads": heads, "qk": qk}
    for name in at:
        assert table.block({**at, name: at[name] + more}) >= table.block(at) - 1e-12


def test_file_and_device(tmp_path) -> None:
    table = LatencyTable(HERE, (Grid({"embed": [1, 2]}, [1.0, 2.0]),), (Grid({"embed": [0, 2]}, [0.0, 1.0]),), 1.5)
    table.save(tmp_path / "t.json")
    again, warning = LatencyTable.here(tmp_path / "t.json", HERE)
    assert not warning and again.model([{"embed": 2.0}] * 3) == table.model([{"embed": 2.0}] * 3) == 1.5 * 6 + 1.0
    _, warning = LatencyTable.here(tmp_path / "t.json", Setting("intel-y", "openvino", "bf16", 2, 1, 197))
    assert "another device" in warning and "'amd-x' here 'intel-y'" in warning and "measure it again" in warning
    data = json.loads((tmp_path / "t.json").read_text())
    broken = {"no latency table": {"format": "x"}, "upgrade": {"version": 9}, "damaged": {"parts": 3}}
    for message, change in broken.items():
        (tmp_path / "bad.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(StateError, match=message):
            LatencyTable.load(tmp_path / "bad.json")
    with pytest.raises(StateError, match="cannot be read"):
        LatencyTable.load(tmp_path / "missing.json")


def test_released_format() -> None:
    widths = (1, 16, 32, 48, 64)

    def cells(h: int, q: int, v: int) -> dict[str, int]:
        return {f"MLP_{m or 1}": h * q + v + m for m in range(0, 3073, 128)}

    rows = [(h, q) for h in (1, 3, 6, 9, 12) for q in widths]
    measured = {"EMB_256": {f"QK_{h}_{q}": {f"V_{v}": cells(h, q, v) for v in widths} for h, q in rows}}
    grid = released_grid(measured)
    assert grid.at({"embed": 128, "heads": 3, "qk": 16, "v": 32, "mlp": 128}) == pytest.approx((48 + 32 + 128) / 2)
    del measured["EMB_256"]["QK_1_16"]
    with pytest.raises(ModelError, match="QK_1_16"):
        released_grid(measured)


def test_a_small_measurement_in_torch() -> None:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("deit_tiny_distilled_patch16_224", **shape)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    axes = {"embed": [16, 32], "heads": [2], "qk": [16], "v": [16], "mlp": [16, 128]}
    meter = BlockMeter(model, axes, MeterOptions("torch", "f32", 1, 2, rounds=3, burst_s=0.0))
    records = [json.loads(json.dumps(meter.measure(i))) for i in range(len(meter.points))]
    table = LatencyTable.from_json(json.loads(json.dumps(meter.table(records).to_json())))
    assert len(records) == 2 + 2 + 4
    unit = sorted(r["reference_ms"] for r in records)
    unit = (unit[3] + unit[4]) / 2
    dense = table.model(widths_of(model).points())
    assert dense == pytest.approx(unit * records[0]["relative"])  # the model as a whole sets the scale
    assert table.setting.tokens == 18 and table.rest[0].at({"embed": 16}) > 0
    assert all((model.state_dict()[k] == v).all() for k, v in before.items())
    with pytest.raises(ModelError, match="records for"):
        meter.table(records[:-1])


def test_grid_and_options_are_checked() -> None:
    axes = default_axes(
        {"embed": 192, "heads": 3, "qk": 64, "v": 64, "mlp": 768},
        {"embed": 16, "heads": 1, "qk": 16, "v": 16, "mlp": 16},
    )
    assert axes == {
        "embed": [16, 96, 192], "heads": [1, 2, 3], "qk": [16, 32, 64], "v": [16, 32, 64], "mlp": [16, 272, 512, 768],
    }  # fmt: skip
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(ModelError, match="dense width"):
        BlockMeter(model, axes, MeterOptions("torch"))
    with pytest.raises(RecipeError, match="rounds=2"):
        MeterOptions("torch", rounds=2).setting(10)
