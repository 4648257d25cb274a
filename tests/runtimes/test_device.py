"""The machine's description: features, caps, keys."""

from __future__ import annotations

import json

import pytest

from gossamer.core.errors import RecipeError
from gossamer.runtimes import device

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8 avx_vnni
"""


def pretend(monkeypatch: pytest.MonkeyPatch, text: str, cap: str | None = None) -> None:
    block = dict(line.split(":", 1) for line in text.splitlines())
    monkeypatch.setattr(device, "_cpuinfo", lambda: {k.strip(): v.strip() for k, v in block.items()})
    monkeypatch.setattr(device, "num_cores", lambda: 2)
    if cap is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)


def test_features_come_weakest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, XEON)
    assert device.cpu_features() == device.FEATURES
    assert device.device_key() == "intel-xeon-platinum-8488c-amx_bf16-2c"
    assert device.best_dense_precisions("openvino") == ("f32", "bf16")


def test_cap_hides_features_and_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, XEON, "avx512_core_vnni")
    assert device.cpu_features() == ("avx2", "avx_vnni", "avx512f", "avx512_vnni")
    assert device.best_dense_precisions("openvino") == ("f32",)
    report = device.device_report()
    assert report["isa_override"] == "AVX512_CORE_VNNI"
    assert "amx_int8" in report["features"] and "amx_int8" not in report["features_in_use"]
    assert device.device_key().endswith("avx512_vnni-2c")


def test_onnxruntime_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, XEON)
    assert device.best_dense_precisions("onnxruntime") == ("f32",)


def test_tile_follows_the_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, XEON)
    assert device.tile() == 16
    pretend(monkeypatch, XEON, "AVX2")
    assert device.tile() == 8


def test_elsewhere_there_are_fewer_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpuinfo", dict)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert device.cpu_features() == ()
    assert device.best_dense_precisions("torch") == ("f32",)
    assert device.tile() == 16
    assert device.device_key()


def test_report_is_json_and_key_is_stable() -> None:
    report = device.device_report()
    assert json.loads(json.dumps(report)) == report
    assert device.device_key() == report["key"] == device.device_key()
    assert report["versions"]["torch"]


def test_unknown_runtime_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'openvino'"):
        device.best_dense_precisions("openvivo")
