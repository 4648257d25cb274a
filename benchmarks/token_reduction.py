"""Token reduction at equal MACs on the embedded ImageNet ViT-Ti: DiffRate against ToMe and random lists.

    python benchmarks/token_reduction.py --out benchmarks/token_reduction.json --markdown benchmarks/token_reduction.md

Every figure is paired with the dense model on the same photographs (the evaluation half of the embedded set,
never seen by the search). Takes about 10 minutes on two idle cores. Speed is in ``speed.py``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.method import Method
from gossamer.core.schedule import Phase
from gossamer.core.stack import Stack
from gossamer.data.loading import StepLoader, batches
from gossamer.data.sources import open_data
from gossamer.data.transforms import eval_transform
from gossamer.engine.loop import Loop
from gossamer.kits.token_reduction import token_macs
from gossamer.methods.diffrate import DiffRate
from gossamer.methods.diffrate.schedules import Free, Schedule, fit_schedule, resolve_schedule
from gossamer.methods.tome import ToMe
from gossamer.models.build import load_model
from gossamer.models.preprocessing import preprocessing
from gossamer.models.timm_adapter import token_view
from gossamer.tasks.classification import Classification, predictor
from gossamer.tasks.paired import compare

MODEL = "vit_tiny_patch16_224@embedded"
COLUMNS = (
    "MACs", "top-1", "agreement", "difference, points", "95% interval", "McNemar p", "KL", "tokens after each block",
)  # fmt: skip


def random_schedule(model: nn.Module, macs: str, seed: int) -> dict[str, list[int]]:
    """Return falling random counts, moved onto the budget; half is pruned, half merged."""
    view = token_view(model)
    cost, depth = token_macs(model, view), len(view.blocks)
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(2, view.num_tokens + 1, (depth - 1,), generator=draw).sort(descending=True).values.tolist()
    merge = [view.num_tokens, *counts]
    prune = [(a + b) // 2 for a, b in zip([view.num_tokens, *merge], merge, strict=False)]
    flat = [1.0] * view.num_tokens
    free = [None, *[Free(flat, flat, 1, 2)] * (depth - 1)]
    target = int(float(macs.rstrip("%")) / 100 * cost.dense)
    fitted = fit_schedule(Schedule.monotone(prune, merge, view.num_tokens), free, cost, target)
    return {"prune": list(fitted.prune), "merge": list(fitted.merge)}


def released_schedule(model: nn.Module, name: str, macs: str) -> dict[str, list[int]]:
    """Return a released list moved onto the budget."""
    view = token_view(model)
    cost = token_macs(model, view)
    start = resolve_schedule(name, len(view.blocks), view.num_tokens, view.num_prefix)

    def around(count: int) -> list[float]:
        return torch.sigmoid((count - torch.arange(view.num_tokens)) / 8).tolist()

    free = [None, *(Free(around(p), around(m), 1, 2) for p, m in zip(start.prune[1:], start.merge[1:], strict=True))]
    fitted = fit_schedule(start, free, cost, int(float(macs.rstrip("%")) / 100 * cost.dense))
    return {"prune": list(fitted.prune), "merge": list(fitted.merge)}


def arms(model: nn.Module, macs: str, steps: int) -> Iterator[tuple[str, Method]]:
    """Yield the methods to compare, by name."""
    search = {"macs": macs, "search_steps": steps, "lr": 0.05, "budget_unit": "relative"}
    yield "ToMe, constant r", ToMe(macs=macs)
    yield "ToMe, decreasing r", ToMe(macs=macs, inflection=-1.0)
    for seed in range(3):
        yield f"random list {seed}", DiffRate(schedule=random_schedule(model, macs, seed))
    yield "DiffRate, no search (ramp)", DiffRate(**{**search, "search_steps": 1, "lr": 0.0})
    yield "DiffRate, searched on labels", DiffRate(**search)
    yield "DiffRate, searched on the dense answers", DiffRate(**search, targets="dense")
    aware = DiffRate(**search, targets="dense", device_aware=True)
    yield "DiffRate, device-aware, searched on the dense answers", aware
    yield "DiffRate, released deit_tiny/0.8", DiffRate(schedule=released_schedule(model, "deit_tiny/0.8", macs))


def finished(model: nn.Module, method: Method, loader: StepLoader) -> nn.Module:
    """Return the model under a method, without training of its weights."""
    loop = Loop(Stack([method]), Classification(label_smoothing=0.1), {"train": loader}, [Phase("fit", 0)])
    return loop.run(copy.deepcopy(model)).eval()


def row(name: str, method: Method, model: nn.Module, logits: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Return one line of the table: ``logits`` are those of the dense model, of this one, and the targets."""
    paired, facts = compare(*logits), method.describe(model)
    return {
        "variant": name,
        "MACs": round(facts["facts"]["macs_share"], 4),
        "top-1": round(100 * paired.top1_b, 2),
        "agreement": round(100 * paired.agreement, 2),
        "difference, points": round(paired.difference_points, 2),
        "95% interval": [round(v, 2) for v in paired.interval_points],
        "McNemar p": round(paired.p_value, 4),
        "KL": round(paired.kl, 4),
        "tokens after each block": facts["tokens"]["after_merge"],
        "tokens after pruning": facts["tokens"]["after_prune"],
    }


def table(result: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    head = f"# Token reduction at {result['macs']} of the MACs, {MODEL}, {result['images']} photographs"
    note = (
        f"Dense: top-1 {result['dense_top1']:.2f}. Agreement, difference, interval (paired bootstrap), p (exact "
        f"McNemar) and KL (dense || reduced, nats) are against the dense model. Searches: "
        f"{result['steps']} steps of batch "
        f"{result['batch']} on {result['search_images']} other photographs, seed 0."
    )
    lines = [head, "", note, "", "| variant | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * (len(COLUMNS) + 1)]
    lines += [f"| {r['variant']} | " + " | ".join(str(r[c]) for c in COLUMNS) + " |" for r in result["rows"]]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--macs", default="60%")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--images", type=int, help="evaluate on the first so many")
    parser.add_argument("--only", help="only variants whose name contains this")
    args = parser.parse_args()
    model = load_model(MODEL).eval()
    transform = eval_transform(preprocessing(model))
    source = open_data("embedded:search")
    loader = StepLoader(source, transform, args.batch)
    held_out = open_data("embedded:eval" + (f"[0:{args.images}]" if args.images else ""))
    evaluation = list(batches(held_out, transform, 32))
    dense = Classification().evaluate(predictor(model), evaluation)
    result: dict[str, Any] = {
        "macs": args.macs, "images": len(evaluation) and len(dense.targets), "dense_top1": 100 * dense.top1,
        "steps": args.steps, "batch": args.batch, "search_images": len(source), "rows": [],
    }  # fmt: skip
    for name, method in arms(model, args.macs, args.steps):
        if args.only and args.only not in name:
            continue
        start = time.perf_counter()
        reduced = finished(model, method, loader)
        found = Classification().evaluate(predictor(reduced), evaluation)
        result["rows"].append(row(name, method, reduced, (dense.logits, found.logits, dense.targets)))
        print(f"{name}: {result['rows'][-1]} ({time.perf_counter() - start:.0f} s)", flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
