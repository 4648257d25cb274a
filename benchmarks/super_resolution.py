"""Fully quantized super-resolution against float training and LSQ on the same layers, and what int8 gains in runtimes.

``python benchmarks/super_resolution.py OUT --data DATA [--size toy|short|full] [--scales 2 4] [--only TEXT] [--speed]``

Trains an EDSR in float on the photographs of ``DATA/sr_train_bsds.zip`` (random patches, MATLAB's bicubic), then from
it every arm, one run folder each, and measures the finished models (integer layers) on ``DATA/sr_test.zip``.
What is done is not done again, an interrupted run goes on. Runs on a GPU where there is one; ``--workers`` reads ahead.
With ``--speed`` the graphs of the float and the quantized model are timed side by side in both runtimes (any machine;
weights do not matter). The table is printed and written to ``OUT/super_resolution_x*.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from gossamer.engine.loop import Loop
from gossamer.engine.options import RunOptions
from gossamer.models.build import load_model
from gossamer.models.store import save
from gossamer.pipeline.benching import bench
from gossamer.pipeline.setup import set_up
from gossamer.recipe import Recipe
from gossamer.tasks.task import in_evaluation

SIZES: dict[str, dict[str, Any]] = {
    "toy": {"model": {"depth": 2, "width": 16}, "float": 60, "steps": 30, "batch": 4, "seeds": 1, "images": 2},
    "short": {"model": {"depth": 8, "width": 32}, "float": 6000, "steps": 2000, "batch": 16, "seeds": 3, "images": 100},
    "full": {"model": {}, "float": 20000, "steps": 5000, "batch": 16, "seeds": 3, "images": 100},
}
SETS = {2: ("Set5", "Set14", "BSD100"), 4: ("Set5", "Set14", "BSD100", "Urban100")}
LSQ = {"grid": "midtread", "start": "lsq", "grad_scale": True, "alpha": 0.0}
"""LSQ (arXiv 1902.08153) on the same layers, with its own start and its gradient scale."""
ONCE = ("float", "naive 4")


def _bits(w: int, a: int, o: int) -> dict[str, int]:
    return {"weight_bits": w, "input_bits": a, "output_bits": o}


def arms() -> dict[str, dict[str, Any] | None]:
    """Return the options of the method for every arm; ``None`` trains the float model for as long."""
    return {
        "float": None,
        "fqsr 8": _bits(8, 8, 8),
        "fqsr 8, deployed with a zero": {**_bits(8, 8, 8), "deployment": "midtread", "deployment_share": 0.2},
        "fqsr 6": _bits(6, 6, 6),
        "fqsr 4": _bits(4, 4, 4),
        "fqsr 4, no calibration loss": {**_bits(4, 4, 4), "alpha": 0.0},
        "lsq 4": {**_bits(4, 4, 4), **LSQ},
        "fqsr 4, outputs 8": _bits(4, 4, 8),
        "lsq 4, outputs 8": {**_bits(4, 4, 8), **LSQ},
        "naive 4": {**_bits(4, 4, 4), "start": "one", "alpha": 0.0},
    }


def recipe(model: Any, data: Path, size: dict[str, Any], **rest: Any) -> Recipe:
    """Return the recipe of one run."""
    settings = {"batch_size": size["batch"], "optimizer": "adam", "weight_decay": 0.0, "min_lr_ratio": 0.0,
                "checkpoint_every": 500}  # fmt: skip
    return Recipe(
        model=model, task={"super_resolution": {"patch": 48 if size["batch"] > 4 else 24}},
        data={"train": f"zip:{data / 'sr_train_bsds.zip'}", "workers": size["workers"]},
        methods=rest.get("methods", []), train={**settings, "steps": rest["steps"], "lr": rest["lr"]},
        seed=rest.get("seed", 0),
    )  # fmt: skip


def trained(run: Recipe, folder: Path) -> tuple[torch.nn.Module, Any]:
    """Return the finished model and the set-up of a run, which goes on where it was interrupted."""
    ready = set_up(run)
    options = RunOptions(resume=True, identity=run.identity(), mark_finished=False, quiet=False)
    loop = Loop(
        ready.stack, ready.task, ready.loaders, ready.plan,
        settings=run.train, run_dir=folder, seed=run.seed, options=options,
    )  # fmt: skip
    return loop.run(ready.model), ready


def scores(model: torch.nn.Module, ready: Any, data: Path, scale: int, images: int) -> dict[str, float]:
    """Return PSNR on the luma of every test set, whole pictures."""
    found = {}
    for name in SETS[scale]:
        source = ready.task.open(f"zip:{data / 'sr_test.zip'}#{name}/HR[0:{images}]")
        batches = ready.task.batches(source, ready.preprocessing, 1)
        found[name] = round(ready.task.evaluate(in_evaluation(model), batches).score, 4)
    return found


def one(out: Path, data: Path, size: dict[str, Any], scale: int, arm: str, seed: int) -> dict[str, Any]:
    """Run one arm for one seed, or read what an earlier call found."""
    folder = out / f"x{scale}" / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    done = folder / "result.json"
    if not done.is_file():
        options = arms()[arm]
        methods = [] if options is None else [{"fqsr": options}]
        dense = str(out / f"x{scale}" / "model")
        run = recipe(dense, data, size, methods=methods, steps=size["steps"], lr=1e-4, seed=seed)
        model, ready = trained(run, folder)
        found: dict[str, Any] = scores(model, ready, data, scale, size["images"])
        if methods:
            found["bops"] = next(iter(ready.stack.describe(model).values()))["facts"]["BOPs per image"]
            save(model.cpu(), folder / "model", stack=ready.stack)
        done.write_text(json.dumps(found))
    return json.loads(done.read_text())


def float_model(out: Path, data: Path, size: dict[str, Any], scale: int) -> None:
    """Train the float model once."""
    folder = out / f"x{scale}" / "model"
    if not (folder / "model.json").is_file():
        start = {"name": f"edsr_baseline_x{scale}", "options": size["model"]}
        run = recipe(start, data, size, steps=size["float"], lr=2e-4)
        model, ready = trained(run, folder.parent / "training")
        found = scores(model, ready, data, scale, size["images"])
        (folder.parent / "float.json").write_text(json.dumps(found))
        save(model.cpu(), folder)


def accuracy(out: Path, data: Path, size: dict[str, Any], scale: int, only: str) -> None:
    """Run everything for one scale and print mean and deviation over the seeds."""
    float_model(out, data, size, scale)
    print(f"x{scale} before", (out / f"x{scale}" / "float.json").read_text(), flush=True)
    table: dict[str, list[dict[str, Any]]] = {}
    for arm in arms():
        if only in arm:
            seeds = range(1 if arm in ONCE else size["seeds"])
            table[arm] = [one(out, data, size, scale, arm, seed) for seed in seeds]
            rows = {k: [r[k] for r in table[arm]] for k in table[arm][0]}
            shown = {k: (round(statistics.mean(v), 3), round(statistics.pstdev(v), 3)) for k, v in rows.items()}
            print(f"x{scale} {arm:30}", shown, flush=True)
            (out / f"super_resolution_x{scale}.json").write_text(json.dumps(table, indent=1))


def speed(out: Path, size: dict[str, Any], scale: int, side: int) -> None:
    """Time float and quantized graphs side by side; the quantized ones are calibrated, not trained."""
    rows = []
    for name in (f"edsr_baseline_x{scale}", f"srresnet_x{scale}"):
        options = {**(size["model"] if name.startswith("edsr") else {}), "img_size": side}
        dense = load_model(name, **options).eval()
        shapes = {"float": dense}
        for label, choice in (("fqsr 8", {}), ("fqsr 8, with a zero", {"deployment": "midtread"})):
            shapes[label] = _calibrated(name, options, choice, side)
        for runtime in ("openvino", "onnxruntime"):
            found = bench(
                list(shapes.values()), batch=[1], threads=2, runtimes=[runtime], precision=None, rounds=7
            )
            each = len(found) // len(shapes)
            for k, row in enumerate(found):
                rows.append({"network": name, "arm": list(shapes)[k // each], **row})
                print({k: rows[-1][k] for k in ("network", "arm", "runtime", "precision", "median_ms", "ratio",
                                                "ratio_best_dense", "trusted")}, flush=True)  # fmt: skip
    (out / f"speed_x{scale}_{side}.json").write_text(json.dumps(rows, indent=1))


def _calibrated(name: str, options: dict[str, Any], choice: dict[str, Any], side: int) -> torch.nn.Module:
    from gossamer.core import registry
    from gossamer.kits.calibration import calibrate

    method = registry.build("fqsr", {"warmup": 1, **choice})
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return calibrate(method, load_model(name, **options), images).eval()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--size", choices=SIZES, default="short")
    parser.add_argument("--scales", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", default="", help="arms whose name holds this")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--side", type=int, default=128, help="low-resolution side of the timed graphs")
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    size = {**SIZES[given.size], "workers": given.workers}
    for scale in given.scales:
        if given.speed:
            speed(given.out, size, scale, given.side)
        else:
            accuracy(given.out, given.data, size, scale, given.only)


if __name__ == "__main__":
    main()
