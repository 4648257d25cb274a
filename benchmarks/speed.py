"""Speed of token reduction and 8 bits on DeiT-S shapes, every ratio pair by pair in one run.

    python benchmarks/speed.py --out benchmarks/speed.json --markdown benchmarks/speed.md

Random weights: latency does not depend on their values. Variants: dense; ToMe and DiffRate at 60% of
the MACs, DiffRate also device-aware (few blocks, token counts that are multiples of a tile); 8 bits
by PTQ for ViT; tokens and 8 bits; the peers NNCF (OpenVINO) and dynamic quantization (ONNX Runtime)
where installed. Set ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI to see a CPU without AMX and bf16.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core import registry
from gossamer.core.schedule import Phase, Plan
from gossamer.core.stack import Stack
from gossamer.cost.latency import Timing, bench, ratio
from gossamer.cost.ledger import cost
from gossamer.engine.loop import Loop
from gossamer.export.exporting import export
from gossamer.models.build import load_model
from gossamer.models.preprocessing import preprocessing
from gossamer.runtimes import get
from gossamer.runtimes.device import device_report
from gossamer.runtimes.openvino import core, import_openvino
from gossamer.runtimes.session import int8_share
from gossamer.tasks.classification import Classification

MODEL = "deit_small_patch16_224"


def noise(step: Any) -> dict[str, Any]:
    """Return a batch of random images: what calibration needs to set ranges for random weights."""
    g = step.generator("noise")
    return {
        "image": torch.randn(4, 3, 224, 224, generator=g),
        "target": torch.zeros(4, dtype=torch.long),
        "id": ["x"] * 4,
    }


def finished(model: nn.Module, *methods: tuple[str, dict[str, Any]]) -> nn.Module:
    """Return ``model`` under methods that need no training."""
    stack = Stack([registry.build(name, options) for name, options in methods])
    loop = Loop(stack, Classification(), {"train": noise, "calibration": noise}, Plan([Phase("fit", 0)]))
    return loop.run(copy.deepcopy(model)).eval()


def nncf_int8(xml: Path, out: Path, size: tuple[int, int, int]) -> Path | None:
    """Return NNCF's int8 of an OpenVINO graph, or None where NNCF is not installed."""
    try:
        import nncf
    except ImportError:
        return None
    ov = import_openvino()

    graph = core().read_model(xml)
    shape = list(graph.inputs[0].shape)
    rng = np.random.default_rng(0)
    images = [rng.standard_normal(shape, dtype=np.float32) for _ in range(max(1, 32 // shape[0]))]
    quantized = nncf.quantize(
        graph, nncf.Dataset(images), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images)
    )
    ov.save_model(quantized, out, compress_to_fp16=False)
    return out


def ort_dynamic(onnx_file: Path, out: Path) -> Path:
    """Return ONNX Runtime's own dynamic quantization of a graph."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(onnx_file), str(out))
    return out


def models(
    int8: dict[str, Any], tome: dict[str, Any], free: dict[str, Any], aware: dict[str, Any]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the variants by name."""
    torch.manual_seed(0)
    dense = load_model(MODEL).eval()
    yield "dense", dense
    yield "ToMe", finished(dense, ("tome", tome))
    yield "DiffRate", finished(dense, ("diffrate", free))
    yield "DiffRate, device-aware", finished(dense, ("diffrate", aware))
    yield "int8", finished(dense, ("ptq_vit", int8))
    yield "DiffRate, device-aware, int8", finished(dense, ("diffrate", aware), ("ptq_vit", int8))


def graphs(variants: list[tuple[str, nn.Module]], runtime: str, batch: int, folder: Path) -> dict[str, Path]:
    """Export every variant and add the runtime's peer."""
    kind = {"openvino": "openvino", "onnxruntime": "onnx"}[runtime]
    found = {
        name: export(model, folder / f"{k}-{kind}-b{batch}", format=kind, batch=batch).graph
        for k, (name, model) in enumerate(variants)
    }
    if runtime == "openvino":
        for base, peer in (("dense", "NNCF int8"), ("ToMe", "ToMe, NNCF int8")):
            made = nncf_int8(found[base], folder / f"{peer}-b{batch}.xml".replace(" ", "-"), (3, 224, 224))
            if made is not None:
                found[peer] = made
    else:
        found["dynamic int8"] = ort_dynamic(found["dense"], folder / f"dynamic-b{batch}.onnx")
    return found


def rows(found: dict[str, Path], runtime: str, batch: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Time all graphs of one runtime and batch in one interleaved run."""
    engine = get(runtime)
    keys = [(name, p) for name in found for p in engine.precisions()]
    sessions = [engine.load(found[name], precision=p, threads=threads) for name, p in keys]
    x = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), dtype=np.float32)
    timings = bench(sessions, x, rounds=rounds, names=[f"{n} {p}" for n, p in keys])
    at = dict(zip(keys, timings, strict=True))
    best = min((t for (n, _), t in at.items() if n == "dense"), key=lambda t: t.median_ms)
    return [_row(key, at, best, runtime, batch) for key in keys]


def _row(
    key: tuple[str, str], at: dict[tuple[str, str], Timing], best: Timing, runtime: str, batch: int
) -> dict[str, Any]:
    name, precision = key
    timing = at[key]

    def against(other: Timing | None) -> float | None:
        return None if other is None else round(ratio(other, timing)[1], 3)

    return {
        "runtime": runtime,
        "batch": batch,
        "variant": name,
        "precision": precision,
        "median_ms": round(timing.median_ms, 2),
        "iqr_ms": round(timing.iqr_ms, 2),
        "dense, same precision": against(at[("dense", precision)]),
        "dense fp32": against(at[("dense", "f32")]),
        "best dense": against(best),
        "ToMe, same precision": against(at.get(("ToMe", precision))),
        "int8, same precision": against(at.get(("int8", precision))),
        "NNCF int8, same precision": against(at.get(("NNCF int8", precision))),
        "trusted": timing.trusted,
    }


def profile(graph: Path, runtime: str) -> dict[str, Any]:
    """Return time by operator type and the share of products in int8 kernels."""
    session = get(runtime).load(graph, profile=True)
    x = np.random.default_rng(0).standard_normal(session.input_shape, dtype=np.float32)
    for _ in range(4):
        session.run(x)
    ops = session.profile()
    by_type: dict[str, float] = {}
    for op in ops:
        by_type[op.type] = by_type.get(op.type, 0.0) + op.ms
    return {
        "int8_share_of_product_time": round(int8_share(ops), 3),
        "ms_by_type": {k: round(v, 2) for k, v in sorted(by_type.items(), key=lambda kv: -kv[1]) if v >= 0.05},
    }


def main(argv: list[str] | None = None, tell: Callable[[str], None] = print) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: options of int8, tome, free, aware")
    args = parser.parse_args(argv)
    options: dict[str, dict[str, Any]] = {
        "int8": {"images": 4, "n_candidates": 4, "max_iter": 1, "bias_correction": False},
        "tome": {"macs": "60%"},
        "free": {"macs": "60%"},
        "aware": {"macs": "60%", "device_aware": True},
        **args.options,
    }
    variants = list(models(**options))
    result: dict[str, Any] = {
        "device": device_report(),
        "macs": {name: cost(model, saved=False).macs for name, model in variants},
        "size": preprocessing(variants[0][1]).size,
        "rows": [],
        "profile": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        for runtime in ("openvino", "onnxruntime"):
            for batch in args.batch:
                found = graphs(variants, runtime, batch, Path(scratch))
                result["rows"] += rows(found, runtime, batch, args.rounds, args.threads)
                if batch == max(args.batch):
                    result["profile"][runtime] = {name: profile(g, runtime) for name, g in found.items()}
                args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
                tell(f"{runtime}, batch {batch} done")
    if args.markdown:
        args.markdown.write_text(table(result), encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    keys = [k for k in result["rows"][0]]
    lines = [
        f"# Speed on {result['device'].get('cpu', 'this CPU')}",
        "",
        "| " + " | ".join(keys) + " |",
        "|" + " --- |" * len(keys),
    ]
    lines += ["| " + " | ".join("" if r[k] is None else str(r[k]) for k in keys) + " |" for r in result["rows"]]
    macs = ", ".join(f"{n} {m / 1e9:.3f} G" for n, m in result["macs"].items())
    return "\n".join([*lines, "", f"MACs: {macs}.", ""])


if __name__ == "__main__":
    main()
