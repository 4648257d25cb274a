"""Convolutional networks in 8 bits against dense graphs and other tools' int8, in both runtimes.

    python benchmarks/int8_conv.py --model resnet18 --batch 1 --out benchmarks/int8_conv.json

Random weights (speed does not depend on them); steps from the largest values on random images. The graphs
of one runtime are timed in one interleaved run; ratios above 1 mean faster. Peers (NNCF, ONNX Runtime's
static quantization) start from the same dense graph and are left out where not installed. Rows with odd
weights hold the 8-bit grid without a zero that quantization-aware methods learn (exact, or on the
symmetric grid that covers it). Widths below 8 bits run on the kernels of 8: they save bytes (on disk, codes
packed to their width), not time.
``--page`` writes the table of all results measured so far.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.cost.latency import bench, ratio
from gossamer.export.layout import lay_out
from gossamer.export.onnx import trace, write
from gossamer.kits.calibration import calibrate
from gossamer.kits.dataflow import Dataflow
from gossamer.kits.folding import fold_norms
from gossamer.models.contracts import replace_module
from gossamer.ops.grids import LayerGrids, covering_grid
from gossamer.ops.int8 import Int8Conv2d, Int8Linear, int8_layer
from gossamer.runtimes import best_dense_precisions, device_key, get
from gossamer.runtimes.session import int8_share

SIZE = (3, 224, 224)
CALIBRATION = 4


def odd_weights(eight: nn.Module, folded: nn.Module, bits: int, *, covering: bool = False) -> nn.Module:
    """Return a copy of an 8-bit model with weights on the odd grid, exact or (8 bits) on the covering one."""
    model = copy.deepcopy(eight)
    for name, old in eight.named_modules():
        if not isinstance(old, Int8Conv2d | Int8Linear):
            continue
        source: Any = folded.get_submodule(name)
        step = source.weight.detach().flatten(1).abs().amax(1).clamp_min(1e-12) / (2**bits - 1)
        grids = LayerGrids(bits, 8, "odd", old.grids.input_grid, len(step))
        pair = covering_grid(grids, step) if covering else (grids, step)
        replace_module(model, name, int8_layer(source, *pair, old.input_grid.scale))
    return model


def variants(name: str, images: Tensor) -> dict[str, nn.Module]:
    """Return the model dense and in 8 bits of several kinds."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # some start at 0, which would leave blocks without effect
    folded = fold_norms(copy.deepcopy(dense), Dataflow(dense).norms)
    eight = calibrate(gs.PTQMinMax(per_channel=True, images=CALIBRATION), copy.deepcopy(dense), images)
    plain = calibrate(gs.PTQMinMax(per_channel=True, sums=False, images=CALIBRATION), copy.deepcopy(dense), images)
    return {
        "dense": dense,
        "int8": eight,
        "int8, sums in float": plain,
        "int8, odd weights, exact": odd_weights(eight, folded, 8),
        "int8, odd weights, covering grid": odd_weights(eight, folded, 8, covering=True),
        "4-bit odd weights": odd_weights(eight, folded, 4),
        "2-bit odd weights": odd_weights(eight, folded, 2),
    }


