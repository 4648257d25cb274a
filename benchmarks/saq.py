"""SAQ against plain quantization-aware training on CIFAR-10 images, and searched against uniform widths.

    python benchmarks/saq.py OUT [--data ../shared/data] [--size small] [--part 0/4]

Trains a float PreAct ResNet-8 once, then every item for three seeds, one run folder each; what is done is not done
again, an interrupted run goes on. ``--part i/n`` runs every n-th job, so that n processes share the work; a call
without it prints the table and writes ``OUT/saq.json``. ``full`` is ten epochs of 10,000 images for each job: minutes
on a GPU that several processes share, hours on one core. ``few`` is 31 epochs of 1,000 images, where plain training
overfits; about half an hour of one core. ``small`` takes 10 minutes of one core: too short to say more than that it
works. ``mobile`` (with ``--seeds 3 4 5``) is a narrow MobileNetV2 trained on 45,000 images, whose layers differ most
in what a bit costs them: widths searched within the BOPs of 3 and 4 bits against equal ones; of one core 9 minutes
for the float model, 2.5 a search with its training, 40 s a training. Every run keeps the widths and the candidates in
its ``told.json``. glibc hands large buffers back to the system after every layer: with ``MALLOC_MMAP_THRESHOLD_`` and
``MALLOC_TRIM_THRESHOLD_`` at 8589934592 the steps take a quarter less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gossamer.core.schedule import Step
from gossamer.data.loading import batches
from gossamer.data.sources import open_data
from gossamer.data.transforms import eval_transform
from gossamer.engine.loop import Loop
from gossamer.engine.options import RunOptions
from gossamer.kits.norm_statistics import reestimate_norms
from gossamer.kits.qat import qat_layers
from gossamer.kits.sharpness import Ascent, measure_sharpness
from gossamer.models.store import save
from gossamer.pipeline.setup import set_up
from gossamer.recipe import Recipe
from gossamer.tasks.classification import Classification, logits_of, predictor

TRAIN, HELD = "cifar10_train_50000_q95.npz[{}:{}]", (20_000, 21_000)
TEST = "cifar10_test_8000.npz[0:{}]"
AUGMENT = {"scale": [0.6, 1.0], "ratio": [0.9, 1.1], "color_jitter": None}
SEEDS = (0, 1, 2)
BATCH = 64
RADII = (0.03, 0.1, 0.4)
"""Radii at which every model's sharpness is measured."""
COMMON = {"clip_start": "mse", "clip_decay": 1e-4}
RESNET = {"name": "preact_resnet8", "num_classes": 10, "options": {"width": 8}}
MOBILE = {
    "name": "mobilenetv2_cifar",
    "num_classes": 10,
    "options": {
        "stem": [16, 2], "head": 1280, "stages": [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2], [6, 64, 1, 1]],
    },
}  # fmt: skip
"""Narrow, with the published head: a width multiplier below 1 leaves it at 1280 (arXiv 1801.04381 section 4)."""
RELEASED = {
    "choose": "sharpness",
    "settle_norms": False,
    "warmup": 0.25,
    "policy_lr": 0.01,
    "baseline": 0.9,
    "band": 0.03,
}
"""The published search, but for the faster and less noisy generator that so short a run needs."""
BUDGET = {
    "controller": "table", "near_budget": True, "draws": 3, "warmup": 0.2, "policy_lr": 0.2, "entropy": 0.0,
    "policy_decay": 0.0, "band": 0.01,
}  # fmt: skip
"""The search within the budget."""
GIVEN = {"{} bit, one input 8": lambda bits: [(bits, 8 if k == 1 else bits) for k in range(19)]}
"""Widths (weights, input) of the decided layers of ``MOBILE`` that searched ones are compared with as well."""
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "images": 10_000, "model": {**RESNET, "options": {"width": 16}}, "float": 1560, "steps": 1560,
        "rho": {2: (0.1, 0.2, 0.4), 3: (0.2,), 4: (0.2,)},
        "searches": {"searched at {} bit": {**RELEASED, "search_steps": 780, "candidates": 20, "derive_batches": 8}},
    },
    "few": {
        "images": 1000, "model": RESNET, "float": 1000, "steps": 480,
        "rho": {2: (0.1, 0.2, 0.4), 3: (0.2,), 4: (0.2,)},
        "searches": {"searched at {} bit": {**RELEASED, "search_steps": 240, "candidates": 10, "derive_batches": 6}},
    },
    "small": {
        "images": 10_000, "model": RESNET, "float": 1600, "steps": 120, "rho": {3: (0.03,)},
        "searches": {"searched at {} bit": {**RELEASED, "search_steps": 50, "candidates": 6, "derive_batches": 3}},
    },
    "mobile": {
        "images": 45_000, "model": MOBILE, "float": 6000, "steps": 150, "test": 8000, "radii": (0.1,), "plain": False,
        "held": (45_000, 46_000), "rho": {3: (0.1,), 4: (0.1,)}, "given": GIVEN, "long": 4,
        "searches": {
            "searched apart at {} bit": {
                **BUDGET, "share": False, "choices": [2, 3, 4, 5, 8], "measured_start": True, "search_steps": 60,
                "candidates": 8, "derive_batches": 4,
            },
        },
    },
}  # fmt: skip
Job = tuple[dict[str, Any], int]


