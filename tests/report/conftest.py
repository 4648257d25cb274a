"""A run folder with made-up but plausible figures."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

KEPT = [196, 196, 180, 180, 180, 128, 128, 128, 80, 80, 64, 48]
ROWS = [
    # stage, precision, macs, bytes, top1, agreement, fp32 ms, ratio of the best dense, note
    ("dense", "f32", 1.258e9, 22_900_000, 0.877, 1.0, 1.0, 0.42, ""),
    ("dense", "bf16", 1.258e9, 22_900_000, 0.877, 0.997, 2.36, 1.0, ""),
    ("DiffRate", "f32", 0.755e9, 22_900_000, 0.835, 0.91, 1.55, 0.66, ""),
    ("DiffRate + distillation", "bf16", 0.755e9, 22_900_000, 0.859, 0.94, 3.3, 1.41, ""),
    ("DiffRate + PTQ", "int8", 0.755e9, 6_300_000, 0.853, 0.93, 2.2, 0.93,
     "Not faster than bf16: this CPU has AMX, whose bf16 product is as fast, and int8 adds conversions."),
]  # fmt: skip


def _photo(hue: int) -> Image.Image:
    picture = Image.new("RGB", (224, 224))
    for y in range(224):
        ImageDraw.Draw(picture).line([(0, y), (224, y)], fill=(90 + y // 3, 120 + hue // 3, 190 - y // 3))
    draw = ImageDraw.Draw(picture)
    draw.ellipse([50 + hue // 6, 60, 150 + hue // 6, 170], fill=(200 - hue // 2, 120 + hue // 4, 60))
    draw.rectangle([20, 170, 210, 215], fill=(60, 90 + hue // 3, 50))
    return picture


def _grid(kept: int, shift: int) -> list[list[int]]:
    """Prune far corners and merge neighbours, more of both the fewer tokens are kept."""
    gone = 1 - kept / 196
    rows = []
    for y in range(14):
        row = []
        for x in range(14):
            far = math.hypot(x - 7 - shift, y - 7)
            pruned = far > 11 - 5 * gone
            size = 1 if far < 4 else 1 + round(2.4 * gone)
            row.append(-1 if pruned else (y // size) * size * 14 + (x // size) * size)
        rows.append(row)
    return rows


def _table() -> list[dict[str, object]]:
    table: list[dict[str, object]] = []
    for runtime, factor in (("openvino", 1.0), ("onnxruntime", 1.35)):
        for k, (stage, precision, macs, size, top1, agree, fp32, best, note) in enumerate(ROWS):
            timing = {}
            for batch, base in (("1", 9.2 * factor), ("8", 64.0 * factor)):
                ms = base / fp32
                timing[batch] = {"median_ms": ms, "iqr_ms": 0.04 * ms, "ratio_torch": 1.3 * fp32, "ratio_fp32": fp32,
                                 "ratio_best_dense": best,
                                 "trusted": not (runtime == "onnxruntime" and k == 2)}  # fmt: skip
            table.append({"stage": stage, "runtime": runtime, "precision": precision, "macs": macs, "params": 5_717_416,
                          "file_bytes": size, "top1": top1, "top1_interval": [top1 - 0.038, top1 + 0.033],
                          "agreement": agree, "latency": timing, "note": note,
                          "chosen": runtime == "openvino" and k == 3})  # fmt: skip
    return table


def _profile() -> list[dict[str, object]]:
    """Dense in two precisions and the finished graph, in both runtimes; the finished one converts and picks."""
    dense = [("FullyConnected", "brgemm_avx512", 1, 1.9), ("MatMul", "brgemm_avx512", 1, 0.62),
             ("Softmax", "jit_avx512", 0, 0.33), ("MVN", "jit_avx512", 0, 0.21)]  # fmt: skip
    moves = [("Quantize", "jit_avx512", 0, 0.16), ("TopK", "jit_avx512", 0, 0.08), ("Gather", "ref_any", 0, 0.03)]
    rows: list[dict[str, object]] = []
    for runtime, factor in (("openvino", 8.0), ("onnxruntime", 11.0)):
        for stage, precision, width, ops in (("dense", "f32", "f32", dense), ("dense", "bf16", "bf16", dense),
                                             ("DiffRate + PTQ", "int8+bf16", "i8", dense + moves)):  # fmt: skip
            slow = factor * {"f32": 1.0, "bf16": 0.5, "i8": 0.3}[width]
            rows.append({"runtime": runtime, "stage": stage, "precision": precision, "batch": 8,
                         "int8_share": float(width == "i8"), "ops": [
                             {"type": t, "kernel": f"{k}_{width}" if p else k, "precision": width if p else "f32",
                              "product": bool(p), "ms": ms * slow, "count": 12} for t, k, p, ms in ops]})  # fmt: skip
    return rows


def _report() -> dict[str, object]:
    photos = []
    for i, name in enumerate(["red fox", "lighthouse", "teapot", "mountain bike"]):
        stream = io.BytesIO()
        _photo(60 * i).save(stream, "JPEG", quality=85)
        uri = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
        photos.append({"name": f"{i:016x}.jpg", "label": name, "dense": name, "finished": name if i else "grey fox",
                       "image": uri, "blocks": [_grid(k, i - 1) for k in KEPT]})  # fmt: skip
    parts = [f"blocks.{b}.{m}" for b in range(12) for m in ("attn.qkv", "attn.scores", "attn.values", "attn.proj",
                                                            "mlp.fc1", "mlp.fc2")]  # fmt: skip
    quantization = [{"layer": p, "bits_w": 8 if i % 7 else 10, "bits_a": 8, "gamma": 0.1 * (i % 5),
                     "error": 0.002 + 0.006 * abs(math.sin(i)) + 0.0002 * i} for i, p in enumerate(parts)]  # fmt: skip
    steps = list(range(60))
    curves = [{"phase": phase, "term": term, "steps": steps,
               "values": [scale * (math.exp(-s / 18) + 0.05 * math.sin(1.7 * s)) + 0.3 for s in steps]}
              for phase, term, scale in (("diffrate.search", "task", 1.0), ("diffrate.search", "diffrate.macs", 4.0),
                                         ("fit", "task", 0.6), ("fit", "manifold", 2.0))]  # fmt: skip
    return {
        "title": "ViT-Ti/16, 60 % of the MACs",
        "summary": {"Model": "vit_tiny_patch16_224", "Evaluation images": 333, "Calibration images": 64,
                    "Wall time": "4 min 51 s", "Threads": 2, "photographs": "CC-BY", "macs_dense": 1.258e9,
                    "ratio_fp32": 3.3},
        "table": _table(),
        "tokens": {"blocks": list(range(12)), "kept": [k + 1 for k in KEPT], "dense": 197,
                   "schedule": "keep 197 197 181 181 181 129 129 129 81 81 65 49"},
        "photos": photos,
        "quantization": quantization,
        "curves": curves,
        "phases": [{"phase": p, "steps": 60, "seconds": t, "cpu_seconds": 1.9 * t}
                   for p, t in (("diffrate.search", 71.4), ("fit", 132.0))],
        "profile": _profile(),
        "methods": {"DiffRate": {"facts": {"budget": "60%", "search steps": 60, "found": 0.5998}},
                    "PTQViT": {"facts": {"images": 32}, "tables": [
                        {"title": "Intervals", "rows": [{"layer": "blocks.0.attn.qkv", "weight": 0.0123}]}]}},
        "failed": [{"name": "broken.jpg", "reason": "truncated after 512 bytes"}],
        "environment": {"cpu": {"name": "Intel Xeon", "cores": 2, "features": ["avx512", "vnni", "amx"]},
                        "torch": "2.11.0", "openvino": "2025.3"},
        "recipe": "name: quickstart\nmodel: {name: vit_tiny_patch16_224}\nmethods:\n  - diffrate: {macs: '60%'}\n",
    }  # fmt: skip


@pytest.fixture
def fake_run(tmp_path: Path) -> Callable[..., Path]:
    """Return ``make(name="run", **overrides) -> run folder``."""

    def make(name: str = "run", **overrides: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps({**_report(), **overrides}))
        return folder

    return make
