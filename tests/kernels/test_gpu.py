"""Triton kernels against the CPU path: on a GPU, and everywhere else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import Tensor

from gossamer.kernels import gpu
from gossamer.ops.group_pack import arrange, no_bounds, plain_move_range, plain_pack, plain_unpack


@mock.patch.object(gpu, "_BLOCK", 64)  # so small that there are many
def compare(device: str) -> None:
    """Hold every Triton kernel to the plain-torch reference."""
    qkv = torch.randn(2, 5, 3, 2, 8, generator=torch.Generator().manual_seed(0)).permute(2, 0, 3, 1, 4)
    tokens = torch.randn(3, 50, 24, generator=torch.Generator().manual_seed(1))
    images = torch.randn(6, 50, 48, generator=torch.Generator().manual_seed(2))
    cases: list[tuple[Tensor, int, int]] = [
        (tokens, -1, 3), (images, -1, 1), (qkv[0], 1, 2), (qkv[1].transpose(-2, -1), 1, 1),
    ]  # fmt: skip
    for x, dim, groups in cases:
        theirs, ours = no_bounds(groups), no_bounds(groups, device)
        layout, grouped = arrange(x, dim, groups)
        _, moved = arrange(x.to(device) if x.is_contiguous() else _as(x, device), dim, groups)
        for _ in range(2):
            plain_move_range(grouped, theirs, 0.1)
            gpu.move_range(moved, ours, 0.1)
            torch.testing.assert_close(ours.cpu(), theirs, atol=0, rtol=0)
        for noise in (None, (0x1234567890ABCD, 7)):
            codes, grid = plain_pack(grouped, theirs * 0.8, 255, noise)
            got, got_grid = gpu.pack(moved, ours * 0.8, 255, noise)
            assert torch.equal(got.cpu(), codes) and torch.equal(got_grid.cpu(), grid)
            back = gpu.unpack(layout.grouped(got), got_grid, torch.float32)
            assert torch.equal(back.cpu(), plain_unpack(layout.grouped(codes), grid, torch.float32))


def _as(x: Tensor, device: str) -> Tensor:
    """Return a view of the same strides on the device."""
    whole = torch.empty(x.untyped_storage().nbytes() // 4, device=device)
    whole.copy_(torch.as_strided(x, whole.shape, (1,), 0))
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


@pytest.mark.skipif(not gpu.available(), reason=f"Triton kernels {gpu.describe()}")
def test_gpu_equals_plain() -> None:
    compare("cuda")


@pytest.mark.skipif(gpu.triton is None, reason="triton is not installed: pip install triton")
def test_interpreted_triton_equals_plain() -> None:
    """The kernels' arithmetic without a GPU; what a compiler makes of them only the test above shows."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when the kernels are defined: a process of its own
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-2000:]


if __name__ == "__main__":
    compare("cpu")
    print("equal")
