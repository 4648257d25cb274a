"""What the doctor says about kernels, and what happens without them."""

from __future__ import annotations

import pytest
import torch

from gossamer.kernels import cpu, gpu, report
from gossamer.ops.act_store import ActStore


def test_the_doctor_names_what_is_active() -> None:
    found = report()
    assert ("active" in found["native"]) == cpu.available()
    assert found["triton"].startswith("active") == gpu.available()


def test_without_a_compiler_plain_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with_kernels = ActStore(2, -1).pack(x).values(torch.float32)
    monkeypatch.setattr(cpu, "_native", None)
    assert "pip install again" in report()["native"] and not cpu.takes(x)
    assert torch.equal(ActStore(2, -1).pack(x).values(torch.float32), with_kernels)


def test_only_real_memory_of_known_types_goes_to_native_code() -> None:
    assert not cpu.takes(torch.zeros(2, dtype=torch.float64)) and not cpu.takes(torch.zeros(2, device="meta"))
    if cpu.available():
        assert cpu.takes(torch.zeros(2)) and cpu.takes(torch.zeros(2, dtype=torch.bfloat16))
        assert cpu.takes(torch.zeros(2, dtype=torch.uint8), torch.float32)