def items(size: dict[str, Any]) -> dict[str, Job]:
    """Return the method of every item and the steps of its training; sharpness-aware steps cost two."""
    steps, found = size["steps"], {}
    for bits, radii in size["rho"].items():
        plain = {"qat": {"bits": bits, **COMMON}}
        if size.get("plain", True):
            found[f"qat {bits} bit"] = (plain, steps)
            found[f"qat {bits} bit, twice as long"] = (plain, 2 * steps)
        for rho in radii:
            found[f"saq {bits} bit, rho {rho:g}"] = ({"saq": _sharp(bits, rho)}, steps)
        if "long" in size:  # about what search and training cost together
            found[f"saq {bits} bit, {size['long']} times as long"] = (
                {"saq": _sharp(bits, radii[0])},
                size["long"] * steps,
            )
        for name, widths in size.get("given", {}).items():
            found[f"saq {name.format(bits)}"] = ({"saq": _sharp(widths(bits), radii[0])}, steps)
        for name, options in size["searches"].items() if bits > 2 else ():  # narrower and wider layers are to be had
            search = {"search": True, "target_bops": f"{bits}bit", **options}
            found[f"saq {name.format(bits)}"] = ({"saq": {**_sharp(bits, radii[0]), **search}}, steps)
    return found


def _sharp(bits: Any, rho: float) -> dict[str, Any]:
    return {"bits": bits, "rho": rho, "norm_updates": "first", **COMMON}


def device_of(model: torch.nn.Module) -> torch.device:
    """Return where the model lives."""
    return next(model.parameters()).device


def recipe(train: str, model: Any, methods: list[dict[str, Any]], steps: int, seed: int, lr: float) -> Recipe:
    """Return the recipe of one run on the images ``train``."""
    searching = any(options.get("search") for m in methods for options in m.values())
    return Recipe(
        model=model,
        data={"train": train, "augment": AUGMENT, "search_share": 0.2 if searching else 0.0},
        methods=methods,
        train={
            "steps": steps, "batch_size": BATCH, "optimizer": "sgd", "lr": lr, "weight_decay": 1e-4,
            "checkpoint_every": 100,
        },
        seed=seed,
    )  # fmt: skip


def trained(
    data: Path, run: Recipe, folder: Path, size: dict[str, Any]
) -> tuple[torch.nn.Module, Any, dict[str, float]]:
    """Return the finished model, the set-up and what was measured before ``finish``."""
    ready = set_up(run)
    options = RunOptions(resume=True, identity=run.identity(), mark_finished=False, quiet=True)
    loop = Loop(
        ready.stack, ready.task, ready.loaders, ready.plan,
        settings=run.train, run_dir=folder, seed=run.seed, options=options,
    )  # fmt: skip
    model = loop.train(ready.model)
    settle(model, ready)
    before = measure(data, model, ready, size) if qat_layers(model) else {}
    return loop.finish(model).cpu(), ready, before


def settle(model: torch.nn.Module, ready: Any, count: int = 30) -> None:
    """Replace the running statistics of all norms by their mean over training batches.

    Those of a short training lag behind the weights: they alone cost 0.09 nats of held-out loss and raised the measured
    sharpness tenfold, whatever the method.
    """
    where, loader = device_of(model), ready.loaders["train"]
    reestimate_norms(model, (loader(Step("settle", "main", i, count))["image"].to(where) for i in range(count)))


