"""Sessions of every runtime: same answers, thread and mode hygiene, profiles, errors in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from gossamer import runtimes
from gossamer.core.errors import ModelError, RecipeError, StateError
from gossamer.runtimes.openvino import import_openvino
from gossamer.runtimes.session import OpTime, Runtime, int8_share

GRAPH_RUNTIMES = ("openvino", "onnxruntime")


def as_module(path: Path) -> nn.Module:
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in onnx.load(path).graph.initializer}
    first, second = nn.Linear(48, 32, bias=False), nn.Linear(32, 8, bias=False)
    first.weight.data, second.weight.data = weights["w1"].T, weights["w2"].T
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second)


def images(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, 3, 4, 4)).astype(np.float32)


def test_all_runtimes_agree_with_torch(dense_graph: Path) -> None:
    want = runtimes.get("torch").load(as_module(dense_graph), precision="f32").run(images())
    for name in GRAPH_RUNTIMES:
        session = runtimes.get(name).load(dense_graph, precision="f32")
        assert (session.runtime, session.precision, session.threads) == (name, "f32", 2)
        assert session.input_shape == (None, 3, 4, 4)
        np.testing.assert_allclose(session.run(images()), want, rtol=1e-4, atol=1e-4)
        assert session.run(images(3)).shape == (3, 8)


def test_outputs_are_not_overwritten_by_the_next_run(dense_graph: Path) -> None:
    for name in GRAPH_RUNTIMES:
        session = runtimes.get(name).load(dense_graph, precision="f32")
        first = session.run(images())
        kept = first.copy()
        session.run(images() * 2)
        np.testing.assert_array_equal(first, kept)


def test_a_folder_means_its_model_file(dense_graph: Path) -> None:
    assert runtimes.get("onnxruntime").load(dense_graph.parent).where == "model.onnx"
    with pytest.raises(ModelError, match=r"holds no model\.onnx"):
        runtimes.get("onnxruntime").load(dense_graph.parent.parent)


@pytest.mark.parametrize("name", GRAPH_RUNTIMES)
def test_profile_shows_int8_kernels(name: str, int8_graph: Path, dense_graph: Path) -> None:
    session = runtimes.get(name).load(int8_graph, precision="f32", profile=True)
    with pytest.raises(StateError, match="0 runs"):
        session.profile()
    session = runtimes.get(name).load(int8_graph, precision="f32", profile=True)
    for _ in range(3):
        session.run(images())
    ops = session.profile()
    assert any(op.product for op in ops) and all(op.ms >= 0 for op in ops)
    assert int8_share(ops, by="count") == 1.0
    dense = runtimes.get(name).load(dense_graph, precision="f32", profile=True)
    dense.run(images())
    assert int8_share(dense.profile(), by="count") == 0.0
    assert any(op.product for op in dense.profile())


def test_torch_profile_names_products(dense_graph: Path) -> None:
    session = runtimes.get("torch").load(as_module(dense_graph), profile=True)
    session.run(images())
    assert {op.precision for op in session.profile() if op.product} == {"f32"}


def test_profile_needs_to_be_asked_for(dense_graph: Path) -> None:
    for name, source in (*((n, dense_graph) for n in GRAPH_RUNTIMES), ("torch", as_module(dense_graph))):
        with pytest.raises(StateError, match="profile=True"):
            runtimes.get(name).load(source).profile()


def test_int8_share_weighs_time_or_counts() -> None:
    ops = [
        OpTime("a", "MatMul", "k", "i8", 3.0, True),
        OpTime("b", "MatMul", "k", "f32", 1.0, True),
        OpTime("c", "Add", "k", "i8", 9.0),
    ]
    assert int8_share(ops) == 0.75
    assert int8_share(ops, by="count") == 0.5
    assert int8_share([]) == 0.0
    with pytest.raises(RecipeError, match="'time' and 'count'"):
        int8_share(ops, by="flops")


def test_torch_restores_threads_and_modes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 8))
    model[1].eval()
    before = torch.get_num_threads()
    session = runtimes.get("torch").load(model, threads=before + 1)
    np.testing.assert_array_equal(session.run(images()), session.run(images()))
    assert torch.get_num_threads() == before
    assert (model.training, model[1].training, model[2].training) == (True, False, True)


def test_torch_refuses_outputs_that_are_no_tensor() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": x}

    with pytest.raises(ModelError, match="returned a dict"):
        runtimes.get("torch").load(Odd()).run(images())


def test_precisions_are_those_the_machine_runs(monkeypatch: pytest.MonkeyPatch, dense_graph: Path) -> None:
    monkeypatch.setattr("gossamer.runtimes.session.best_dense_precisions", lambda name: ("f32",))
    with pytest.raises(RecipeError, match=r"precision='bf16'; this machine runs f32"):
        runtimes.get("openvino").load(dense_graph, precision="bf16")
    assert runtimes.get("openvino").load(dense_graph).precision == "f32"


def test_native_bf16_runs(dense_graph: Path) -> None:
    for name, source in (("openvino", dense_graph), ("torch", as_module(dense_graph))):
        want = runtimes.get(name).load(source, precision="f32").run(images())
        for precision in runtimes.get(name).precisions():
            session = runtimes.get(name).load(source, precision=precision)
            assert session.precision == precision
            np.testing.assert_allclose(session.run(images()), want, rtol=0.05, atol=1.0)


def test_errors_say_what_to_do(dense_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="did you mean 'onnxruntime'"):
        runtimes.get("onnx_runtime")
    with pytest.raises(RecipeError, match="threads=0"):
        runtimes.get("openvino").load(dense_graph, threads=0)
    with pytest.raises(ModelError, match="no file"):
        runtimes.get("openvino").load(tmp_path / "none.xml")
    with pytest.raises(ModelError, match=r"ends in '.pt'"):
        runtimes.get("onnxruntime").load(tmp_path / "model.pt")
    with pytest.raises(ModelError, match="Export the model first"):
        runtimes.get("openvino").load(nn.Identity())
    with pytest.raises(ModelError, match="it loads modules"):
        runtimes.get("torch").load(dense_graph)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    for name in GRAPH_RUNTIMES:
        with pytest.raises(ModelError, match=f"{name} cannot load") as caught:
            runtimes.get(name).load(broken)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Runtime, "available", lambda self: False)
    with pytest.raises(RecipeError, match="pip install openvino"):
        runtimes.get("openvino")
    assert set(runtimes.all_runtimes()) == {"openvino", "onnxruntime", "torch"}


def test_a_wrong_shape_is_refused(int8_graph: Path) -> None:
    for name in GRAPH_RUNTIMES:
        with pytest.raises(ModelError, match=r"\[5, 3, 4, 4\]; the graph takes \[2, 3, 4, 4\]"):
            runtimes.get(name).load(int8_graph).run(images(5))


def test_openvino_reports_nothing() -> None:
    code = (
        "import sys; from gossamer.runtimes.openvino import import_openvino; import_openvino();"
        "from openvino.tools import ovc;"
        "print(type(ovc.telemetry).__module__, 'openvino_telemetry' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["openvino.tools.ovc.telemetry_stub", "False"]


def test_signals_survive_sessions_that_come_and_go(dense_graph: Path) -> None:
    """A Core leaves the thread a signal stack that dies with it; see ``core``."""
    code = (
        "import gc, signal, subprocess, sys; from gossamer import runtimes;"
        "load = lambda: runtimes.get('openvino').load(sys.argv[1]);"
        "a = load(); b = load(); del a; gc.collect(); del b; gc.collect();"
        "signal.signal(signal.SIGCHLD, lambda *_: None); signal.signal(signal.SIGUSR1, lambda *_: print('heard'));"
        "subprocess.run(['true']); signal.raise_signal(signal.SIGUSR1)"
    )
    out = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, str(dense_graph)], capture_output=True, text=True
    )
    assert (out.returncode, out.stdout.split()) == (0, ["heard"]), out.stderr


def test_a_reporter_that_was_there_before_loses_its_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = SimpleNamespace(consent=True)
    import_openvino()
    monkeypatch.setattr("openvino.tools.ovc.telemetry", reporter)
    import_openvino()
    assert reporter.consent is False
