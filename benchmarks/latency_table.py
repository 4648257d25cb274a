"""Latency tables against the clock: predict pruned models' share of the dense latency, then measure it.

    python benchmarks/latency_table.py --out FOLDER [--model deit_small_distilled_patch16_224] [--batch 8]

Measures a table (kept in FOLDER), prunes the model with random weights to 70% and 50% of its predicted latency in
several ways, exports dense and pruned models and times them side by side. Wants a quiet machine; the meter says if
it was not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import gossamer as gs
from gossamer.core.stack import Stack
from gossamer.cost.latency import bench
from gossamer.cost.ledger import cost
from gossamer.export.exporting import export
from gossamer.kits.structure.measuring import MeterOptions, measure_table
from gossamer.models.build import load_model
from gossamer.models.widths import widths_of
from gossamer.runtimes import get

WAYS = {
    "uniform": {"scope": "uniform"},
    "global": {},
    "random": {"scores": "random"},
    "heads and MLP": {"structures": ["head", "mlp"], "scope": "uniform"},
}


def main() -> None:
    """Measure, prune, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="deit_small_distilled_patch16_224")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    dense = load_model(args.model)
    path = args.out / f"{args.model}-{args.precision}-b{args.batch}.json"
    if not path.is_file():
        options = MeterOptions(precision=args.precision, batch=args.batch, threads=args.threads)
        measure_table(dense, options=options, path=path)
    names, models, predicted = ["dense"], [dense], [1.0]
    for share in ("70%", "50%"):
        for way, options in WAYS.items():
            here = {"batch": args.batch, "precision": args.precision, "threads": args.threads}
            method = gs.MagnitudePruning(latency=share, table=str(path), **here, **options)
            torch.manual_seed(0)
            stack = Stack([method])
            models.append(stack.prepare(load_model(args.model)).eval())
            names.append(f"{share} {way}")
            predicted.append(stack.describe(models[-1])["MagnitudePruning"]["facts"]["latency_share_predicted"])
    sessions = []
    for i, model in enumerate(models):
        folder = args.out / f"{path.stem}-{i}"
        graph = export(model, folder, format="openvino", batch=args.batch).graph
        sessions.append(get("openvino").load(graph, precision=args.precision, threads=args.threads))
    x = np.random.default_rng(0).standard_normal((args.batch, 3, 224, 224), dtype=np.float32)
    rows = []
    timings = bench(sessions, x, rounds=args.rounds)
    for name, model, share, t in zip(names, models, predicted, timings, strict=True):
        rows.append(
            {"model": name, "predicted": round(share, 4), "measured": round(1 / t.ratio, 4),
             "ms": round(t.median_ms, 2),
             "error": round(share * t.ratio - 1, 3), "macs": round(cost(model, saved=False).macs / 1e9, 3),
             "widths": widths_of(model).to_json(), "trusted": t.trusted, "reason": t.reason}
        )  # fmt: skip
        print({k: v for k, v in rows[-1].items() if k != "widths"}, flush=True)
    (args.out / f"{path.stem}-checked.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