def task_loss(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Return the cross-entropy."""
    return Classification().cross_entropy(logits_of(model(batch["image"])), batch["target"])


def measure(data: Path, model: torch.nn.Module, ready: Any, size: dict[str, Any]) -> dict[str, float]:
    """Return held-out loss and sharpness of a trainable model (the paper's measure)."""
    where, radii = device_of(model), size.get("radii", RADII)
    images = f"npz:{data / TRAIN.format(*size.get('held', HELD))}"
    held = [
        {k: v.to(where) if isinstance(v, torch.Tensor) else v for k, v in b.items()}
        for b in batches(open_data(images), eval_transform(ready.preprocessing), 100)
    ]
    found = {r: measure_sharpness(model, held, task_loss, Ascent(rho=r)) for r in radii}
    return {"loss": found[radii[0]].loss, **{f"sharpness at {r:g}": m.rise for r, m in found.items()}}


def accuracy(data: Path, model: torch.nn.Module, ready: Any, count: int = 4000) -> float:
    """Return the top-1 accuracy in percent on the first ``count`` test images."""
    images = batches(open_data(f"npz:{data / TEST.format(count)}"), eval_transform(ready.preprocessing), 200)
    return 100 * Classification().evaluate(predictor(model), images).top1


class Bench:
    """The experiment: where its data are and where its results go.

    Args:
        data: Folder with the CIFAR-10 files.
        out: Folder of runs and results.
        size: Entry of ``SIZES``.
        only: Items to run start so.
        seeds: Seeds of the items; the float model is that of seed 0.
    """

    def __init__(  # noqa: PLR0913 - the options of the command line
        self, data: Path, out: Path, size: dict[str, Any], only: str = "", seeds: Sequence[int] = SEEDS
    ) -> None:
        self.data, self.out, self.size, self.only, self.seeds = data, out, size, only, tuple(seeds)
        self.train = f"npz:{data / TRAIN.format(0, size['images'])}"

    def float_model(self) -> Path:
        """Train the float model once; returns its folder."""
        folder = self.out / "float-model"
        if not (folder / "model.json").is_file():
            run = recipe(self.train, self.size["model"], [], self.size["float"], 0, 0.1)
            model, ready, _ = trained(self.data, run, self.out / "float", self.size)
            (self.out / "float.json").write_text(json.dumps({"top1": self.accuracy(model.eval(), ready)}))
            save(model, folder)
        return folder

    def result(self, name: str, seed: int) -> Path:
        """Return where the result of a job is kept."""
        return self.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}" / "result.json"

    def one(self, name: str, seed: int, job: Job) -> None:
        """Run one item for one seed."""
        method, steps = job
        run = recipe(self.train, str(self.float_model()), [method], steps, seed, 0.02)
        start = time.process_time()
        finished, ready, before = trained(self.data, run, self.result(name, seed).parent, self.size)
        seconds = {"processor seconds": time.process_time() - start}
        told = next(iter(ready.stack.describe(finished).values()))
        (self.result(name, seed).parent / "told.json").write_text(json.dumps(told, indent=1))  # widths per layer
        found = {**before, "top1": self.accuracy(finished, ready), "bops": told["facts"]["BOPs per image"], **seconds}
        self.result(name, seed).write_text(json.dumps(found))

    def accuracy(self, model: torch.nn.Module, ready: Any) -> float:
        """Return the top-1 accuracy in percent on the test images."""
        return accuracy(self.data, model, ready, self.size.get("test", 4000))

    def jobs(self, index: int, of: int) -> None:
        """Run every ``of``-th job that is not done, dearest first."""
        every = [(n, s, job) for n, job in items(self.size).items() if n.startswith(self.only) for s in self.seeds]
        every.sort(key=lambda j: -j[2][1] * (1 + ("saq" in j[2][0]) + ("searched" in j[0])))
        for name, seed, job in every[index::of]:
            if not self.result(name, seed).is_file():
                self.one(name, seed, job)

    def table(self) -> None:
        """Print mean and deviation over the seeds and write all figures."""
        table: dict[str, list[dict[str, Any]]] = {}
        for name in items(self.size):
            files = [self.result(name, seed) for seed in self.seeds]
            table[name] = rows = [json.loads(f.read_text()) for f in files if f.is_file()]
            if rows:
                shown = {k: [r[k] for r in rows] for k in rows[0]}
                spread = {
                    k: (round(statistics.mean(v), 4), round(statistics.stdev(v), 4) if len(v) > 1 else 0.0)
                    for k, v in shown.items()
                }
                print(f"{name:28} {len(rows)} seeds", spread, flush=True)
        (self.out / "saq.json").write_text(json.dumps(table, indent=1))
        print("float", json.loads((self.out / "float.json").read_text()))


def main() -> None:
    """Run what is missing; without ``--part`` print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--part", default=None, metavar="I/N")
    parser.add_argument("--only", default="", help="run items that start so")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.data, args.out, SIZES[args.size], args.only, args.seeds)
    bench.float_model()
    index, of = map(int, (args.part or "0/1").split("/"))
    bench.jobs(index, of)
    if args.part is None:
        bench.table()


if __name__ == "__main__":
    main()
