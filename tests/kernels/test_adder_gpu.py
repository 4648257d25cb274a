"""Adder convolutions in Triton against plain torch: on a GPU, and everywhere else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from gossamer.kernels import adder_gpu, gpu
from gossamer.kernels.adder_shape import AdderShape
from gossamer.ops.adder import plain_forward, plain_input_grad, plain_weight_grad

# batch, channels, side, filters, kernel, stride, padding
SMALL = [(1, 3, 5, 4, (2, 3), (1, 1), (1, 1)), (1, 2, 5, 3, (3, 2), (2, 1), (1, 0))]
LARGE = [(8, 64, 14, 96, (3, 3), (1, 1), (1, 1)), (4, 33, 15, 64, (3, 3), (2, 2), (1, 1))]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.cpu(), theirs.float(), atol=1e-5 * float(theirs.abs().max()), rtol=0)


def compare(device: str, cases: list) -> None:
    """Hold every Triton kernel to the plain-torch reference in double precision."""
    for n, c, side, o, kernel, stride, padding in cases:
        draw = torch.Generator().manual_seed(0)
        x, weight = torch.randn(n, c, side, side, generator=draw), torch.randn(o, c, *kernel, generator=draw)
        shape = AdderShape.of(x, weight, stride, padding)
        grad = torch.randn(n, o, *shape.out, generator=draw)
        exact, on = (x.double(), weight.double(), shape), (x.to(device), weight.to(device), shape)
        for p, rules in ((1.0, ("clamp", "sign")), (1.4, ("power", "clamped_power"))):
            close(adder_gpu.forward(*on, p), plain_forward(*exact, p))
            for rule in rules:
                close(
                    adder_gpu.input_grad(grad.to(device), *on, rule, p),
                    plain_input_grad(grad.double(), *exact, rule, p),
                )
                close(
                    adder_gpu.weight_grad(grad.to(device), *on, rule, p),
                    plain_weight_grad(grad.double(), *exact, rule, p),
                )


@pytest.mark.skipif(not gpu.available(), reason=f"Triton kernels {gpu.describe()}")
def test_gpu_equals_plain() -> None:
    compare("cuda", SMALL + LARGE)


@pytest.mark.skipif(gpu.triton is None, reason="triton is not installed: pip install triton")
def test_interpreted_triton_equals_plain() -> None:
    """The kernels' arithmetic without a GPU; what a compiler makes of them only the test above shows."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when the kernels are defined: a process of its own
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-2000:]


if __name__ == "__main__":
    adder_gpu._STRETCH = 7  # several stretches of few pixels
    compare("cpu", SMALL)
    print("equal")
