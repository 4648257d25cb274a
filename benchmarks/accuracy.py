"""Paired accuracy on the embedded ImageNet ViT-Ti/16 and the evaluation photographs.

    python benchmarks/accuracy.py --out benchmarks/accuracy.json --markdown benchmarks/accuracy.md

Dense, ToMe and DiffRate (both forms) at 60% of the MACs, 8 bits by PTQ for ViT and by NNCF. Every row is
evaluated in OpenVINO f32 (int8 kernels where the graph has them); differences are against the dense row,
and of PTQ against NNCF, image by image.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.core import registry
from gossamer.core.schedule import Phase, Plan
from gossamer.core.stack import Stack
from gossamer.cost.ledger import cost
from gossamer.data.loading import StepLoader, batches
from gossamer.data.sources import open_data, take
from gossamer.data.transforms import eval_transform
from gossamer.engine.loop import Loop
from gossamer.export.exporting import export
from gossamer.models.build import load_model
from gossamer.models.preprocessing import preprocessing
from gossamer.pipeline.measure import Prepared, runtime_score
from gossamer.recipe import TrainSettings
from gossamer.runtimes import get
from gossamer.runtimes.openvino import core, import_openvino
from gossamer.tasks.classification import Classification, Evaluation
from gossamer.tasks.paired import compare

BATCH = 16
EXTENDED = {"n_candidates": 12, "max_iter": 2, "per_channel": True, "unsigned_softmax": True, "equalise": 0.8}
"""PTQ for ViT with its labelled extensions and a short step search."""


def finished(model: nn.Module, steps_batch: int, *methods: tuple[str, dict[str, Any]]) -> nn.Module:
    """Return ``model`` under methods, searched and calibrated on the embedded search and calibration photographs."""
    pre = preprocessing(model)
    stack = Stack([registry.build(name, options) for name, options in methods])
    search = StepLoader(open_data("embedded:search"), eval_transform(pre), steps_batch)
    calibration = StepLoader(open_data("embedded:calibration"), eval_transform(pre), 32)
    loop = Loop(
        stack, Classification(), {"train": search, "calibration": calibration}, Plan([Phase("fit", 0)]),
        settings=TrainSettings(batch_size=steps_batch, weight_decay=0.0),
    )  # fmt: skip
    return loop.run(copy.deepcopy(model)).eval()


def nncf_int8(xml: Path, folder: Path, model: nn.Module) -> Path | None:
    """Return NNCF's int8 of a graph, calibrated on the same 32 photographs; None where it is not installed."""
    try:
        import nncf
    except ImportError:
        return None
    ov = import_openvino()

    images = next(iter(batches(open_data("embedded:calibration"), eval_transform(preprocessing(model)), 32)))["image"]
    chunks = [images[i : i + BATCH].numpy() for i in range(0, 32, BATCH)]
    graph = nncf.quantize(
        core().read_model(xml), nncf.Dataset(chunks), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(chunks)
    )
    out = folder / "nncf.xml"
    ov.save_model(graph, out, compress_to_fp16=False)
    return out


def evaluate(graph: Path, images: Prepared) -> Evaluation:
    """Evaluate a static graph in OpenVINO at f32."""
    session = get("openvino").load(graph, precision="f32")
    return runtime_score(session, images, Classification(), BATCH)


def main(argv: list[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--images", type=int, help="use the first images only")
    parser.add_argument(
        "--search", type=json.loads, default={"search_steps": 60, "lr": 0.05, "budget_unit": "relative"}
    )
    parser.add_argument("--ptq", type=json.loads, default=EXTENDED)
    args = parser.parse_args(argv)
    dense = load_model("vit_tiny_patch16_224@embedded").eval()
    images = open_data("embedded:eval")
    if args.images:
        images = take(images, range(args.images))
    loaded = Prepared(images, preprocessing(dense), BATCH, Classification())
    variants: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "dense": [],
        "ToMe 60%": [("tome", {"macs": "60%"})],
        "DiffRate 60%": [("diffrate", {"macs": "60%", **args.search})],
        "DiffRate 60%, device-aware": [("diffrate", {"macs": "60%", "device_aware": True, **args.search})],
        "PTQ for ViT, int8": [("ptq_vit", args.ptq)],
        "PTQ for ViT, int8, max-abs steps": [("ptq_vit", {**args.ptq, "max_iter": 0})],
        "min-max, int8": [("ptq_minmax", {})],
    }
    found: dict[str, Evaluation] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, methods in variants.items():
            model = finished(dense, 16, *methods) if methods else dense
            graph = export(model, Path(scratch) / str(len(found)), format="openvino", batch=BATCH).graph
            found[name] = evaluate(graph, loaded)
            rows.append({"variant": name, "macs": cost(model, saved=False).macs})
            if name == "dense" and (peer := nncf_int8(graph, Path(scratch), dense)) is not None:
                found["NNCF int8"] = evaluate(peer, loaded)
                rows.append({"variant": "NNCF int8", "macs": rows[0]["macs"]})
            print(name, round(100 * found[name].top1, 2), flush=True)
    for row in rows:
        got = found[row["variant"]]
        row |= {"images": len(got.targets), "top1": got.top1, "interval": list(got.interval)}
        row["against dense"] = compare(found["dense"].logits, got.logits, got.targets).to_json()
        if "NNCF int8" in found and "int8" in row["variant"]:
            row["against NNCF"] = compare(found["NNCF int8"].logits, got.logits, got.targets).to_json()
    args.out.write_text(json.dumps(rows, indent=1, default=float), encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(table(rows), encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "# Paired accuracy, embedded ViT-Ti/16, evaluation photographs, OpenVINO f32",
        "",
        "| variant | GMACs | images | top-1 | interval | agreement with dense | KL(dense, row) | McNemar p |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        p = r["against dense"]
        lines.append(
            f"| {r['variant']} | {r['macs'] / 1e9:.3f} | {r['images']} | {100 * r['top1']:.2f} | "
            f"{100 * r['interval'][0]:.1f}..{100 * r['interval'][1]:.1f} | {100 * p['agreement']:.2f} | "
            f"{p['kl']:.4f} | "
            f"{p['p_value']:.3f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
