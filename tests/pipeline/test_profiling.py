"""Profiles of exported graphs, by operator."""

from __future__ import annotations

import pytest
import torch

from gossamer.core import registry
from gossamer.cost.ledger import cost
from gossamer.export.exporting import export
from gossamer.kits.calibration import calibrate
from gossamer.kits.example import tiny_vit
from gossamer.pipeline.measure import FORMATS, Measured
from gossamer.pipeline.profiling import by_operator, profiled_rows, profiles
from gossamer.pipeline.stages import Stage
from gossamer.runtimes import OpTime


def test_operators_of_one_kind_are_summed() -> None:
    ops = [OpTime("a", "MatMul", "k", "i8", 1.0, True), OpTime("b", "MatMul", "k", "i8", 2.0, True),
           OpTime("c", "Softmax", "s", "", 4.0)]  # fmt: skip
    rows = by_operator(ops)
    assert [(r["type"], r["ms"], r["count"], r["product"]) for r in rows] == [
        ("Softmax", 4.0, 1, False),
        ("MatMul", 3.0, 2, True),
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    """A dense stage, the same graph under another name, and an 8-bit stage, in both runtimes."""
    folder, dense = tmp_path_factory.mktemp("graphs"), tiny_vit().eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    int8 = calibrate(registry.build("ptq_vit", {"max_iter": 0, "unsigned_softmax": True}), tiny_vit().eval(), images)
    found = []
    for names, model in ((("dense", "fit"), dense), (("finished",), int8)):
        graphs = {r: export(model, folder / names[0] / f, format=f, batch=2).graph for r, f in FORMATS.items()}
        for name in names:
            stage, counted = Stage(name, name, folder, model), cost(model, saved=False)
            found += [Measured(stage, runtime, "f32", counted, {2: graph}) for runtime, graph in graphs.items()]
    return found


def test_stages_that_share_a_graph_are_profiled_once(rows: list[Measured]) -> None:
    assert [(r.stage.name, r.runtime) for r in profiled_rows(rows)] == [
        ("dense", "openvino"), ("dense", "onnxruntime"), ("finished", "openvino"), ("finished", "onnxruntime"),
    ]  # fmt: skip


def test_every_runtime_says_where_time_goes_and_what_ran_in_8_bits(rows: list[Measured]) -> None:
    found = profiles([r for r in rows if r.stage.name != "fit"], 2, 1, (3, 32, 32))
    assert [(p["stage"], p["runtime"]) for p in found] == [
        ("dense", "openvino"), ("dense", "onnxruntime"), ("finished", "openvino"), ("finished", "onnxruntime"),
    ]  # fmt: skip
    for profile in found:
        assert profile["ms"] == pytest.approx(sum(op["ms"] for op in profile["ops"]))
        assert any(op["product"] for op in profile["ops"])
        assert (profile["int8_share"] > 0.5) == (profile["stage"] == "finished")
