"""Manifold distillation on Fashion-MNIST: labels, logits, logits and relations, relations alone; three seeds.

    python benchmarks/manifold_distillation.py --data ../shared/data --out results.json

A ViT teacher (patch 4, width 96, 6 blocks) is trained once for 6 epochs on 10,000 images; students (width 48,
4 blocks) for 4 epochs, evaluated on the first 2,000 test images (about 14 minutes on two idle CPU cores). The
mechanistic figure is the unweighted intra-image term on held-out images, averaged over the pairs (first two and
last two blocks).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
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
from gossamer.engine.options import RunOptions
from gossamer.kits.teacher import FeatureTap, block_paths
from gossamer.methods.manifold_distillation import ManifoldDistillation, maths
from gossamer.models.build import load_model
from gossamer.models.preprocessing import preprocessing
from gossamer.recipe import TrainSettings
from gossamer.tasks.classification import Classification, predictor

TEACHER = {"img_size": 28, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 4}
STUDENT = {"img_size": 28, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
PAIRS = [(0, 0), (1, 1), (2, 4), (3, 5)]
BATCH = 100


def build(options: dict[str, int], seed: int) -> nn.Module:
    """Return a seeded ViT for 28 x 28 images and 10 classes."""
    torch.manual_seed(seed)
    return load_model("vit_tiny_patch16_224", num_classes=10, **options)


def arms(teacher: nn.Module) -> dict[str, list[Method]]:
    """Return the methods of each arm."""
    return {
        "labels": [],
        "logits": [ManifoldDistillation(teacher, beta=0.0)],
        "logits and relations": [ManifoldDistillation(teacher, pairs=PAIRS)],
        "labels and relations": [ManifoldDistillation(teacher, pairs=PAIRS, alpha=0.0)],
    }


def train(
    model: nn.Module, methods: list[Method], loader: StepLoader, epochs: int, seed: int
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train a model; returns it with the rows of its log."""
    rows: list[dict[str, Any]] = []
    steps = epochs * len(loader.source) // BATCH
    settings = TrainSettings(steps=steps, lr=1e-3, weight_decay=0.05, batch_size=BATCH)
    loop = Loop(
        Stack(methods), Classification(), {"train": loader}, [Phase("fit", steps, warmup=0.1)],
        settings=settings, seed=seed, options=RunOptions(on_row=rows.append),
    )  # fmt: skip
    return loop.run(model), rows


@torch.no_grad()
def intra(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """Return the mean intra-image term over the pairs, on images [B, 3, 28, 28]."""
    found = []
    ours, theirs = block_paths(student), block_paths(teacher)
    with (
        FeatureTap(student.eval(), ours, training_only=False) as a,
        FeatureTap(teacher.eval(), theirs, training_only=False) as b,
    ):
        student(images)
        teacher(images)
        seen, taught = a.read(), b.read()
    for s, t in PAIRS:
        units = (maths.unit_tokens(x[:, 1:]) for x in (seen[ours[s]], taught[theirs[t]]))
        found.append(maths.intra_loss(*units).item())
    return statistics.mean(found)


def main() -> None:
    """Run all arms and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the Fashion-MNIST .npz files")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, nargs=2, default=(6, 4), metavar=("TEACHER", "STUDENT"))
    parser.add_argument("--images", type=int, default=10_000)
    args = parser.parse_args()
    start = time.perf_counter()
    pre = preprocessing(build(STUDENT, 0))
    source = open_data(f"npz:{args.data}/fashion_mnist_train_10000.npz[0:{args.images}]")
    held_out = open_data(f"npz:{args.data}/fashion_mnist_test_10000.npz[0:2000]")
    loader = StepLoader(source, eval_transform(pre), BATCH)
    evaluation = list(batches(held_out, eval_transform(pre), 250))
    score = lambda m: 100 * Classification().evaluate(predictor(m), evaluation).top1  # noqa: E731
    teacher, _ = train(build(TEACHER, 0), [], loader, args.epochs[0], seed=0)
    result: dict[str, Any] = {"teacher": score(teacher), "arms": {}}
    print(f"teacher {result['teacher']:.2f} after {time.perf_counter() - start:.0f} s", flush=True)
    for seed in range(args.seeds):
        for name, methods in arms(teacher).items():
            model, rows = train(build(STUDENT, seed + 1), methods, loader, args.epochs[1], seed)
            entry = result["arms"].setdefault(name, {"top1": [], "intra": [], "curve": []})
            entry["top1"].append(score(model))
            entry["intra"].append(intra(model, teacher, evaluation[0]["image"]))
            terms = [r["terms"]["distil_intra"] for r in rows if "distil_intra" in r.get("terms", {})]
            fifth = max(1, len(terms) // 5)
            entry["curve"].append(
                [statistics.mean(terms[i : i + fifth]) for i in range(0, len(terms) - fifth + 1, fifth)]
            )
            print(f"seed {seed} {name:22s} {entry['top1'][-1]:.2f}  intra {entry['intra'][-1]:.4f}", flush=True)
    result["seconds"] = time.perf_counter() - start
    for name, entry in result["arms"].items():
        spread = statistics.stdev(entry["top1"]) if len(entry["top1"]) > 1 else 0.0
        top1, relation = statistics.mean(entry["top1"]), statistics.mean(entry["intra"])
        print(f"{name:22s} {top1:.2f} +- {spread:.2f}  intra {relation:.4f}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
