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
from gossamer.export.exporting import export
from gossamer.models.build import load_model

TOLERANCE = 0.5
"""Relative error of the logits that the export may show: the proof of an export is for trained weights."""


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


def graphs(models: list[nn.Module], folder: Path, kind: str, batch: int) -> list[str]:
    """Export every model; the logits of random weights are small sums that roundings of 2 bits move a lot."""
    made = (
        export(m, folder / f"{kind}-{batch}-{i}", format=kind, batch=batch, tolerance=TOLERANCE)
        for i, m in enumerate(models)
    )
    return [str(artefact.graph) for artefact in made]


def main(name: str) -> None:
    """Print one row a model, runtime and batch."""
    models: dict[str, nn.Module] = {"float": load_model(name)}
    sizes = {}
    with tempfile.TemporaryDirectory() as scratch:
        for bits in (8, 4, 2):
            models[f"{bits} bit"], stack = finished(name, bits)
            saved = Path(scratch) / str(bits)
            gs.save(models[f"{bits} bit"], saved, stack=stack)
            sizes[f"{bits} bit"] = (saved / "model.safetensors").stat().st_size
        print("bytes on disk:", sizes, flush=True)
        for kind, runtime in (("openvino", "openvino"), ("onnx", "onnxruntime")):
            for batch in (1, 8):
                paths = graphs(list(models.values()), Path(scratch), kind, batch)
                rows = gs.bench(paths, batch=batch, threads=2, runtime=runtime, precision="f32")
                for label, row in zip(models, rows, strict=True):
                    keys = ("runtime", "batch", "median_ms", "iqr_ms", "ratio", "trusted")
                    print(label, {k: row.get(k) for k in keys}, flush=True)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["resnet18"]))
