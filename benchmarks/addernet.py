"""AdderNet's arms on real images: gradients, adaptive rate, l_p schedule, bytes, against the network with products.

    python benchmarks/addernet.py OUT [--data ../shared/data] [--seeds 3] [--only resnet20] [--arms "full;products"]

``fashion``: ResNet-8 of width 8 on 3,000 Fashion-MNIST images, 4 epochs, tested on 2,000. ``cifar``: ResNet-20 of
width 8 on 3,000 CIFAR-10 images, 4 epochs, tested on 2,000. ``resnet20``: the whole ResNet-20 on 10,000 images, 6
epochs, tested on 4,000; one core takes 5 to 8 minutes a run. ``large``, for a GPU: 20,000 images, 12 epochs, tested on
8,000. Every run has a folder of its own under OUT; what is done is not done again, an interrupted run goes on. A run's
accuracy is also taken after every epoch on the first 1,000 test images (``curve``, norms as they are), after new
batch-norm statistics from 32 batches (``norms``) and of its 8-bit form (``bytes``). The table is printed and, with
every finished run under OUT, written to ``OUT/addernet.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.core.method import Method
from gossamer.core.schedule import Step
from gossamer.core.stack import Stack
from gossamer.data.loading import batches
from gossamer.data.sources import open_data
from gossamer.data.transforms import eval_transform
from gossamer.engine.loop import Loop
from gossamer.engine.options import RunOptions
from gossamer.kits.norm_statistics import reestimate_norms
from gossamer.pipeline.setup import set_up
from gossamer.recipe import Recipe
from gossamer.tasks.classification import Classification, predictor

ARMS: dict[str, dict[str, Any] | None] = {
    "products": None,
    "full": {},
    "l_p 2 to 1": {"gradient": "lp", "norm_batches": 0},
    "sign": {"gradient": "sign"},
    "full, not clipped": {"clip": False},
    "full, not adaptive": {"adaptive": False},
}
FASHION = {
    "arms": tuple(ARMS), "train": "fashion_mnist_train_10000.npz[0:3000]",
    "test": "fashion_mnist_test_10000.npz[0:2000]",
    "model": {"name": "resnet8_cifar", "num_classes": 10, "options": {"width": 8}}, "epochs": 4, "batch_size": 128,
    "augment": {"no_aug": True},
}  # fmt: skip
CIFAR = {
    "arms": ("full", "full, not adaptive", "products"), "train": "cifar10_train_50000_q95.npz[0:3000]",
    "test": "cifar10_test_8000.npz[0:2000]", "epochs": 4, "batch_size": 64,
    "model": {"name": "resnet20_cifar", "num_classes": 10, "options": {"width": 8}},
    "augment": {"scale": [0.6, 1.0], "ratio": [0.9, 1.1], "color_jitter": None},
}  # fmt: skip
WHOLE = CIFAR | {
    "model": {"name": "resnet20_cifar", "num_classes": 10}, "train": "cifar10_train_50000_q95.npz[0:10000]",
    "test": "cifar10_test_8000.npz[0:4000]", "epochs": 6,
}  # fmt: skip
LARGE = WHOLE | {
    "arms": ("products", "full", "l_p 2 to 1", "sign", "full, not adaptive"),
    "train": "cifar10_train_50000_q95.npz[0:20000]", "test": "cifar10_test_8000.npz", "epochs": 12, "batch_size": 128,
}  # fmt: skip
SETS: dict[str, dict[str, Any]] = {"fashion": FASHION, "cifar": CIFAR, "resnet20": WHOLE, "large": LARGE}
NORM_BATCHES = 32
FEW = 1000


class Curve(Method):
    """Keeps a model's accuracy every so many steps; changes nothing.

    Args:
        every: Steps between two evaluations.
        score: Accuracy of a model.
    """

    def __init__(self, every: int, score: Callable[[nn.Module], float]) -> None:
        self.every, self.score = every, score
        self.points: list[float] = []

    def after_step(self, model: nn.Module, step: Step) -> None:
        if (step.index + 1) % self.every == 0:
            self.points.append(self.score(model))

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.points = list(state["points"])


def recipe(data: Path, settings: dict[str, Any], arm: str, seed: int) -> Recipe:
    """Return the recipe of one run."""
    options = ARMS[arm]
    return Recipe(
        model=settings["model"],
        data={"train": f"npz:{data / settings['train']}", "augment": settings["augment"]},
        methods=[] if options is None else [{"addernet": {**options, "seed": seed}}],
        train={
            "epochs": settings["epochs"], "batch_size": settings["batch_size"], "optimizer": "momentum", "lr": 0.1,
            "weight_decay": 5e-4, "min_lr_ratio": 0.0, "checkpoint_every": 20,
        },
        seed=seed,
    )  # fmt: skip


def accuracy(data: Path, model: nn.Module, ready: Any, test: str) -> float:
    """Return the top-1 accuracy in percent."""
    images = batches(open_data(f"npz:{data / test}"), eval_transform(ready.preprocessing), 200)
    return round(100 * Classification().evaluate(predictor(model), images).top1, 2)


def one(data: Path, out: Path, name: str, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm, or read what it left."""
    settings, folder = SETS[name], out / name / arm.replace(" ", "-").replace(",", "") / str(seed)
    done = folder / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    run = recipe(data, settings, arm, seed)
    ready = set_up(run)
    options = RunOptions(resume=True, identity=run.identity(), mark_finished=False, quiet=True)
    few = settings["test"].partition("[")[0] + f"[0:{FEW}]"
    curve = Curve(ready.plan[0].steps // settings["epochs"], lambda m: accuracy(data, m, ready, few))
    loop = Loop(
        Stack([*ready.stack.methods, curve]), ready.task, ready.loaders, ready.plan, settings=run.train,
        run_dir=folder, seed=seed, options=options,
    )  # fmt: skip
    started = time.process_time()
    model = loop.train(ready.model).cpu()
    seconds = time.process_time() - started
    found = {"set": name, "arm": arm, "seed": seed, "top1": accuracy(data, model, ready, settings["test"])}
    found["curve"] = curve.points
    draws = (ready.loaders["train"](Step("settle", "main", k, NORM_BATCHES))["image"] for k in range(NORM_BATCHES))
    reestimate_norms(model, draws)
    found |= {"norms": accuracy(data, model, ready, settings["test"]), "processor s": round(seconds)}
    if ARMS[arm] is not None:
        found["bytes"] = accuracy(data, in_bytes(model, ready), ready, settings["test"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [sum(row["terms"].values()) for row in rows if row.get("turn") == "main"]
    found["last loss"] = round(statistics.mean(losses[-20:]), 3) if losses else None
    done.write_text(json.dumps(found, indent=1))
    return found


def in_bytes(model: nn.Module, ready: Any) -> nn.Module:
    """Return the 8-bit form of a trained model."""
    from gossamer.methods.addernet.layers import quantize_adder
    from gossamer.methods.addernet.method import measure_grids

    images = ready.loaders["calibration"](Step("ranges", "work", 0, 1))["image"]
    return quantize_adder(model.eval(), measure_grids(model, images))


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and spread of every arm."""
    found = []
    for key in dict.fromkeys((r["set"], r["arm"]) for r in rows):
        own = [r for r in rows if (r["set"], r["arm"]) == key]
        line: dict[str, Any] = {"set": key[0], "arm": key[1], "seeds": len(own)}
        for figure in ("top1", "norms", "bytes", "last loss", "processor s"):
            values = [r[figure] for r in own if r.get(figure) is not None]
            spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 and figure != "processor s" else ""
            line[figure] = f"{statistics.mean(values):.2f}{spread}" if values else ""
        found.append(line)
    return found


def main() -> None:
    """Run every arm and seed that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=SETS, help="one of the sets")
    parser.add_argument("--arms", help="some of the arms, separated by semicolons")
    options = parser.parse_args()
    chosen = options.arms.split(";") if options.arms else list(ARMS)
    for name in [options.only] if options.only else ("fashion", "cifar"):
        for seed in range(options.seeds):
            for arm in (a for a in SETS[name]["arms"] if a in chosen):
                print(one(options.data, options.out, name, arm, seed), flush=True)
    rows = [json.loads(file.read_text()) for file in sorted(options.out.glob("*/*/*/result.json"))]
    table = summary(rows)
    (options.out / "addernet.json").write_text(json.dumps({"runs": rows, "table": table}, indent=1) + "\n")
    for line in table:
        print(line)


if __name__ == "__main__":
    main()
