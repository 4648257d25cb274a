"""Structured pruning of a small ViT on CIFAR-10 at equal latency: saliency, magnitude, chance, uniform width.

    python benchmarks/structured_pruning.py --data DATA --out FOLDER [--seeds 3]   train, prune, fine-tune
    python benchmarks/structured_pruning.py --out FOLDER --measure                 time it (quiet machine)

All arms but the uniform one share schedule, teacher and budget and differ in what scores a unit. What is
done is kept in FOLDER and not done again. DATA holds the CIFAR-10 files of the project's data folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gossamer as gs
from gossamer.core.schedule import Phase, Plan
from gossamer.core.stack import Stack
from gossamer.data.loading import StepLoader, batches
from gossamer.data.sources import open_data, take
from gossamer.data.transforms import eval_transform, train_transform
from gossamer.engine.loop import Loop, RunOptions
from gossamer.kits.structure.measuring import MeterOptions, measure_table
from gossamer.kits.teacher import bind_self
from gossamer.models.build import load_model
from gossamer.models.preprocessing import preprocessing
from gossamer.models.store import load, save
from gossamer.recipe import TrainSettings
from gossamer.tasks.classification import Classification, predictor

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
BATCH, DENSE_STEPS, ROUNDS, INTERVAL, FIT_STEPS = 64, 1200, 20, 5, 80
BUDGET = "50%"
TEST_IMAGES = 2000


def model_of(seed: int = 0) -> nn.Module:
    """Return the dense model, freshly initialised."""
    torch.manual_seed(seed)
    return load_model("vit_tiny_patch16_224", num_classes=10, **SHAPE)


class Bench:
    """Data, dense model and table of the experiment.

    Args:
        data: Folder with the CIFAR-10 files.
        out: Where results are kept.
    """

    def __init__(self, data: Path, out: Path) -> None:
        self.out = out
        self.train = open_data(f"npz:{data / 'cifar10_train_50000_q95.npz'}")
        test = open_data(f"npz:{data / 'cifar10_test_8000.npz'}")
        self.test = take(test, range(TEST_IMAGES))

    def loaders(self, seed: int, model: nn.Module) -> dict[str, Any]:
        """Return the training loader of a seed."""
        transform = train_transform(preprocessing(model), {"scale": (0.6, 1.0), "color_jitter": 0.0})
        return {"train": StepLoader(self.train, transform, BATCH, seed=seed)}

    def accuracy(self, model: nn.Module) -> float:
        """Return top-1 in percent on the test images."""
        pictures = batches(self.test, eval_transform(preprocessing(model)), 250)
        return 100 * Classification().evaluate(predictor(model), pictures).top1

    def run(self, methods: list[Any], fit_steps: int, seed: int, model: nn.Module, lr: float) -> dict[str, float]:
        """Train, and return accuracy after every phase."""
        seen: dict[str, float] = {}
        stack = Stack(methods)

        def after(index: int, phase: Phase, now: nn.Module) -> None:
            if phase.name != "fit":
                seen[phase.name] = self.accuracy(now)

        options = RunOptions(quiet=True, on_phase_end=after, dense_hook=lambda dense: bind_self(stack, dense))
        settings = TrainSettings(lr=lr, weight_decay=0.05, batch_size=BATCH)
        plan = Plan([Phase("fit", fit_steps, warmup=0.1)])
        loaders = self.loaders(seed, model)
        loop = Loop(stack, Classification(), loaders, plan, settings=settings, seed=seed, options=options)
        done = loop.run(model)
        seen["finished"] = self.accuracy(done)
        self.last = (done, stack)
        return seen

    def dense(self) -> Path:
        """Return the folder of the trained dense model."""
        folder = self.out / "dense"
        if not (folder / "model.json").is_file():
            found = self.run([], DENSE_STEPS, 0, model_of(), 1e-3)
            save(self.last[0], folder)
            print("dense", found, flush=True)
        return folder

    def table(self) -> str:
        """Return the file of the latency table."""
        path = self.out / "table.json"
        if not path.is_file():
            measure_table(model_of(), options=MeterOptions(batch=64), path=path)
        return str(path)


def arms(table: str) -> dict[str, tuple[Callable[[], list[Any]], int]]:
    """Return methods and fine-tuning steps by arm."""
    common: dict[str, Any] = {
        "latency": BUDGET, "table": table, "batch": 64, "rounds": ROUNDS, "interval": INTERVAL, "lr": 5e-4,
        "heads_first": False, "fit_kl_weight": 10.0, "kl_weight": 10.0, "fit_kl_temperature": 3.0,
    }  # fmt: skip

    def nvit(**options: Any) -> tuple[Callable[[], list[Any]], int]:
        return lambda: [gs.NViT(**{**common, **options})], FIT_STEPS

    def uniform() -> list[Any]:
        pruned = gs.MagnitudePruning(latency=BUDGET, table=table, batch=64, scope="uniform")
        return [pruned, gs.ManifoldDistillation(alpha=0.5, beta=0.0, tau=3.0)]

    return {
        "saliency": nvit(),
        "saliency, no latency term": nvit(eta=0.0),
        "saliency, heads first": nvit(heads_first=True),
        "per element": nvit(criterion="taylor_elem"),
        "magnitude": nvit(criterion="magnitude", eta=0.0),
        "random": nvit(criterion="random", eta=0.0),
        "uniform width": (uniform, FIT_STEPS + ROUNDS * INTERVAL),
    }


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if args.measure:
        measure(args.out)
        return
    torch.set_num_threads(1)
    bench = Bench(args.data, args.out)
    table, dense = bench.table(), bench.dense()
    for seed in range(args.seeds):
        for name, (make, steps) in arms(table).items():
            key = f"{name}/{seed}"
            if key in results:
                continue
            found = bench.run(make(), steps, seed, load(dense), 5e-4)
            model, stack = bench.last
            facts = next(iter(stack.describe(model).values()))["facts"]
            save(model, args.out / "models" / f"{name.replace(' ', '_')}-{seed}", stack=stack)
            results[key] = {**found, "predicted": facts["latency_share_predicted"]}
            file.write_text(json.dumps(results, indent=1))
            print(key, results[key], flush=True)
    show(results, bench.accuracy(load(dense)))


def show(results: dict[str, Any], dense: float) -> None:
    """Print accuracy before and after fine-tuning by arm: mean and standard deviation over seeds."""
    print(f"dense {dense:.1f}")
    for name in dict.fromkeys(k.rpartition("/")[0] for k in results):
        rows = [v for k, v in results.items() if k.rpartition("/")[0] == name]
        before = [r["nvit.prune"] for r in rows if "nvit.prune" in r]
        after = [r["finished"] for r in rows]

        def stated(values: list[float]) -> str:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            return f"{statistics.mean(values):5.1f} +- {spread:.1f}" if values else "    -     "

        predicted = statistics.mean(r["predicted"] for r in rows)
        print(f"{name:28s} {100 * predicted:5.1f}%  {stated(before)}  {stated(after)}  ({len(rows)} seeds)")


def measure(out: Path) -> None:
    """Time every saved model of seed 0 beside the dense one in OpenVINO and print predicted and measured shares."""
    folders = sorted((out / "models").glob("*-0"))
    rows = gs.bench([str(out / "dense"), *map(str, folders)], batch=[64], threads=2, runtime="openvino")
    results = json.loads((out / "results.json").read_text())
    for row in rows:
        key = Path(row["model"]).name.rpartition("-")[0].replace("_", " ") + "/0"
        predicted = results.get(key, {}).get("predicted")
        print(row["precision"], key, f"measured {1 / row['ratio']:.3f}", f"predicted {predicted}", row["reason"])


if __name__ == "__main__":
    main()