def peers(runtime: str, dense: Path, images: Tensor) -> Iterator[tuple[str, Path]]:
    """Yield what other tools make of the same dense graph."""
    if runtime == "openvino":
        try:
            import nncf
        except ImportError:
            return
        import openvino as ov

        with contextlib.redirect_stdout(sys.stderr):  # its progress bars
            made = nncf.quantize(ov.Core().read_model(str(dense)), nncf.Dataset([i[None].numpy() for i in images]))
        out = dense.with_name("nncf.xml")
        ov.save_model(made, str(out), compress_to_fp16=False)
        yield "NNCF int8", out
        return
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"image": i[None].numpy()} for i in images]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    ready, out = dense.with_name("ready.onnx"), dense.with_name("static.onnx")
    quant_pre_process(str(dense), str(ready))
    quantize_static(
        str(ready), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    yield "ONNX Runtime static int8", out


def measure(runtime: str, models: dict[str, nn.Module], images: Tensor, options: argparse.Namespace) -> list[dict]:
    """Time every variant in one run; returns plain rows."""
    x = np.random.default_rng(0).standard_normal((options.batch, *SIZE), dtype=np.float32)
    engine, found = get(runtime), []
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for label, model in models.items():
            graph = trace(model, torch.from_numpy(x))
            lay_out(graph, runtime)
            files[label] = Path(scratch) / f"{len(files)}.onnx"
            write(graph, files[label])
        if options.batch == 1:  # the peers' calibration takes single images
            files |= dict(peers(runtime, files["dense"], images))
        entries = [("dense", p) for p in best_dense_precisions(runtime)]
        best = entries[-1][1]
        entries += [(label, best) for label in files if label != "dense"]
        sessions = [engine.load(files[f], precision=p, threads=options.threads) for f, p in entries]
        timings = bench(sessions, x, rounds=options.rounds, names=[f for f, _ in entries])
        for (label, precision), timing in zip(entries, timings, strict=True):
            session = engine.load(files[label], precision=precision, threads=options.threads, profile=True)
            session.run(x)
            row = {"runtime": runtime, "batch": options.batch, "variant": label, "precision": precision}
            size = round(gs.cost(models[label], images[:1]).weight_bytes / 1e6, 2) if label in models else ""
            row |= {"weights, MB": size}
            row |= {"median_ms": round(timing.median_ms, 2), "iqr_ms": round(timing.iqr_ms, 2)}
            row |= {"over dense fp32": round(ratio(timings[0], timing)[1], 2)}
            row |= {"over best dense": round(ratio(timings[len(best_dense_precisions(runtime)) - 1], timing)[1], 2)}
            row |= {"int8 products": round(int8_share(session.profile(), by="count"), 2), "trusted": timing.trusted}
            found.append(row)
    return found


def losses(models: dict[str, nn.Module], images: Tensor) -> dict[str, float]:
    """Return the error of each variant's logits relative to those of the dense model."""
    with torch.no_grad():
        want = models["dense"](images)
        return {k: round(float((m(images) - want).norm() / want.norm()), 4) for k, m in models.items() if k != "dense"}


def page(results: dict[str, Any]) -> str:
    """Return all results as a page."""
    lines = ["# Convolutional networks in 8 bits", "", *str(__doc__).strip().splitlines()[4:], ""]
    if not all(r["trusted"] for entry in results.values() for r in entry["rows"]):
        lines += ["Rows that are not trusted ran beside other load: times are too long, and ratios rough.", ""]
    for name, entry in results.items():
        rows = entry["rows"]
        lines += [f"## {name}, {entry['device']}, {entry['threads']} threads", ""]
        lines += ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
        lines += ["| " + " | ".join(str(v) for v in row.values()) + " |" for row in rows]
        lines += ["", "Error of the logits relative to the dense model's (random weights, torch): "]
        lines[-1] += "; ".join(f"{k} {v}" for k, v in entry["losses"].items()) + "."
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure one model and batch in both runtimes, and add the rows to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--page", action="store_true", help="only write the page of the results in --out")
    options = parser.parse_args(argv)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if not options.page:
        images = torch.randn(CALIBRATION, *SIZE, generator=torch.Generator().manual_seed(0))
        models = variants(options.model, images)
        rows = [row for runtime in ("openvino", "onnxruntime") for row in measure(runtime, models, images, options)]
        old = results.get(options.model, {"rows": []})["rows"]
        rows = [r for r in old if r["batch"] != options.batch] + rows
        facts = {"device": device_key(), "threads": options.threads, "losses": losses(models, images)}
        results[options.model] = {**facts, "rows": rows}
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
