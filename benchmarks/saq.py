"""SAQ against plain quantization-aware training on CIFAR-10 images, and searched against uniform widths.

``python benchmarks/saq.py OUT [small]`` trains a float PreAct ResNet-8 (width 8) once, then every item for three seeds,
one run folder each; what is done is not done again, an interrupted run goes on. One thread, about 45 minutes of one
core (``small``: 10, too short to say more than that it works). The table is printed and written to ``OUT/saq.json``.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from gossamer.core.schedule import Step
from gossamer.data.loading import batches
from gossamer.data.sources import open_data
from gossamer.data.transforms import eval_transform
from gossamer.engine.loop import Loop
from gossamer.engine.options import RunOptions
from gossamer.kits.qat import qat_layers
from gossamer.kits.sharpness import Ascent, measure_sharpness
from gossamer.models.store import save
from gossamer.pipeline.setup import set_up
from gossamer.recipe import Recipe
from gossamer.tasks.classification import Classification, logits_of, predictor

DATA = "npz:../shared/data/"
TRAIN, HELD = f"{DATA}cifar10_train_50000_q95.npz[0:10000]", f"{DATA}cifar10_train_50000_q95.npz[20000:21000]"
TEST = f"{DATA}cifar10_test_8000.npz[0:4000]"
AUGMENT = {"scale": [0.6, 1.0], "ratio": [0.9, 1.1], "color_jitter": None}
SEEDS = (0, 1, 2)
BATCH, BITS = 64, 3
RADII = (0.03, 0.1)
"""Radii at which every model's sharpness is measured."""
COMMON = {"clip_start": "mse", "clip_decay": 1e-4}
SIZES = {
    "full": {"float": 3000, "steps": 1000, "search": 400, "rho": 0.1, "candidates": 10, "batches": 6},
    "small": {"float": 1600, "steps": 120, "search": 50, "rho": 0.03, "candidates": 6, "batches": 3},
}


def items(size: dict[str, Any]) -> dict[str, tuple[dict[str, Any], int]]:
    """Return the method of every item and the steps of its training; sharpness-aware steps cost two."""
    steps = size["steps"]
    sharp = {"bits": BITS, "rho": size["rho"], "norm_updates": "first", **COMMON}
    search = {
        "search": True, "target_bops": f"{BITS}bit", "search_steps": size["search"], "warmup": 0.25, "policy_lr": 0.01,
        "baseline": 0.9, "candidates": size["candidates"], "derive_batches": size["batches"], "band": 0.03,
    }  # fmt: skip
    return {
        "qat": ({"qat": {"bits": BITS, **COMMON}}, steps),
        "saq": ({"saq": sharp}, steps),
        "saq, searched": ({"saq": {**sharp, **search}}, steps),
        "qat, twice as long": ({"qat": {"bits": BITS, **COMMON}}, 2 * steps),
    }


def recipe(model: Any, methods: list[dict[str, Any]], steps: int, seed: int, lr: float) -> Recipe:
    """Return the recipe of one run."""
    searching = any(options.get("search") for m in methods for options in m.values())
    return Recipe(
        model=model,
        data={"train": TRAIN, "augment": AUGMENT, "search_share": 0.2 if searching else 0.0},
        methods=methods,
        train={
            "steps": steps, "batch_size": BATCH, "optimizer": "sgd", "lr": lr, "weight_decay": 1e-4,
            "checkpoint_every": 100,
        },
        seed=seed,
    )  # fmt: skip


def trained(run: Recipe, folder: Path) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    """Return the model before and after ``finish``, and the set-up."""
    ready = set_up(run)
    options = RunOptions(resume=True, identity=run.identity(), mark_finished=False)
    loop = Loop(
        ready.stack, ready.task, ready.loaders, ready.plan,
        settings=run.train, run_dir=folder, seed=run.seed, options=options,
    )  # fmt: skip
    model = loop.train(ready.model)
    settle(model, ready)
    before = measure(model, ready) if qat_layers(model) else {}
    return model, loop.finish(model), (ready, before)


@torch.no_grad()
def settle(model: torch.nn.Module, ready: Any, count: int = 30) -> None:
    """Replace the running statistics of all norms by their mean over training batches.

    Those of a short training lag behind the weights: they alone cost 0.09 nats of held-out loss and raised the measured
    sharpness tenfold, whatever the method.
    """
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    kept = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # torch then averages evenly
    model.train()
    for i in range(count):
        model(ready.loaders["train"](Step("settle", "main", i, count))["image"])
    for m, momentum in zip(norms, kept, strict=True):
        m.momentum = momentum


def task_loss(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Return the cross-entropy."""
    return Classification().cross_entropy(logits_of(model(batch["image"])), batch["target"])


def measure(model: torch.nn.Module, ready: Any) -> dict[str, float]:
    """Return held-out loss and sharpness of a trainable model (the paper's measure)."""
    data = list(batches(open_data(HELD), eval_transform(ready.preprocessing), 100))
    found = {r: measure_sharpness(model, data, task_loss, Ascent(rho=r)) for r in RADII}
    return {"loss": found[RADII[0]].loss, **{f"sharpness at {r:g}": m.rise for r, m in found.items()}}


def accuracy(model: torch.nn.Module, ready: Any) -> float:
    """Return the top-1 accuracy in percent on the test images."""
    images = batches(open_data(TEST), eval_transform(ready.preprocessing), 200)
    return 100 * Classification().evaluate(predictor(model), images).top1


def float_model(out: Path, steps: int) -> Path:
    """Train the float model once; returns its folder."""
    folder = out / "float-model"
    if not (folder / "model.json").is_file():
        dense = {"name": "preact_resnet8", "num_classes": 10, "options": {"width": 8}}
        model, _, (ready, _) = trained(recipe(dense, [], steps, 0, 0.1), out / "float")
        (out / "float.json").write_text(json.dumps({"top1": accuracy(model.eval(), ready)}))
        save(model, folder)
    return folder


def one(out: Path, name: str, seed: int, what: tuple[dict[str, Any], int]) -> dict[str, Any]:
    """Run one item for one seed, or read what an earlier call found."""
    folder = out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    done = folder / "result.json"
    if not done.is_file():
        method, steps = what
        _, finished, (ready, before) = trained(recipe(str(out / "float-model"), [method], steps, seed, 0.02), folder)
        facts = next(iter(ready.stack.describe(finished).values()))["facts"]
        found = {**before, "top1": accuracy(finished, ready), "bops": facts["BOPs per image"]}
        done.write_text(json.dumps(found))
    return json.loads(done.read_text())


def main(out: Path, size: str = "full") -> None:
    """Run everything and print the table: mean and standard deviation over the seeds."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    float_model(out, SIZES[size]["float"])
    table: dict[str, list[dict[str, Any]]] = {}
    for name, what in items(SIZES[size]).items():
        table[name] = [one(out, name, seed, what) for seed in SEEDS]
        shown = {k: [r[k] for r in table[name]] for k in table[name][0]}
        spread = {k: (round(statistics.mean(v), 4), round(statistics.stdev(v), 4)) for k, v in shown.items()}
        print(f"{name:22}", spread, flush=True)
        (out / "saq.json").write_text(json.dumps(table, indent=1))
    print("float", json.loads((out / "float.json").read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
