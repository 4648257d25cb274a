"""What each rewrite of an 8-bit graph is worth, and how dense graphs are best exported (DeiT-S shapes).

    python benchmarks/int8_layout.py --runtime openvino --precision bf16 --batch 8 >> benchmarks/int8_layout.md

Random weights, every layer and both attention products in 8 bits with steps from the largest values
on random images. All graphs of a call are timed in one interleaved run; a ratio is the first row's time
over the row's. Peers (NNCF; ONNX Runtime's dynamic quantization) are measured where installed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

import gossamer as gs
from gossamer.cost.latency import bench, ratio
from gossamer.export.layout import STEPS, lay_out
from gossamer.export.onnx import trace, write
from gossamer.kits.calibration import calibrate
from gossamer.runtimes import get
from gossamer.runtimes.openvino import core, import_openvino
from gossamer.runtimes.session import int8_share

SIZE = (3, 224, 224)


def dense_model(name: str) -> nn.Module:
    """Return a model with random weights and biases that are not zero."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    return model


def peers(dense: Path, batch: int) -> Iterator[tuple[str, Path]]:
    """Yield what other tools make of the same dense graph."""
    if dense.stem.startswith("openvino"):
        try:
            import nncf
        except ImportError:
            return
        ov = import_openvino()

        rng = np.random.default_rng(0)
        images = [rng.standard_normal((batch, *SIZE), dtype=np.float32) for _ in range(32 // batch)]
        with contextlib.redirect_stdout(sys.stderr):  # its progress bars
            made = nncf.quantize(
                core().read_model(str(dense)), nncf.Dataset(images),
                model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images),
            )  # fmt: skip
        out = dense.with_name(f"nncf-{dense.stem}.xml")
        ov.save_model(made, str(out), compress_to_fp16=False)
        yield "NNCF", out
    else:
        from onnxruntime.quantization import quantize_dynamic

        out = dense.with_name("dynamic.onnx")
        quantize_dynamic(str(dense), str(out))
        yield "dynamic quantization", out


def graphs(runtime: str, name: str, batch: int, folder: Path) -> dict[str, Path]:
    """Write every variant and return the files."""
    dense = dense_model(name)
    images = torch.randn(batch, *SIZE)
    found: dict[str, Path] = {}

    def add(label: str, model: nn.Module, *, opset: int = 20, lay: bool = True, without: str | None = None) -> Path:
        graph = trace(model, images, opset=opset)
        if lay:
            lay_out(graph, runtime, without)
        path = folder / f"{runtime}-{len(found)}.onnx"
        write(graph, path)
        found[label] = path
        return path

    plain = add("dense, as traced", dense, lay=False)
    ours = add("dense, laid out", dense)
    add("dense, opset 23 (fused attention)", dense, opset=23, lay=False)
    if runtime == "openvino":
        ov = import_openvino()

        direct = folder / "direct.xml"
        ov.save_model(ov.convert_model(torch.export.export(dense, (images,))), direct, compress_to_fp16=False)
        found["dense, from torch.export directly"] = direct
        found |= {f"{label}, dense as traced": path for label, path in peers(plain, batch)}
        found |= {f"{label}, dense laid out": path for label, path in peers(ours, batch)}
    else:
        found |= dict(peers(plain, batch))
    method = gs.PTQMinMax(per_channel=True, unsigned_softmax=True, images=2)
    eight = calibrate(method, copy.deepcopy(dense), torch.randn(2, *SIZE))
    add("int8, as traced", eight, lay=False)
    for step in STEPS[runtime]:
        leave = step.__name__.lstrip("_")
        add(f"int8 without {leave}", eight, without=leave)
    add("int8, laid out", eight)
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure one runtime, precision and batch and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime", choices=sorted(STEPS), default="openvino")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    x = np.random.default_rng(0).standard_normal((args.batch, *SIZE), dtype=np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        found = graphs(args.runtime, args.model, args.batch, Path(scratch))
        engine = get(args.runtime)
        sessions = [engine.load(p, precision=args.precision, threads=args.threads) for p in found.values()]
        timings = bench(sessions, x, rounds=args.rounds, names=list(found))
        title = f"{args.model}, {args.runtime} {args.precision}, batch {args.batch}"
        print(f"\n| {title} | ms | ratio | int8 share of products | trusted |")
        print("|---|---|---|---|---|")
        for (label, path), timing in zip(found.items(), timings, strict=True):
            session = engine.load(path, precision=args.precision, threads=args.threads, profile=True)
            session.run(x)
            share = int8_share(session.profile(), by="count")
            figures = f"{timing.median_ms:.1f} | {ratio(timings[0], timing)[1]:.3f} | {share:.2f}"
            print(f"| {label} | {figures} | {timing.trusted} |")


if __name__ == "__main__":
    main()
