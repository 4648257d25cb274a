"""What fewer than 8 bits buy in today's runtimes: latency and bytes of ResNet-18 finished at 8, 4 and 2 bits.

``python benchmarks/low_bit_speed.py [NAME]`` with random weights (speed does not depend on them), against the float
model in the same run; on a quiet machine (the meter says when a figure cannot be trusted).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import gossamer as gs
from gossamer.core.schedule import Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.models.build import load_model


def finished(name: str, bits: int) -> tuple[nn.Module, Stack]:
    """Return a model of random weights in its deployed form, and its stack."""
    torch.manual_seed(0)
    model = load_model(name)
    images = torch.randn(4, *model.gossamer_source.preprocessing.size)  # type: ignore[union-attr,operator]
    stack = Stack([gs.QAT(bits=bits, quantize_image=True)])
    model = stack.prepare(model)
    for phase in stack.phases(Plan([Phase("fit", 0)])):
        model = stack.enter(model, phase)
        if phase.work is not None:
            phase.work(model, {"train": lambda step: {"image": images}}, Step(phase.name, "work", 0, 1))
    return stack.finish(model).eval(), stack


def main(name: str) -> None:
    """Print one row a model, runtime and batch."""
    models: dict[str, nn.Module] = {"float": load_model(name)}
    sizes = {}
    for bits in (8, 4, 2):
        models[f"{bits} bit"], stack = finished(name, bits)
        with tempfile.TemporaryDirectory() as folder:
            gs.save(models[f"{bits} bit"], Path(folder), stack=stack)
            sizes[f"{bits} bit"] = (Path(folder) / "model.safetensors").stat().st_size
    print("bytes on disk:", sizes)
    for row in gs.bench(list(models.values()), batch=[1, 8], threads=2, runtime=["openvino", "onnxruntime"]):
        keys = ("model", "runtime", "precision", "batch", "median_ms", "iqr_ms", "ratio", "ratio_best_dense", "trusted")
        print({k: row.get(k) for k in keys})


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["resnet18"]))
